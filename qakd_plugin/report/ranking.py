"""A ranking of augmentations, drawn: on the page of a report, and as a file of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._common.files import with_extension, write_atomic
from .._common.score_parts import PARTS
from ..errors import QakdError
from .scatter import Axis
from .templates import static, template

_LARGEST = 1e100
"""Numbers beyond come from a training that diverged: arithmetic with them overflows."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 10.0, 36.0
_FILE_SIZE = (800.0, 520.0)


@dataclass(frozen=True)
class RankedPoint:
    """One augmentation.

    Attributes:
        x: of its point.
        y: likewise.
        name: of the augmentation.
        tone: class of its colour: "distilled" for the best and those tied with it, "float" for those that left the race early,
            "qat" for the others.
        is_best: whether it has the highest score.
        anchor: end of its label that lies at the point.
    """

    x: float
    y: float
    name: str
    tone: str
    is_best: bool
    anchor: str


@dataclass(frozen=True)
class RankingPlot:
    """CMI against what is subtracted from it: equal scores lie on parallel lines.

    Attributes:
        caption: which ranking.
        x_name: what is subtracted.
        points: one for each augmentation.
        x_ticks: (position, text).
        y_ticks: likewise.
        diagonals: (x1, y1, x2, y2) of lines of equal score.
        width: of the drawing.
        height: likewise.
    """

    caption: str
    x_name: str
    points: tuple[RankedPoint, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    diagonals: tuple[tuple[float, float, float, float], ...]
    width: float
    height: float


def number(value: object) -> float | None:
    """A finite number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return float(value) if abs(value) > 1 / _LARGEST else 0.0


def ranking_plot(
    records: Sequence[Mapping[str, Any]], caption: str, width: float = 410.0, height: float = 252.0
) -> RankingPlot | None:
    """Lay out records of a ranking; None where none has figures.

    Args:
        records: name, cmi, form, and what it subtracts; tied_with_best and dropped where they are known.
        caption: which ranking.
        width: of the drawing.
        height: likewise.
    """
    part, x_name = PARTS.get(str(records[0].get("form")) if records else "", PARTS["ce"])
    places = [(number(record.get(part)), number(record.get("cmi")), record) for record in records]
    found = [(a, b, record) for a, b, record in places if a is not None and b is not None]
    if not found:
        return None
    x = _axis([a for a, _, _ in found], _LEFT, width - _RIGHT)
    y = _axis([b for _, b, _ in found], height - _BOTTOM, _TOP)
    best = max(range(len(found)), key=lambda index: found[index][1] - found[index][0])
    points = tuple(
        RankedPoint(
            x(a),
            y(b),
            str(record.get("name")),
            _tone(record, index == best),
            index == best,
            "end" if x(a) > 0.63 * width else "start",
        )
        for index, (a, b, record) in enumerate(found)
    )
    scores = sorted(b - a for a, b, _ in found)
    steps = sorted({scores[0], scores[len(scores) // 2], scores[-1]})
    diagonals = tuple(line for score in steps if (line := _diagonal(x, y, score)) is not None)
    return RankingPlot(caption, x_name, points, x.ticks(4), y.ticks(4), diagonals, width, height)


def draw_ranking(records: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draw a ranking as an SVG file of its own.

    Args:
        records: as :func:`ranking_plot` takes them; those that ``qakd rank`` writes.
        path: of the file; its extension may be left out.

    Raises:
        QakdError: no record has figures, or the folder cannot be written.
    """
    plot = ranking_plot(records, "Ranking", *_FILE_SIZE)
    if plot is None:
        raise QakdError("records: none of them has figures that can be drawn. Pass those of rank_augmentations.")
    return write_atomic(with_extension(path, ".svg"), template("ranking.svg").render(s=plot, own_style=static("drawing.css")))


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    margin = (high - low) * 0.12 or abs(high) * 0.1 or 0.1
    return Axis(low - margin, high + margin, start, end)


def _tone(record: Mapping[str, Any], is_best: bool) -> str:
    if is_best or record.get("tied_with_best"):
        return "distilled"
    return "float" if record.get("dropped") else "qat"


def _diagonal(x: Axis, y: Axis, score: float) -> tuple[float, float, float, float] | None:
    """The line cmi - part = score within both axes."""
    left, right = max(x.low, y.low - score), min(x.high, y.high - score)
    return None if left >= right else (x(left), y(left + score), x(right), y(right + score))
