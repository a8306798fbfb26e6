"""A ranking for people: a table, a file, a drawing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._common.files import atomic_path, write_atomic
from .._common.optional import require
from .cmi import AugmentationScore
from .ranking import Ranking

PARTS = {"ce": ("cross_entropy", "cross-entropy"), "centroid": ("centroid_divergence", "centroid divergence")}
"""By form: the attribute that is subtracted from CMI, and its name."""


def console_table(ranking: Ranking) -> Table:
    """The ranking for a terminal of 80 columns, the best first."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("augmentation", overflow="fold", min_width=26)
    for heading in (f"score, {ranking.confidence:.0%}", "CMI", PARTS[ranking[0].form][1], "images"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for record in ranking:
        table.add_row(*_cells(record))
    return table


def _cells(record: AugmentationScore) -> list[str]:
    spread = record.interval[1] - record.score
    note = "tied" if record.tied_with_best else ("out" if record.dropped else "")
    return [
        record.name,
        f"{record.score:.3f} ± {spread:.3f}",
        f"{record.cmi:.3f}",
        f"{getattr(record, PARTS[record.form][0]):.3f}",
        str(record.num_samples),
        note,
    ]


def as_document(ranking: Ranking) -> dict[str, Any]:
    """Plain data for JSON; an interval without bounds is null."""
    records: list[dict[str, Any]] = []
    for record in ranking:
        finite = all(abs(bound) < float("inf") for bound in record.interval)
        records.append({**vars(record), "interval": list(record.interval) if finite else None})
    return {"confidence": ranking.confidence, "teacher_forwards": ranking.teacher_forwards, "records": records}


def write_records(ranking: Ranking, path: str | os.PathLike[str]) -> Path:
    """Write all figures as JSON."""
    return write_atomic(path, json.dumps(as_document(ranking), indent=1, allow_nan=False) + "\n")


def draw(ranking: Ranking, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draw CMI against what is subtracted from it, with lines of equal score, as PNG and SVG beside ``path``.

    Raises:
        MissingPackageError: matplotlib is not installed; the message carries the pip line.
    """
    require("matplotlib", extra="report", purpose="draw a ranking")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    _plot(figure.add_subplot(), ranking)
    target = Path(path)
    paths = target.with_suffix(".png"), target.with_suffix(".svg")
    for written in paths:
        with atomic_path(written) as temporary:
            figure.savefig(temporary, format=written.suffix[1:], dpi=150)
    return paths


def _plot(axes: Any, ranking: Ranking) -> None:
    attribute, name = PARTS[ranking[0].form]
    points = [(getattr(record, attribute), record.cmi) for record in ranking]
    middle = (min(x for x, _ in points) + max(x for x, _ in points)) / 2
    for record, (x, y) in zip(ranking, points, strict=True):
        best = record is ranking[0]
        colour = "tab:green" if best or record.tied_with_best else ("0.6" if record.dropped else "tab:blue")
        axes.plot(x, y, "*" if best else "o", color=colour, markersize=13 if best else 6)
        right = x > middle  # the label goes to the side where there is room
        axes.annotate(
            record.name,
            (x, y),
            xytext=(-6 if right else 6, -2),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=7,
        )
    axes.set(xlabel=f"{name} (lower is better)", ylabel="contextual mutual information (higher is better)")
    x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
    for score in sorted({round(record.score, 3) for record in ranking})[:: max(1, len(ranking) // 6)]:
        axes.plot(x_limits, [x + score for x in x_limits], color="0.85", linewidth=0.8, zorder=0)
    axes.set(xlim=x_limits, ylim=y_limits)
    axes.set_title(f"score = CMI - {name}: equal along the grey lines, higher to the upper left", fontsize=9)
