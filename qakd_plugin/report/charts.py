"""Small drawings of a report beside its main plot: training, time of layers, latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .._common.history import START, below_start, kept_of
from ..bench.rows import LayerTime, Row
from .ranking import RankingPlot, number, ranking_plot
from .scatter import Axis

_POINTS = 200
"""A curve of more epochs is thinned to about this many."""

_LAYERS = 40
"""Of more layers the slowest are listed."""


@dataclass(frozen=True)
class Curve:
    """One series over epochs: polyline in its panel, ticks, and the last, smallest and largest value."""

    name: str
    points: str
    y_ticks: tuple[tuple[float, str], ...]
    last: float
    low: float
    high: float


@dataclass(frozen=True)
class TrainingRun:
    """What a run of ``distill`` did.

    Attributes:
        name: of the run.
        phases: names in order, with the epochs of each.
        epochs: in all.
        outcome: what was lost against the prepared model, or that it was kept; empty where neither is known.
        curves: loss, and the metric on held-out data.
        columns: of the table of epochs.
        lines: its cells.
        augmentations: (from which epoch on, what was chosen, all scores).
        rankings: scatter plots of scores against their two parts.
    """

    name: str
    phases: str
    epochs: int
    outcome: str
    curves: tuple[Curve, ...]
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    augmentations: tuple[tuple[str, str, str], ...]
    rankings: tuple[RankingPlot, ...]


@dataclass(frozen=True)
class LayerTable:
    """Layers of one row: the slowest ones, what is left, and the share of time per precision.

    Attributes:
        row: whose.
        total_ms: of all layers.
        shares: (precision, share of the time, milliseconds), largest first.
        layers: (layer, its share of the time), slowest first.
        left_out: number and milliseconds of those that are not listed.
    """

    row: Row
    total_ms: float
    shares: tuple[tuple[str, float, float], ...]
    layers: tuple[tuple[LayerTime, float], ...]
    left_out: tuple[int, float]


def training_run(entry: Mapping[str, Any]) -> TrainingRun:
    """Lay out one entry of a document's training."""
    history: list[Mapping[str, Any]] = list(entry["history"])
    metric = _shown_metric(history)
    names = [name for name in ("loss", metric) if name is not None]
    curves = [curve for name in names if (curve := _curve(name, [number(row.get(name)) for row in history])) is not None]
    thinned = history[:: max(1, len(history) // _POINTS)]
    columns = tuple(dict.fromkeys(key for row in thinned for key, value in row.items() if _is_cell(value)))[:16]
    return TrainingRun(
        name=str(entry["name"]),
        phases=_phases(history),
        epochs=sum(_epochs(history)),
        outcome=_outcome(history),
        curves=tuple(curves),
        columns=columns,
        lines=tuple(tuple(_cell(row.get(column)) for column in columns) for row in thinned),
        augmentations=tuple(_choice(row) for row in history if isinstance(row.get("augmentation_scores"), dict)),
        rankings=tuple(drawing for row in history if (drawing := _ranking(row)) is not None),
    )


def layer_table(row: Row) -> LayerTable:
    """Lay out the layers of a row that was profiled."""
    total = sum(layer.time_ms for layer in row.layers)
    by_precision: dict[str, float] = {}
    for layer in row.layers:
        by_precision[layer.precision] = by_precision.get(layer.precision, 0.0) + layer.time_ms
    slowest = sorted(row.layers, key=lambda layer: -layer.time_ms)
    listed, rest = slowest[:_LAYERS], slowest[_LAYERS:]
    return LayerTable(
        row,
        total,
        tuple((name, _part(time, total), time) for name, time in sorted(by_precision.items(), key=lambda entry: -entry[1])),
        tuple((layer, _part(layer.time_ms, total)) for layer in listed),
        (len(rest), sum(layer.time_ms for layer in rest)),
    )


def latency_bars(rows: Sequence[Row], most: int = 60) -> list[tuple[Row, float]]:
    """Rows, fastest first, with the length of their bars as a share of the longest."""
    shown = sorted(rows, key=lambda row: row.p50_ms)[:most]
    return [(row, row.p50_ms / shown[-1].p50_ms) for row in shown]


def _part(time: float, total: float) -> float:
    return time / total if total else 0.0


def _curve(name: str, values: Sequence[float | None]) -> Curve | None:
    known = [(index, value) for index, value in enumerate(values) if value is not None]
    if not known:
        return None
    low, high = min(value for _, value in known), max(value for _, value in known)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    x, y = Axis(0.0, max(len(values) - 1, 1), 46.0, 250.0), Axis(low - margin, high + margin, 84.0, 8.0)
    thinned = known[:: max(1, len(known) // _POINTS)]
    thinned += [] if thinned[-1] == known[-1] else [known[-1]]
    points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in thinned)
    return Curve(name, points, y.ticks(4), known[-1][1], low, high)


def _shown_metric(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Accuracy, the first number of another metric, or agreement with the teacher."""
    names = list(dict.fromkeys(key for row in history for key in row if key.startswith("val_")))
    compared = [name for name in names if name.startswith(("val_agreement", "val_sqnr_db"))]
    own = [name for name in names if name not in compared and not name.startswith("val_teacher_")]
    return next((name for name in ("val_accuracy", *own, *compared) if name in names), None)


def _outcome(history: Sequence[Mapping[str, Any]]) -> str:
    """By numbers of which it is known that larger is better; the history says which row was kept."""
    rows = [
        {name: value for name, value in row.items() if number(value) is not None} | {"best": row.get("best") is True}
        for row in history
    ]
    if not rows or not all("epoch" in row for row in rows):
        return ""

    def known(row: Mapping[str, Any]) -> tuple[list[str], int]:
        return [name for name in row if name == "val_accuracy"], 1

    kept = "The prepared model was kept: no epoch was as good." if kept_of(rows)["epoch"] == START and len(rows) > 1 else ""
    return below_start(rows, known) or kept


def _phases(history: Sequence[Mapping[str, Any]]) -> str:
    counted: dict[str, int] = {}
    for row, count in zip(history, _epochs(history), strict=True):
        name = str(row.get("phase", "training"))
        counted[name] = counted.get(name, 0) + count
    return ", ".join(f"{name} {count} epoch{'s' * (count > 1)}" for name, count in counted.items() if count)


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many epochs each row stands for: those since the row before, where a history was thinned; none, of the start."""
    numbers = [-1, *(number for row in history if type(number := row.get("epoch")) is int)]
    counts = [after - before for before, after in pairwise(numbers)]
    in_order = len(counts) == len(history) and all(count >= (index > 0) for index, count in enumerate(counts))
    return counts if in_order else [1] * len(history)


def _is_cell(value: object) -> bool:
    return isinstance(value, str) or number(value) is not None


def _cell(value: object) -> str:
    found = number(value)
    if found is None:
        return value if isinstance(value, str) else "-"
    return str(value) if isinstance(value, int) else f"{found:.4g}"


def _choice(row: Mapping[str, Any]) -> tuple[str, str, str]:
    scores = {str(name): value for name, found in row["augmentation_scores"].items() if (value := number(found)) is not None}
    ordered = ", ".join(f"{name} {value:.3f}" for name, value in sorted(scores.items(), key=lambda entry: -entry[1]))
    return _cell(row.get("epoch")), str(row.get("augmentation", "none")), ordered


def _ranking(row: Mapping[str, Any]) -> RankingPlot | None:
    records = [record for record in row.get("augmentation_ranking") or () if isinstance(record, dict)]
    return ranking_plot(records, f"Ranking at epoch {_cell(row.get('epoch'))}")
