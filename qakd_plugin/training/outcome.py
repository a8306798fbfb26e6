"""What a run says of itself: a line for each epoch, and at its end whether it ended below its start, or at chance level."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._common.history import START, Row, percentage


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


def line_of(row: Row, epochs: int) -> str:
    """One row of the history, for a log."""
    where = "start" if row["epoch"] == START else f"epoch {row['epoch'] + 1} of {epochs}, {row['phase']}"
    shown = {name: value for name, value in row.items() if name == "loss" or name == "lr" or name.startswith("val_")}
    numbers = [f"{name.removeprefix('val_')} {percentage(name, value)}" for name, value in shown.items()]
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
