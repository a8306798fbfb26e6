"""The figure of the evidence: accuracy against bits, and SQAKD minus QAT, a column of panels per quantizer.

An SVG written from a template: it follows the reader's light or dark scheme, its text stays text, and the same figures give
the same bytes whatever is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import jinja2

from qakd_plugin.report.scatter import Axis, nice_step

WIDTH, HEIGHT = 880, 484
LEFT, RIGHT, GAP = 58, 16, 18
ROWS = ((66, 262), (300, 426))
"""Top and bottom of the panels with accuracies, and of those with differences."""

SHAPES = {"qat": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "sqakd": "M-3.8-3.8h7.6v7.6h-7.6Z", "difference": "M0-5L5 0L0 5L-5 0Z"}


@dataclass(frozen=True)
class Mark:
    """A point with its interval: positions, what a pointer shows, and whether it is drawn hollow."""

    x: float
    y: float
    low: float
    high: float
    text: str
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        name: above it.
        label: of the vertical axis.
        left, right, top, bottom: its place.
        first: whether it carries the labels of its row.
        ticks: (y, text).
        bits: (x, text).
        reference: height of the broken line.
        series: (class in the drawing, marks).
        joined: whether lines join the marks of a series.
    """

    name: str
    label: str
    left: float
    right: float
    top: float
    bottom: float
    first: bool
    ticks: tuple[tuple[float, str], ...]
    bits: tuple[tuple[float, str], ...]
    reference: float
    series: tuple[tuple[str, tuple[Mark, ...]], ...]
    joined: bool


def draw(document: dict[str, Any]) -> str:
    """The SVG of a document of evidence.py."""
    shown = [row for row in document["rows"] if row["method"] in ("QAT", "SQAKD") and row["labels"] == 1]
    quantizers = list(dict.fromkeys(row["quantizer"] for row in shown))
    accuracies = [end for row in shown for end in _ends(row["accuracy"], row["interval"])]
    differences = [end for row in shown if "over_qat" in row for end in _ends(row["over_qat"], row["over_qat_interval"])]
    heights = _height([*accuracies, 100 * document["teacher"]], *ROWS[0]), _height([*differences, 0.0], *ROWS[1])
    room = (WIDTH - LEFT - RIGHT - GAP * (len(quantizers) - 1)) / len(quantizers)
    panels = []
    for column, quantizer in enumerate(quantizers):
        rows = sorted((row for row in shown if row["quantizer"] == quantizer), key=lambda row: row["bits"])
        left = round(LEFT + column * (room + GAP), 1)
        panels += _column(quantizer, rows, left, round(left + room, 1), heights, document["teacher"])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["one"] = "{:.1f}".format
    template = environment.from_string(Path(__file__).with_suffix(".jinja").read_text())
    text = template.render(
        width=WIDTH,
        height=HEIGHT,
        title="Accuracy of quantized students after QAT and after SQAKD, against bits",
        description=describe(document["teacher"], shown),
        shapes=SHAPES,
        panels=panels,
        seeds=shown[0]["seeds"],
    )
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


def describe(teacher: float, rows: Sequence[dict[str, Any]]) -> str:
    """The figure in words, for those who do not see it."""
    found = [f"Full precision: {100 * teacher:.2f} %."]
    for row in rows:
        if row["method"] == "SQAKD":
            student = f"{row['quantizer']} W{row['bits']}A{row['bits']}"
            found.append(f"{student}: SQAKD {100 * row['accuracy']:.2f} %, {100 * row['over_qat']:+.2f} points over QAT.")
    return " ".join(found)


def _column(
    quantizer: str, rows: Sequence[dict[str, Any]], left: float, right: float, heights: tuple[Axis, Axis], teacher: float
) -> list[Panel]:
    bits = sorted({row["bits"] for row in rows})
    positions = {width: left + (at + 0.5) * (right - left) / len(bits) for at, width in enumerate(bits)}
    labels = tuple((x, str(width)) for width, x in positions.items())
    by_method = {method: [row for row in rows if row["method"] == method] for method in ("QAT", "SQAKD")}
    accuracy, difference = heights
    top = tuple(
        (
            method.lower(),
            tuple(
                _mark(positions[row["bits"]] + shift, accuracy, row["accuracy"], row["interval"], f"{_name(row)}, {method}")
                for row in by_method[method]
            ),
        )
        for method, shift in (("QAT", -3), ("SQAKD", 3))
    )
    below = tuple(
        _mark(
            positions[row["bits"]],
            difference,
            row["over_qat"],
            row["over_qat_interval"],
            f"{_name(row)}, SQAKD minus QAT",
            True,
        )
        for row in by_method["SQAKD"]
    )
    first = left == LEFT
    return [
        Panel(
            quantizer, "test accuracy, %", left, right, *ROWS[0], first,
            accuracy.ticks(6), labels, accuracy(100 * teacher), top, joined=True,
        ),
        Panel(
            quantizer, "SQAKD - QAT, points", left, right, *ROWS[1], first,
            difference.ticks(5), labels, difference(0.0), (("difference", below),), joined=False,
        ),
    ]  # fmt: skip


def _name(row: dict[str, Any]) -> str:
    return f"{row['quantizer']} W{row['bits']}A{row['bits']}"


def _ends(share: float, half_width: float | None) -> tuple[float, float]:
    return 100 * (share - (half_width or 0.0)), 100 * (share + (half_width or 0.0))


def _mark(
    x: float, y: Callable[[float], float], share: float, half_width: float | None, text: str, may_be_hollow: bool = False
) -> Mark:
    low, high = _ends(share, half_width)
    spread = "" if half_width is None else f" ± {100 * half_width:.2f}"
    return Mark(x, y(100 * share), y(low), y(high), f"{text}: {100 * share:.2f}{spread}", may_be_hollow and low <= 0 <= high)


def _height(values: Sequence[float], top: float, bottom: float) -> Axis:
    """An axis with round ends around percentages."""
    step = nice_step(max(max(values) - min(values), 0.4) / 5)
    return Axis(floor(min(values) / step) * step, ceil(max(values) / step) * step, bottom, top)
