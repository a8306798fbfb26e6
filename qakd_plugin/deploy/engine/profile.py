"""The sizes that an engine takes: smallest, tuned for and largest, of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ...errors import EngineError

Sizes: TypeAlias = Mapping[str, Sequence[int]]
"""Smallest, tuned for and largest size of dynamic dimensions other than the batch, by name."""


def profile_shapes(
    inputs: Mapping[str, Sequence[int | str | None]], batches: Sequence[int], sizes: Sizes | None
) -> dict[str, list[tuple[int, ...]]]:
    """The three shapes of each input.

    Args:
        inputs: sizes of each; None for the batch, names of other dynamic dimensions.
        batches: smallest, tuned for and largest.
        sizes: likewise of the other dynamic dimensions, by name.

    Raises:
        EngineError: a dimension has no sizes, or they are not in order, or there is none of that name; shows the line to write.
    """
    given = dict(sizes or {})
    dimensions = named_dimensions(inputs)
    for name, of in dimensions.items():
        if name not in given:
            line = ", ".join(f'"{other}": (smallest, usual, largest)' for other in dimensions)
            raise EngineError(f"{name!r} ({of}) is dynamic, and an engine needs its sizes. Pass sizes={{{line}}}.")
    for name, three in given.items():
        if name not in dimensions:
            known = ", ".join(map(repr, dimensions)) or "none beside the batch"
            raise EngineError(f"sizes: there is no dynamic dimension {name!r} in the file. There are: {known}.")
        if not _in_order(three):
            raise EngineError(f"sizes: {name!r} needs three whole numbers, 0 < smallest <= usual <= largest, got {three!r}.")
    return {
        name: [
            tuple(batch if size is None else given[size][index] if isinstance(size, str) else size for size in shape)
            for index, batch in enumerate(batches)
        ]
        for name, shape in inputs.items()
    }


def named_dimensions(inputs: Mapping[str, Sequence[int | str | None]]) -> dict[str, str]:
    """Names of dynamic dimensions other than the batch, and where each is first."""
    found: dict[str, str] = {}
    for name, shape in inputs.items():
        for dimension, size in enumerate(shape):
            if isinstance(size, str):
                found.setdefault(size, f"dimension {dimension} of {name!r}")
    return found


def _in_order(three: object) -> bool:
    return (
        isinstance(three, Sequence)
        and len(three) == 3
        and all(type(size) is int for size in three)
        and 0 < three[0] <= three[1] <= three[2]
    )
