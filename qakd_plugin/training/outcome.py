"""What a run says of itself: a line for each epoch, and at its end whether it ended below its start, or at chance level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

START = -1
"""The epoch of the prepared model's row: before the first step."""

Row = Mapping[str, Any]
Picking = Callable[[Row], tuple[Sequence[str], int]]
"""Names of a row whose mean picks the best epoch, and 1 where larger is better, else -1."""


class Start:
    """The prepared model's weights, until an epoch is as good: training must not fall below its start.

    Attributes:
        weights: on the CPU; None where they are not needed.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.weights = state["weights"]


def start_of(history: Sequence[Row]) -> Row | None:
    """The row of the prepared model; None where nothing was held out."""
    return history[0] if history and history[0]["epoch"] == START else None


def kept_of(history: Sequence[Row]) -> Row:
    """The row of the weights that a run returns: the last that was the best so far, else the last."""
    return next((row for row in reversed(history) if row.get("best")), history[-1])


def line_of(row: Row, epochs: int) -> str:
    """One row of the history, for a log."""
    where = "start" if row["epoch"] == START else f"epoch {row['epoch'] + 1} of {epochs}, {row['phase']}"
    shown = {name: value for name, value in row.items() if name == "loss" or name == "lr" or name.startswith("val_")}
    numbers = [f"{name.removeprefix('val_')} {_short(name, value)}" for name, value in shown.items()]
    rate = [f"{row['images_per_second']:,.0f} images/s"] if "images_per_second" in row else []
    return f"{where}: {', '.join(numbers + rate)}"


def below_start(history: Sequence[Row], picking: Picking) -> str | None:
    """A sentence where the last epoch, or the one that was kept, is worse than the prepared model; None where neither is.

    Args:
        history: of the whole run.
        picking: which number of a row picks the best epoch, and in which direction.
    """
    start = start_of(history)
    if start is None or len(history) == 1:
        return None
    kept, last = kept_of(history), history[-1]
    for row, when in ((kept, f"in epoch {kept['epoch'] + 1}, which was kept"), (last, "after the last epoch")):
        if lost := _lost(start, row, *picking(start)):
            winner = "the prepared model" if kept is start else f"epoch {kept['epoch'] + 1}"
            return f"Training lost {' and '.join(lost)} {when}{'' if row is kept else f'; {winner} was kept'}."
    return None


def _lost(start: Row, row: Row, picking: Sequence[str], sign: int) -> list[str]:
    beside = [name for name in start if name.startswith(("val_agreement", "val_sqnr_db"))]
    return [
        _difference(name, start[name], row[name])
        for name in dict.fromkeys([*picking, *beside])
        if name in row and (sign if name in picking else 1) * (start[name] - row[name]) > 0
    ]


def _difference(name: str, before: float, after: float) -> str:
    word, _, of = name.removeprefix("val_").partition("_")
    if name.startswith(_SHARES):
        points = f"{100 * (before - after):.2g} points of {word}{f' of {of}' if of else ''}"
        return f"{points} ({_short(name, before)} at the start, {_short(name, after)})"
    return f"{name.removeprefix('val_')} ({before:.4g} at the start, {after:.4g})"


def at_chance(row: Row, classes: int | None) -> str | None:
    """A sentence where the weights that are kept do hardly better than chance although the teacher does; None otherwise.

    Args:
        row: of these weights.
        classes: between which the network chooses, or None.
    """
    name = next((name for name in ("val_accuracy", "val_agreement") if name in row), None)
    if classes is None or name is None:
        return None
    near = _NEAR * (1 / classes)
    if row[name] > near or row.get("val_teacher_accuracy", 1.0) <= near:
        return None
    return (
        f"{name} is {_short(name, row[name])}, and chance among {classes} classes is {1 / classes:.2%}: the student has "
        "learned nothing. At 2 and 3 bits weights need many epochs and the learning rate that the float network was trained "
        "with, and depthwise layers need more bits: see docs/choosing.md."
    )


def _short(name: str, value: float) -> str:
    return f"{value:.2%}" if name.startswith(_SHARES) else f"{value:.4g}"


_SHARES = ("val_accuracy", "val_teacher_accuracy", "val_agreement")
_NEAR = 1.2
"""Times the accuracy of chance."""
