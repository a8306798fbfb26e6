"""Accuracy, or another metric, against latency, as the numbers an SVG needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bench.rows import MetricValue, Row

WIDTH, HEIGHT = 760.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 20.0, 16.0, 46.0
_LABEL_HEIGHT, _LETTER_WIDTH, _LONGEST_LABEL = 14.0, 6.8, 44
_LARGEST_POINT, _SMALLEST_POINT = 1.7, 0.6
"""Of a point's radius, by the size of its file; 1 where that is not known."""
_LOGARITHMIC = 12.0
"""Latencies that differ by more than this factor are drawn on a logarithmic axis."""

_TICK_WIDTH = 42.0

_LABELLED = 200
"""With more points than this none has a label."""

_FRONTIERS = 6
"""With rows of more settings no lines are drawn: they would cross each other and tell nothing."""


@dataclass(frozen=True)
class Axis:
    """A scale from values to positions.

    Attributes:
        low: value at ``start``.
        high: value at ``end``.
        start: position.
        end: position.
        logarithmic: equal factors are equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; values outside stay at the end of the axis."""
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + min(max((at - low) / (high - low), 0.0), 1.0) * (self.end - self.start)

    def ticks(self, number: int) -> tuple[tuple[float, str], ...]:
        """Round values within the axis as (position, text)."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            room = abs(self.end - self.start) / _TICK_WIDTH
            factors = (1, 2, 5) if 3 * math.log10(self.high / self.low) < room else (1,)
            every = [factor * 10.0**power for power in powers for factor in factors]
            values = [value for value in every if self.low * 0.999 <= value <= self.high * 1.001]
        else:
            step = nice_step((self.high - self.low) / number)
            first = math.ceil(self.low / step - 1e-9)
            values = [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return tuple((self(value), f"{value:.4g}") for value in values)


@dataclass(frozen=True)
class Point:
    """A row in the plane: its metric, center, ends of the interval, label ("" without room), and whether nothing beats it.

    ``scale`` is that of the outline, whose area is the size of the file; ``cut_low`` and ``cut_high`` say that the interval
    goes on beyond the axis.
    """

    row: Row
    metric: MetricValue
    x: float
    y: float
    y_low: float
    y_high: float
    label: str
    label_x: float
    label_y: float
    anchor: str
    pareto: bool
    scale: float
    cut_low: bool
    cut_high: bool


@dataclass(frozen=True)
class Plot:
    """Points, ticks as (position, text), and for each setting the line through the points that nothing beats.

    ``y_name`` is the metric, with its unit; ``better`` says what a better row is, ``corner`` where it lies; both are empty
    where the metric has no direction.
    """

    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    frontiers: tuple[str, ...]
    y_name: str
    better: str
    corner: str
    width: float = WIDTH
    height: float = HEIGHT


def pareto(rows: Sequence[Row]) -> list[bool]:
    """For each row with a metric that has a direction, whether no other one of its run, model, batch, threads and metric is at
    least as good and as fast, and better in one."""
    flags = [False] * len(rows)
    settings: dict[tuple[Any, ...], list[tuple[float, float, int]]] = {}
    for index, row in enumerate(rows):
        if row.metric is not None and row.rank is not None:
            settings.setdefault((*row.setting, row.metric.kind), []).append((row.p50_ms, -row.rank, index))
    for entries in settings.values():
        most, fastest = -math.inf, math.inf  # of the last row that nothing beats
        for p50_ms, negative, index in sorted(entries):
            if -negative > most or (-negative, p50_ms) == (most, fastest):
                flags[index], most, fastest = True, -negative, p50_ms
    return flags


def accuracy_latency_plot(rows: Sequence[Row]) -> Plot | None:
    """Lay out rows that have the metric of the first row that has one; None where there is none."""
    first = next((row.metric for row in rows if row.metric is not None), None)
    if first is None:
        return None
    shown = [
        (row, row.metric, best)
        for row, best in zip(rows, pareto(rows), strict=True)
        if row.metric is not None and row.metric.kind == first.kind
    ]
    x, y = _axes([row for row, _, _ in shown], [metric for _, metric, _ in shown])
    texts, scales = labels(rows), point_scales(rows)
    placed = [
        _box(x(row.p50_ms) - 5 * scales[id(row)], y(_drawn(metric, metric.value)), 10 * scales[id(row)])
        for row, metric, _ in shown
    ]
    points = []
    for row, metric, best in sorted(shown, key=lambda entry: (not entry[2], entry[0].p50_ms)):
        label, label_x, label_y, anchor = "", 0.0, 0.0, "start"
        at = y(_drawn(metric, metric.value))
        if len(shown) <= _LABELLED:
            label, label_x, label_y, anchor = _label(texts[id(row)], x(row.p50_ms), at, placed)
        ends = [_drawn(metric, metric.value if end is None else end) for end in (metric.low, metric.high)]
        cut = ends[0] < y.low, ends[1] > y.high
        low, high = map(y, ends)
        points.append(
            Point(row, metric, x(row.p50_ms), at, low, high, label, label_x, label_y, anchor, best, scales[id(row)], *cut)
        )
    names = metric_words(first)
    return Plot(tuple(points), x.ticks(6), y.ticks(5), tuple(_frontiers(points)), *names)


def labels(rows: Sequence[Row]) -> dict[int, str]:
    """A label for each row, by its identity: its name, and where several rows share that also the runtime and what it computes
    in. A toolkit that all have in common is left out."""
    several = len({row.toolkit for row in rows if row.toolkit is not None}) > 1
    names = {id(row): row.name if several else row.name.removesuffix(f" ({row.toolkit})") for row in rows}
    runtimes: dict[tuple[int, str], set[str]] = {}
    precisions: dict[tuple[int, str, str], set[str]] = {}
    for row in rows:
        runtimes.setdefault((row.run, names[id(row)]), set()).add(row.runtime)
        precisions.setdefault((row.run, names[id(row)], row.runtime), set()).add(row.precision)
    found = {}
    for row in rows:
        name = names[id(row)]
        where = [row.runtime] * (len(runtimes[row.run, name]) > 1)
        where += [row.precision] * (len(precisions[row.run, name, row.runtime]) > 1)
        found[id(row)] = f"{name}, {' '.join(where)}" if where else name
    return found


def point_scales(rows: Sequence[Row]) -> dict[int, float]:
    """Scale of each row's outline, by the row's identity: areas are as sizes of files."""
    largest = max((row.file_mib for row in rows if row.file_mib is not None), default=None)
    return {
        id(row): 1.0
        if row.file_mib is None or largest is None
        else max(_SMALLEST_POINT, _LARGEST_POINT * math.sqrt(row.file_mib / largest))
        for row in rows
    }


def metric_words(metric: MetricValue) -> tuple[str, str, str]:
    """What an axis says of a metric, what a better row is in it, and in which corner of the plot better rows lie."""
    if metric.kind == ("accuracy", "%"):
        return "top-1 accuracy, %", "more accurate", "upper left"
    corner = {True: "upper left", False: "lower left", None: ""}[metric.higher_is_better]
    return f"{metric.name}{', %' if metric.unit == '%' else ''}", "better" if corner else "", corner


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _drawn(metric: MetricValue, value: float) -> float:
    return 100 * value if metric.unit == "%" else value


def _axes(rows: Sequence[Row], metrics: Sequence[MetricValue]) -> tuple[Axis, Axis]:
    latencies, values = [row.p50_ms for row in rows], [_drawn(metric, metric.value) for metric in metrics]
    logarithmic = max(latencies) > _LOGARITHMIC * min(latencies)
    percent = metrics[0].unit == "%"
    least = 0.4 if percent else abs(max(values)) * 0.01 or 1.0
    step = nice_step(max(max(values) - min(values), least) / 4)
    low, high = (math.floor(min(values) / step - 0.5)) * step, (math.ceil(max(values) / step + 0.5)) * step
    low = max(0.0, low) if min(values) >= 0 else low
    high = min(100.0, high) if percent else high
    left, right = (min(latencies) / 1.3, max(latencies) * 1.3) if logarithmic else (0.0, max(latencies) * 1.12)
    return Axis(left, right, LEFT, WIDTH - RIGHT, logarithmic), Axis(low, high, HEIGHT - BOTTOM, TOP)


def _box(x: float, y: float, width: float) -> tuple[float, float, float, float]:
    return x, y - _LABEL_HEIGHT / 2, x + width, y + _LABEL_HEIGHT / 2


def _label(name: str, x: float, y: float, placed: list[tuple[float, float, float, float]]) -> tuple[str, float, float, str]:
    """The label where it covers neither points nor labels: right, left, above or below; none where all are taken."""
    text = name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
    width = _LETTER_WIDTH * len(text)
    for anchor, at_x, at_y in (
        ("start", x + 9, y),
        ("end", x - 9, y),
        ("middle", x, y - 15),
        ("middle", x, y + 15),
        ("start", x + 9, y - 13),
        ("start", x + 9, y + 13),
    ):
        left = at_x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = _box(left, at_y, width)
        if left < LEFT or left + width > WIDTH or box[1] < 0 or box[3] > HEIGHT - BOTTOM + 4:
            continue
        if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in placed):
            placed.append(box)
            return text, at_x, at_y + 4, anchor
    return "", x, y, "start"


def _frontiers(points: Sequence[Point]) -> list[str]:
    lines: dict[tuple[int, str, int, int], list[tuple[float, float]]] = {}
    for point in points:
        if point.pareto:
            lines.setdefault(point.row.setting, []).append((point.x, point.y))
    shown = lines.values() if len(lines) <= _FRONTIERS else ()
    return [" ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(line)) for line in shown if len(line) > 1]
