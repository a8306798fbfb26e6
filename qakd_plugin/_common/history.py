"""The rows of a training's history: which is of the start, which was kept, and what was lost in between. Plain data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

START = -1
"""The epoch of the prepared model's row: before the first step."""

NEARER = 0.75
"""Share of the start's distance to the teacher, on training batches, below which an epoch's says something of other data.

Of ten networks at 8 bits those that ended above it, yet nearer than they began, were no nearer on images held out; that which
ended below it was (docs/choosing.md).
"""

LOSSES = {"eval_loss", "start_eval_loss"}
"""In the last row of a run that kept its start though nothing was held out: losses on training batches, as deployed."""

Row = Mapping[str, Any]
Picking = Callable[[Row], tuple[Sequence[str], int]]
"""Names of a row whose mean picks the best epoch, and 1 where larger is better, else -1."""

SHARES = ("val_accuracy", "val_teacher_accuracy", "val_agreement")
"""What the names of shares begin with."""


def start_of(history: Sequence[Row]) -> Row | None:
    """The row of the prepared model; None where nothing was held out."""
    return history[0] if history and history[0]["epoch"] == START else None


def kept_of(history: Sequence[Row]) -> Row:
    """The row of the weights that a run returns: the last that was the best so far, else the last, or a row of the start's loss
    where nothing was held out and the last epoch is not clearly nearer the teacher."""
    last = history[-1]
    if last.keys() >= LOSSES:
        return {"epoch": START, "phase": "start", "loss": last["start_eval_loss"]}
    return next((row for row in reversed(history) if row.get("best")), last)


def below_start(history: Sequence[Row], picking: Picking) -> str | None:
    """A sentence where the last epoch, or the one that was kept, is worse than the prepared model; None where neither is.

    Args:
        history: of the whole run.
        picking: which number of a row picks the best epoch, and in which direction.
    """
    start = start_of(history)
    if history and history[-1].keys() >= LOSSES:
        before, after = history[-1]["start_eval_loss"], history[-1]["eval_loss"]
        where = f"in eval mode, on the same training batches, the loss was {before:.4g} at the start and is {after:.4g} after"
        if after > before:
            return f"Training took the student away from its teacher: {where} the last epoch; the prepared model was kept."
        return (
            f"Training brought the student hardly nearer its teacher: {where} the last epoch, above {NEARER:.0%} of it, which "
            "says nothing of data that it was not trained on; the prepared model was kept. A val_loader decides better."
        )
    if start is None or len(history) == 1:
        return None
    kept, last = kept_of(history), history[-1]
    for row, when in ((kept, f"in epoch {kept['epoch'] + 1}, which was kept"), (last, "after the last epoch")):
        if lost := _lost(start, row, *picking(start)):
            winner = "the prepared model" if kept is start else f"epoch {kept['epoch'] + 1}"
            return f"Training lost {' and '.join(lost)} {when}{'' if row is kept else f'; {winner} was kept'}."
    return None


def _lost(start: Row, row: Row, picking: Sequence[str], sign: int) -> list[str]:
    beside = [
        name for name in start if name.startswith(("val_agreement", "val_sqnr_db")) and not _surpasses_its_teacher(row, name)
    ]
    return [
        _difference(name, start[name], row[name])
        for name in dict.fromkeys([*picking, *beside])
        if name in row and (sign if name in picking else 1) * (start[name] - row[name]) > 0
    ]


def _surpasses_its_teacher(row: Row, agreement: str) -> bool:
    """Whether the student is more often right than its teacher: labels then lead it away from a teacher that errs."""
    of = agreement.removeprefix("val_agreement")
    accuracy, teacher = row.get(f"val_accuracy{of}"), row.get(f"val_teacher_accuracy{of}")
    return accuracy is not None and teacher is not None and accuracy > teacher


def _difference(name: str, before: float, after: float) -> str:
    word, _, of = name.removeprefix("val_").partition("_")
    if name.startswith(SHARES):
        points = f"{100 * (before - after):.3g} points of {word}{f' of {of}' if of else ''}"
        return f"{points} ({percentage(name, before)} at the start, {percentage(name, after)})"
    return f"{name.removeprefix('val_')} ({before:.4g} at the start, {after:.4g})"


def percentage(name: str, value: float) -> str:
    """A number of a row in few digits; a share in percent."""
    return f"{value:.2%}" if name.startswith(SHARES) else f"{value:.4g}"
