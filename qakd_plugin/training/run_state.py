"""Where a run stands, and how that is written down and taken up again."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError
from .batches import Batches
from .checkpoint import CheckpointStore, not_finite
from .config import Resume
from .distributed.processes import Processes

_NUMBERS = (int, float, Tensor)
_log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A part of a run that checkpoints hold."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors and plain data."""

    def load_state_dict(self, state: Any) -> object:
        """Take up what :meth:`state_dict` gave."""


@dataclass
class Position:
    """Where a run stands: everything here is plain data.

    Attributes:
        epoch: that is trained now, from 0.
        step_in_epoch: batches of it that are done.
        step: optimizer steps of the run so far.
        samples: of this epoch so far.
        sums: over those samples, by name.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def count(self, samples: int, means: Mapping[str, float]) -> None:
        """Add the means over so many samples."""
        self.samples += samples
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * samples

    def mean(self, name: str) -> float | None:
        """Over this epoch so far; None where nothing of that name was counted."""
        return self.sums[name] / self.samples if name in self.sums else None

    def means(self) -> dict[str, float]:
        """All of them."""
        return {name: total / self.samples for name, total in self.sums.items()}

    def next_epoch(self) -> Position:
        """The start of the epoch after this."""
        return Position(epoch=self.epoch + 1, step=self.step)


@dataclass
class Best:
    """The best epoch so far, by the held-out split."""

    epoch: int = -1
    value: float = -math.inf
    state: dict[str, Any] | None = None


class RunState:
    """Position, best epoch and history of a run, and its checkpoints.

    Args:
        parts: what else checkpoints hold, by name: networks, optimizers, schedules ...
        batches: whose sources of randomness they hold.
        processes: that train together; the first writes and reads for all.
        store: where checkpoints go; None for nowhere.
    """

    def __init__(
        self, parts: Mapping[str, Stateful], batches: Batches, processes: Processes, store: CheckpointStore | None
    ) -> None:
        self._parts, self._batches, self._processes, self._store = parts, batches, processes, store
        self.position, self.best, self.history = Position(), Best(), list[dict[str, Any]]()

    @contextmanager
    def begun(self, *, resume: Resume) -> Iterator[None]:
        """Within the block the run has its folder for itself, and stands where it starts: at its newest checkpoint, or at 0.

        Raises:
            CheckpointError: another process trains there, or what is there is not this run's.
        """
        store, on_main = self._store, self._processes.on_main
        if store is None:
            yield
            return
        force = resume == "force"
        on_main(store.lock)
        try:
            if not resume:
                on_main(store.begin)
            elif (found := on_main(lambda: store.load(force=force))) is not None:
                self._restore(*found, force=force)
                # A run that was killed may have left a history of before this checkpoint, or of after it.
                on_main(lambda: store.save_history(self.history))
            yield
        finally:
            if self._processes.is_main:
                store.unlock()

    def save(self) -> None:
        """Write a checkpoint and the history, if there is a place for them.

        Raises:
            TrainingError: a weight, a statistic or an optimizer's state is not finite; names it. Nothing is written then.
        """
        randomness = {} if self._store is None else self._batches.state_dict()
        parts = {name: part.state_dict() for name, part in self._parts.items()}  # here, where all processes have their part

        def write() -> None:
            state = {**parts, "position": asdict(self.position), "best": vars(self.best), "history": self.history}
            if (name := not_finite(state)) is not None:
                raise TrainingError(
                    f"{name} is not finite after step {self.position.step} (epoch {self.position.epoch}). Lower lr, clip "
                    f"gradients harder (grad_clip), or look for extreme values in the batches.{self.way_back()}"
                )
            if self._store is not None:
                self._store.save(self.position.step, {**state, **randomness})
                self._store.save_history(self.history)

        self._processes.on_main(write)

    def save_history(self) -> None:
        """Write the history alone, if there is a place for it."""
        if (store := self._store) is not None:
            self._processes.on_main(lambda: store.save_history(self.history))

    def way_back(self) -> str:
        """A sentence on the last good checkpoint for who reads that the next step failed; empty without one.

        One that was written after the last step holds the weights that fail.
        """
        good, later = (None, None) if self._store is None else self._store.before(self.position.step)
        if good is None:
            return "" if later is None else f" {later} holds the weights that led here, and no checkpoint came before it."
        if later is None:
            return f" The last good checkpoint is {good}."
        return (
            f" The last good checkpoint is {good}: {later.name} holds the weights that led here, remove it to go on from the "
            "one before."
        )

    def _restore(self, path: Path, state: dict[str, Any], *, force: bool) -> None:
        for name, part in self._parts.items():
            with _fitting(path, name):
                if not isinstance(part, nn.Module):  # a network checks what it is given itself
                    _require_layout(state[name], part.state_dict(), name)
                part.load_state_dict(state[name])
        with _fitting(path, "position"):
            self.position, self.best = _position(state["position"]), _best(state["best"])
            self.history = _history(state["history"])
        try:
            with _fitting(path, "state of the sources of randomness"):
                self._batches.load_state_dict(state)
        except CheckpointError as problem:
            if not force:
                raise
            _log.warning('%s resume="force" goes on with other draws.', problem)


@contextmanager
def _fitting(path: Path, name: str) -> Iterator[None]:
    """Say which part of a checkpoint cannot be taken up, whatever its reader raises."""
    try:
        yield
    except Exception as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: its {name} does not fit this run ({type(problem).__name__}: {reason}). Did another version of the "
            "package write it? Finish the run with that version, or choose another checkpoint_dir."
        ) from problem


def _require_layout(found: Any, here: Any, name: str) -> None:
    """Raise TypeError where something is of another type than here. What is empty here may hold anything."""
    if isinstance(here, Mapping) and isinstance(found, Mapping):
        for key in here:
            _require_layout(found[key], here[key], f"{name}.{key}")
    elif isinstance(here, list | tuple) and isinstance(found, list | tuple):
        if len(found) < len(here):
            raise TypeError(f"{name} has {len(found)} entries and not {len(here)}")
        for index, pair in enumerate(zip(found, here, strict=False)):
            _require_layout(*pair, f"{name}.{index}")
    elif here is not None and not isinstance(found, _NUMBERS if isinstance(here, _NUMBERS) else type(here)):
        raise TypeError(f"{name} is a {type(found).__name__} and no {type(here).__name__}")


def _position(found: dict[str, Any]) -> Position:
    position = Position(**found)
    numbers = (position.epoch, position.step_in_epoch, position.step, position.samples)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are no numbers of epochs and steps")
    if not all(isinstance(total, float) for total in position.sums.values()):
        raise ValueError("sums are numbers")
    return position


def _best(found: dict[str, Any]) -> Best:
    best = Best(**found)
    if type(best.epoch) is not int or not isinstance(best.value, float | int):
        raise ValueError("the best epoch has a number and a value")
    if not (best.state is None or isinstance(best.state, dict)):
        raise ValueError("the best epoch has weights by name")
    return best


def _history(found: Any) -> list[dict[str, Any]]:
    if not (isinstance(found, list) and all(isinstance(row, dict) for row in found)):
        raise ValueError("a history has rows")
    return found
