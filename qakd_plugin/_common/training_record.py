"""How a model was trained, remembered on the model itself, so that a file made of it can say so. Plain data; needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen

from .notes import notes_of

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "qakd_training"
_MOST_EPOCHS = 60
"""A longer history is thinned: it travels in the metadata of files, and is drawn a few hundred pixels wide."""

_TIMING = "images_per_second"
"""Differs from run to run: with it the same training would give other files."""

Cell = bool | Annotated[int, Ge(-(2**53)), Le(2**53)] | Annotated[float, Ge(-1e300), Le(1e300)] | str | None


@dataclass(frozen=True)
class TrainingRecord:
    """One training of a model.

    Attributes:
        method: name of the method's class: "SQAKD", "QAT", ...
        loop: "distill", or "own": a loop of the user's or of another library, with this package's losses.
        kept: the epoch whose weights the model has, -1 where those it began with were the best; None where that is not known.
        history: rows of epochs: numbers and phases; of ``distill`` alone. Of many epochs some sixty rows are kept, the first
            one, the last one of each phase and the one whose weights were kept among them.
    """

    method: str
    loop: Literal["distill", "own"]
    kept: Annotated[int, Ge(-1), Le(2**31)] | None = None
    history: Annotated[tuple[dict[str, Cell], ...], MaxLen(1000)] = ()

    @classmethod
    def of_distill(cls, method: str, history: Sequence[Mapping[str, Any]], kept: int | None) -> TrainingRecord:
        """The record of a run of ``distill``."""
        every = max(1, math.ceil(len(history) / _MOST_EPOCHS))
        phases = [row.get("phase") for row in history]
        rows = [
            row
            for index, row in enumerate(history)
            if index % every == 0 or index == len(history) - 1 or phases[index] != phases[index + 1] or row.get("epoch") == kept
        ]
        return cls(method, "distill", kept, tuple(map(_compact, rows)))


def record_training(model: nn.Module, record: TrainingRecord) -> None:
    """Remember that a model was trained; copies of the model remember it, too."""
    set_training_records(model, [*training_records(model), record])


def set_training_records(model: nn.Module, records: Iterable[TrainingRecord]) -> None:
    """Remember these and no others: of a model whose weights were loaded."""
    notes_of(model)[_ATTRIBUTE] = tuple(records)


def training_records(model: nn.Module) -> tuple[TrainingRecord, ...]:
    """Every training that is remembered, in order. None is: calibrated only, or trained without this package's losses, or its
    weights were loaded from a file that does not say."""
    records: tuple[TrainingRecord, ...] = notes_of(model).get(_ATTRIBUTE, ())
    return records


def method_of(records: Sequence[TrainingRecord]) -> str:
    """By what a model was trained: "SQAKD", "QAT, then SQAKD"; "" without a record, or where the weights before were kept."""
    names = [record.method for record in records if record.kept != -1]
    return ", then ".join(name for index, name in enumerate(names) if not index or name != names[index - 1])


def as_json(records: Sequence[TrainingRecord]) -> str:
    """For the metadata of a file."""
    return json.dumps([asdict(record) for record in records], allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> tuple[TrainingRecord, ...]:
    """What :func:`as_json` wrote.

    Raises:
        ValueError: something else stands there.
    """
    from pydantic import TypeAdapter

    adapter = TypeAdapter(Annotated[tuple[TrainingRecord, ...], MaxLen(100)])
    records: tuple[TrainingRecord, ...] = adapter.validate_json(text, strict=True)
    return records


def _compact(row: Mapping[str, Any]) -> dict[str, Cell]:
    return {name: _cell(value) for name, value in row.items() if name != _TIMING and _is_cell(value)}


def _is_cell(value: object) -> bool:
    return isinstance(value, str | int | float)


def _cell(value: Any) -> Cell:
    if not isinstance(value, float):
        return value  # type: ignore[no-any-return]
    return float(f"{value:.6g}") if math.isfinite(value) else None
