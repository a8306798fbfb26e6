"""The figure of the evidence: accuracy against bits, and SQAKD minus QAT, a column of panels per quantizer.

An SVG by matplotlib whose text stays text. Its groups bear the names of what they show ("LSQ-QAT", "LSQ-QAT-interval"), so that
whoever reads the file finds every mark; the same figures give the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLORS = {"QAT": "#2268c4", "SQAKD": "#0b7f56", "difference": "#7a4fb5", "reference": "#6f7c89"}
MARKERS = {"QAT": "o", "SQAKD": "s", "difference": "D"}
SIDE_STEP = 0.08
"""QAT and SQAKD stand apart by twice this share of the room between two numbers of bits."""

_STYLE = {
    "svg.hashsalt": "evidence",
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": "#c3cbd3",
    "axes.labelcolor": "#4b5763",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e1e6eb",
    "xtick.color": "#4b5763",
    "ytick.color": "#4b5763",
    "legend.frameon": False,
}


def draw(document: dict[str, Any]) -> str:
    """The SVG of a document of evidence.py."""
    shown = [row for row in document["rows"] if row["method"] in ("QAT", "SQAKD") and row["labels"] == 1]
    quantizers = list(dict.fromkeys(row["quantizer"] for row in shown))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.8, 4.84))
        FigureCanvasSVG(figure)
        above, below = figure.subplots(
            2,
            len(quantizers),
            sharey="row",
            squeeze=False,
            gridspec_kw={"height_ratios": (3, 2), "left": 0.07, "right": 0.985, "top": 0.86, "bottom": 0.12, "wspace": 0.08},
        )
        for quantizer, accuracies, differences in zip(quantizers, above, below, strict=True):
            rows = sorted((row for row in shown if row["quantizer"] == quantizer), key=lambda row: row["bits"])
            _draw_accuracies(accuracies, quantizer, rows, document["teacher"])
            _draw_differences(differences, quantizer, rows)
        above[0].set_ylabel("test accuracy, %")
        below[0].set_ylabel("SQAKD - QAT, points")
        figure.supxlabel(
            f"bits of weights and activations; bars: 95 % interval of the mean over {shown[0]['seeds']} seeds",
            fontsize=8.5,
            color="#4b5763",
        )
        figure.legend(handles=_legend(), loc="upper left", ncols=5, bbox_to_anchor=(0.05, 1.0))
        written = io.StringIO()
        about = {"Title": "Accuracy of quantized students after QAT and after SQAKD, against bits"}
        about["Description"] = describe(document["teacher"], shown)
        figure.savefig(written, format="svg", metadata={**about, "Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def describe(teacher: float, rows: Sequence[dict[str, Any]]) -> str:
    """The figure in words, for those who do not see it."""
    found = [f"Full precision: {100 * teacher:.2f} %."]
    for row in rows:
        if row["method"] == "SQAKD":
            student = f"{row['quantizer']} W{row['bits']}A{row['bits']}"
            found.append(f"{student}: SQAKD {100 * row['accuracy']:.2f} %, {100 * row['over_qat']:+.2f} points over QAT.")
    return " ".join(found)


def _draw_accuracies(axes: Axes, quantizer: str, rows: Sequence[dict[str, Any]], teacher: float) -> None:
    axes.axhline(100 * teacher, color=COLORS["reference"], linestyle=(0, (5, 4)), linewidth=1.0, gid=f"{quantizer}-teacher")
    axes.set_title(quantizer, loc="left", fontsize=9.5, fontweight="bold", color="#1b2530")
    _number(axes, rows)
    for method, side in (("QAT", -SIDE_STEP), ("SQAKD", SIDE_STEP)):
        of_method = [row for row in rows if row["method"] == method]
        places = [place + side for place in range(len(of_method))]
        values = [100 * row["accuracy"] for row in of_method]
        axes.plot(places, values, color=COLORS[method], marker=MARKERS[method], markersize=4.2, gid=f"{quantizer}-{method}")
        _draw_intervals(axes, f"{quantizer}-{method}", places, values, [row["interval"] for row in of_method], COLORS[method])


def _draw_differences(axes: Axes, quantizer: str, rows: Sequence[dict[str, Any]]) -> None:
    axes.axhline(0.0, color=COLORS["reference"], linewidth=0.8, gid=f"{quantizer}-zero")
    _number(axes, rows)
    compared = [row for row in rows if row["method"] == "SQAKD"]
    places, values = range(len(compared)), [100 * row["over_qat"] for row in compared]
    intervals = [row["over_qat_interval"] for row in compared]
    _draw_intervals(axes, f"{quantizer}-difference", places, values, intervals, COLORS["difference"])
    for place, value, half_width, row in zip(places, values, intervals, compared, strict=True):
        contains_zero = half_width is not None and abs(value) <= 100 * half_width
        axes.plot([place], [value], **_mark(contains_zero), gid=f"{quantizer}-difference-W{row['bits']}A{row['bits']}")


def _draw_intervals(
    axes: Axes,
    name: str,
    places: Sequence[float],
    values: Sequence[float],
    half_widths: Sequence[float | None],
    color: str,
) -> None:
    known = [(x, y - 100 * h, y + 100 * h) for x, y, h in zip(places, values, half_widths, strict=True) if h is not None]
    if known:
        axes.vlines(*zip(*known, strict=True), color, gid=f"{name}-interval")


def _number(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    bits = sorted({row["bits"] for row in rows})
    axes.set_xticks(range(len(bits)), [str(width) for width in bits])
    axes.set_xlim(-0.5, len(bits) - 0.5)
    axes.tick_params(length=0)


def _mark(hollow: bool) -> dict[str, Any]:
    return {
        "color": COLORS["difference"],
        "marker": MARKERS["difference"],
        "markersize": 4.6,
        "markerfacecolor": "white" if hollow else COLORS["difference"],
        "linestyle": "none",
        "zorder": 3,
    }


def _legend() -> list[Line2D]:
    lines = [
        Line2D([], [], color=COLORS[method], marker=MARKERS[method], markersize=4.2, label=label)
        for method, label in (("QAT", "QAT, all labels"), ("SQAKD", "SQAKD, no labels"))
    ]
    lines.append(Line2D([], [], color=COLORS["reference"], linestyle=(0, (5, 4)), linewidth=1.0, label="full precision"))
    for hollow, label in ((False, "difference, paired by seed"), (True, "its interval contains 0")):
        lines.append(Line2D([], [], label=label, **_mark(hollow)))
    return lines
