"""Labels of classes, as integers."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArgumentError


def label_range(labels: Tensor, classes: int, name: str = "labels") -> tuple[int, int] | None:
    """The smallest and the largest of the labels; None where there are none.

    Args:
        labels: integers of any shape, those that count.
        classes: how many the network knows.
        name: of the argument, for the message.

    Raises:
        ArgumentError: one lies outside 0..classes-1.
    """
    if not labels.numel():
        return None
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        counted = " Labels that count from 1 need batch_fn=lambda batch: (batch[0], batch[1] - 1)." if low == 1 else ""
        raise ArgumentError(
            f"{name} must lie between 0 and {classes - 1}, the classes that the network knows, got "
            f"{low if low < 0 else high}.{counted}"
        )
    return low, high
