"""What a run says of itself: a line for each epoch, and at its end whether it ended below its start, or at chance level."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._common.history import START, Picking, Row, percentage

_MANY = 6
"""Held-out numbers in a line; of a metric with more, such as a detector's mean average precision, those that pick are shown."""


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


def line_of(row: Row, epochs: int, picking: Picking) -> str:
    """One row of the history, for a log.

    Args:
        row: of the history, which holds all numbers.
        epochs: of the whole run.
        picking: which numbers of a row pick the best epoch: with their teacher's, the only ones that are shown of many.
    """
    where = "start" if row["epoch"] == START else f"epoch {row['epoch'] + 1} of {epochs}, {row['phase']}"
    held_out = [name for name in row if name.startswith("val_")]
    if len(held_out) > _MANY:
        picked = picking(row)[0]
        held_out = [*picked, *(name.replace("val_", "val_teacher_", 1) for name in picked)]
    shown = [name for name in row if name in ("loss", "lr") or name in held_out]
    numbers = [f"{name.removeprefix('val_')} {percentage(name, row[name])}" for name in shown]
    rate = [f"{row['images_per_second']:,.0f} images/s"] if "images_per_second" in row else []
    return f"{where}: {', '.join(numbers + rate)}"


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
        f"{name} is {percentage(name, row[name])}, and chance among {classes} classes is {1 / classes:.2%}: the student has "
        "learned nothing. At 2 and 3 bits weights need many epochs and the learning rate that the float network was trained "
        "with, and depthwise layers need more bits: see docs/choosing.md."
    )


_NEAR = 1.2
"""Times the accuracy of chance."""
