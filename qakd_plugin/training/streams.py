"""Training data without a length, or that can be walked only once: an epoch is the next so many batches."""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch

from .._common.rng_state import random_state, restore_random_state
from .._common.torch_file import load_plain
from ..errors import CheckpointError, TrainingError

_log = logging.getLogger(__name__)

_END = object()


def length_of(loader: Iterable[Any]) -> int | None:
    """Batches of a loader; None where it cannot tell, as a DataLoader over an IterableDataset."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def is_walked_once(loader: Iterable[Any]) -> bool:
    """Whether a loader is its own iterator: a batch that somebody looked at is gone."""
    return isinstance(loader, Iterator)


@dataclass(frozen=True)
class Place:
    """Where a stream stands: so many batches after one of these.

    Attributes:
        told: what the loader's ``state_dict()`` said; None where it has none, or had not begun.
        random: the sources of randomness when the walk began.
        batches: given out since.
    """

    told: Any
    random: dict[str, Any] | None
    batches: int


class Stream:
    """The batches of a loader, so many an epoch; the next epoch goes on where one ends, and at its end the loader is walked
    again.

    Args:
        loader: as the user passed it.
        batches: of an epoch.
        generators: of the loader, whose states belong to the place where a walk begins.
    """

    def __init__(self, loader: Iterable[Any], batches: int, generators: list[torch.Generator]) -> None:
        self._loader, self._batches, self._generators = loader, batches, generators
        self._source: Iterator[Any] | None = None
        self._next = self._place = Place(None, None, 0)
        self._ahead: deque[tuple[Any, Place]] = deque()

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch."""
        for _ in range(self._batches):
            batch, self._place = self._ahead.popleft() if self._ahead else self._draw()
            yield batch

    def ahead(self) -> Iterator[Any]:
        """The batches that come next, to look at: training gets them all the same."""
        if not self._ahead:
            self._ask()
        for index in range(self._batches):
            if index == len(self._ahead):
                self._ahead.append(self._draw())
            yield self._ahead[index][0]

    def state_dict(self) -> dict[str, Any]:
        """Where the next epoch, or the rest of this one, begins.

        Raises:
            CheckpointError: the loader tells it in more than tensors and plain data, which no checkpoint could be read with.
        """
        if not self._ahead:
            self._ask()
        _require_plain(self._place.told)
        return vars(self._place).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there: by the loader's own state, else by walking it again and dropping what was given out."""
        place, seen = Place(**state), [batch for batch, _ in self._ahead]
        self._ahead.clear()
        if place.told is not None:
            self._loader.load_state_dict(place.told)  # type: ignore[attr-defined]
        elif place.batches:
            _log.info(
                "loader cannot tell where it stands (it has no state_dict): %d batches are read again and dropped. "
                "What it draws from a source of its own is not the same again.",
                place.batches,
            )
        now = random_state(self._generators)
        if place.random is not None and place.told is None:
            restore_random_state(place.random, self._generators)
        # What was looked at before belongs to the walk, if there can be no other.
        self._begin(seen if is_walked_once(self._loader) else [])
        for _ in islice(self._walk(), place.batches):
            pass
        restore_random_state(now, self._generators)
        if place.random is not None:
            self._next = self._place = place

    def _ask(self) -> None:
        """Let the loader say where it stands, if it can."""
        if self._source is not None and callable(tell := getattr(self._loader, "state_dict", None)):
            self._next = self._place = replace(self._place, told=tell(), batches=0)

    def _begin(self, first: Iterable[Any] = ()) -> None:
        self._next = self._place = Place(None, random_state(self._generators), 0)
        self._source = chain(first, self._loader)

    def _draw(self) -> tuple[Any, Place]:
        batch = next(self._walk(), _END)
        if batch is _END:
            given, before = self._next, self._place
            self._begin()
            batch = next(self._walk(), _END)
            if batch is _END:
                raise TrainingError(_ended(self._loader, given, self._batches))
            self._place = before
        self._next = replace(self._next, batches=self._next.batches + 1)
        return batch, self._next

    def _walk(self) -> Iterator[Any]:
        if self._source is None:
            self._begin()
        assert self._source is not None
        return self._source


def _require_plain(told: Any) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(told, buffer)
        load_plain(buffer.getvalue(), intact=True)
    except Exception as problem:  # picklers raise many kinds on foreign objects; all mean the same here
        kinds = ", ".join(sorted({type(part).__name__ for part in _parts(told)}))
        raise CheckpointError(
            "loader: its state_dict() returns more than tensors, numbers, text, lists and dicts, so no checkpoint with it "
            f"could be read; it holds {kinds}. Return plain data, or leave state_dict out: then batches are read again."
        ) from problem


def _parts(told: Any) -> Iterator[Any]:
    if isinstance(told, dict | list | tuple):
        for part in told.values() if isinstance(told, dict) else told:
            yield from _parts(part)
    else:
        yield told


def _ended(loader: Iterable[Any], given: Place, batches: int) -> str:
    if not given.batches and given.told is None:
        return "loader is empty: it yielded no batch. Check the data set and drop_last."
    once = "an iterator is walked once" if is_walked_once(loader) else "it yields nothing when it is walked again"
    return (
        f"loader ({type(loader).__name__}) ended within an epoch of {batches} batches, and {once}. Pass one that can be walked "
        "again (with DALI: auto_reset=True), or an endless one."
    )
