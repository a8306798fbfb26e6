"""Accuracy against latency, as the numbers an SVG needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.rows import Row

WIDTH, HEIGHT = 760.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 20.0, 16.0, 46.0
_LABEL_HEIGHT, _LETTER_WIDTH, _LONGEST_LABEL = 14.0, 6.4, 36
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
    """A row in the plane: center, ends of its accuracy interval, label ("" without room), and whether nothing beats it."""

    row: Row
    x: float
    y: float
    y_low: float
    y_high: float
    label: str
    label_x: float
    label_y: float
    anchor: str
    pareto: bool


@dataclass(frozen=True)
class Plot:
    """Points, ticks as (position, text), and for each setting the line through the points that nothing beats."""

    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    frontiers: tuple[str, ...]
    width: float = WIDTH
    height: float = HEIGHT


def pareto(rows: Sequence[Row]) -> list[bool]:
    """For each row with an accuracy, whether no other one of its run, model, batch and threads is at least as accurate and as
    fast, and better in one."""
    flags = [False] * len(rows)
    settings: dict[tuple[int, str, int, int], list[tuple[float, float, int]]] = {}
    for index, row in enumerate(rows):
        if row.accuracy is not None:
            settings.setdefault(row.setting, []).append((row.p50_ms, -row.accuracy, index))
    for entries in settings.values():
        most, fastest = -math.inf, math.inf  # of the last row that nothing beats
        for p50_ms, negative, index in sorted(entries):
            if -negative > most or (-negative, p50_ms) == (most, fastest):
                flags[index], most, fastest = True, -negative, p50_ms
    return flags


def accuracy_latency_plot(rows: Sequence[Row]) -> Plot | None:
    """Lay out rows that have an accuracy; None where there is none."""
    shown = [(row, best) for row, best in zip(rows, pareto(rows), strict=True) if row.accuracy is not None]
    if not shown:
        return None
    x, y = _axes([row for row, _ in shown])
    placed: list[tuple[float, float, float, float]] = [_box(x(row.p50_ms) - 5, y(_percent(row)), 10) for row, _ in shown]
    points = []
    for row, best in sorted(shown, key=lambda entry: (not entry[1], entry[0].p50_ms)):
        label, label_x, label_y, anchor = "", 0.0, 0.0, "start"
        if len(shown) <= _LABELLED:
            label, label_x, label_y, anchor = _label(row, x(row.p50_ms), y(_percent(row)), placed)
        low, high = (100 * value if value is not None else _percent(row) for value in (row.accuracy_low, row.accuracy_high))
        points.append(Point(row, x(row.p50_ms), y(_percent(row)), y(low), y(high), label, label_x, label_y, anchor, best))
    return Plot(tuple(points), x.ticks(6), y.ticks(5), tuple(_frontiers(points)))


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _percent(row: Row) -> float:
    return 100 * (row.accuracy or 0.0)


def _axes(rows: Sequence[Row]) -> tuple[Axis, Axis]:
    latencies, accuracies = [row.p50_ms for row in rows], [_percent(row) for row in rows]
    logarithmic = max(latencies) > _LOGARITHMIC * min(latencies)
    step = nice_step(max(max(accuracies) - min(accuracies), 0.4) / 4)
    low = max(0.0, (math.floor(min(accuracies) / step - 0.5)) * step)
    high = min(100.0, (math.ceil(max(accuracies) / step + 0.5)) * step)
    left, right = (min(latencies) / 1.3, max(latencies) * 1.3) if logarithmic else (0.0, max(latencies) * 1.12)
    return Axis(left, right, LEFT, WIDTH - RIGHT, logarithmic), Axis(low, high, HEIGHT - BOTTOM, TOP)


def _box(x: float, y: float, width: float) -> tuple[float, float, float, float]:
    return x, y - _LABEL_HEIGHT / 2, x + width, y + _LABEL_HEIGHT / 2


def _label(row: Row, x: float, y: float, placed: list[tuple[float, float, float, float]]) -> tuple[str, float, float, str]:
    """The label where it covers neither points nor labels: right, left, above or below; none where all are taken."""
    text = row.name if len(row.name) <= _LONGEST_LABEL else row.name[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
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
