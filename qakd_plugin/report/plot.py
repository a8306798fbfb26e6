"""Accuracy against latency, as the numbers an SVG needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.record import Row

WIDTH, HEIGHT = 760.0, 380.0
_LABELS = 24
"""With more points than this only those that nothing beats are labelled."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 20.0, 48.0


@dataclass(frozen=True)
class Point:
    """A row in the plane: center, the ends of its accuracy interval, a label and a tooltip, whether nothing beats it."""

    x: float
    y: float
    y_low: float
    y_high: float
    label: str
    label_y: float
    tooltip: str
    kind: str
    pareto: bool


@dataclass(frozen=True)
class Plot:
    """Points, axis ticks as (position, text), and the line through the points that nothing beats."""

    points: tuple[Point, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    frontier: str
    width: float = WIDTH
    height: float = HEIGHT


def pareto(rows: Sequence[Row]) -> list[bool]:
    """For each row with an accuracy, whether no other one is at least as accurate and as fast, and better in one."""
    flags = [False] * len(rows)
    most = -math.inf
    scored = sorted((row.p50_ms, -row.accuracy, index) for index, row in enumerate(rows) if row.accuracy is not None)
    for _, group in itertools.groupby(scored, key=lambda entry: entry[0]):
        equally_fast = list(group)
        top = -equally_fast[0][1]
        for _, negative, index in equally_fast:
            flags[index] = -negative == top > most
        most = max(most, top)
    return flags


def accuracy_latency_plot(rows: Sequence[Row]) -> Plot | None:
    """Lay out rows that have an accuracy; None where there is none."""
    shown = [(row, best) for row, best in zip(rows, pareto(rows), strict=True) if row.accuracy is not None]
    if not shown:
        return None
    latencies = [row.p50_ms for row, _ in shown]
    accuracies = [100 * (row.accuracy or 0.0) for row, _ in shown]
    x_low, x_high = 0.0, max(latencies) * 1.15
    y_step = _nice_step(max(max(accuracies) - min(accuracies), 0.4) / 4)
    y_low = math.floor(min(accuracies) / y_step - 0.5) * y_step
    y_high = min(100.0, math.ceil(max(accuracies) / y_step + 0.5) * y_step)

    def x(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        inside = min(max(value, y_low), y_high)
        return HEIGHT - _BOTTOM - (inside - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    labelled = [best or len(shown) <= _LABELS for _, best in shown]
    labels = _spread([y(value) for value in accuracies], [x(value) for value in latencies], labelled)
    points = [
        Point(
            x=x(row.p50_ms),
            y=y(accuracy),
            y_low=y(100 * (row.accuracy_low if row.accuracy_low is not None else row.accuracy or 0.0)),
            y_high=y(100 * (row.accuracy_high if row.accuracy_high is not None else row.accuracy or 0.0)),
            label=row.name if named else "",
            label_y=label_y,
            tooltip=f"{row.name}, {row.runtime}: {accuracy:.2f} % at {row.p50_ms:.3f} ms",
            kind="float"
            if row.weight_bits == 32
            else ("distilled" if row.method not in {"PTQ", "QAT"} else row.method.lower()),
            pareto=best,
        )
        for (row, best), accuracy, label_y, named in zip(shown, accuracies, labels, labelled, strict=True)
    ]
    front = sorted((point for point in points if point.pareto), key=lambda point: point.x)
    x_step = _nice_step(x_high / 5)
    return Plot(
        points=tuple(points),
        x_ticks=tuple((x(k * x_step), _short(k * x_step)) for k in range(int(x_high / x_step) + 1)),
        y_ticks=tuple((y(y_low + k * y_step), _short(y_low + k * y_step)) for k in range(round((y_high - y_low) / y_step) + 1)),
        frontier=" ".join(f"{point.x:.1f},{point.y:.1f}" for point in front),
    )


def _nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _spread(
    ys: Sequence[float], xs: Sequence[float], labelled: Sequence[bool], gap: float = 14.0, near: float = 150.0
) -> list[float]:
    """Move labels of neighbouring points apart."""
    placed: list[tuple[float, float]] = []
    result = list(ys)
    for index in sorted((i for i in range(len(ys)) if labelled[i]), key=lambda i: ys[i]):
        y = ys[index]
        while any(abs(y - other_y) < gap and abs(xs[index] - other_x) < near for other_x, other_y in placed):
            y += 2
        placed.append((xs[index], y))
        result[index] = y
    return result
