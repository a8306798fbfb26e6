"""Where a run stands, and how that is written down and taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError
from .batches import Batches
from .checkpoint import CheckpointStore
from .distributed.processes import Processes


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
    def begun(self, *, resume: bool) -> Iterator[None]:
        """Within the block the run has its folder for itself, and stands where it starts: at its newest checkpoint, or at 0.

        Raises:
            CheckpointError: another process trains there, or what is there is not this run's.
        """
        store, on_main = self._store, self._processes.on_main
        if store is None:
            yield
            return
        on_main(store.lock)
        try:
            if not resume:
                on_main(store.begin)
            elif (state := on_main(store.load)) is not None:
                self._restore(state)
                # A run that was killed may have left a history of before this checkpoint, or of after it.
                on_main(lambda: store.save_history(self.history))
            yield
        finally:
            if self._processes.is_main:
                store.unlock()

    def save(self) -> None:
        """Write a checkpoint and the history."""
        if (store := self._store) is None:
            return
        randomness = self._batches.state_dict()

        def write() -> None:
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            own = {"position": asdict(self.position), "best": vars(self.best), "history": self.history}
            store.save(self.position.step, {**parts, **own, **randomness})
            store.save_history(self.history)

        self._processes.on_main(write)

    def newest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return None if self._store is None else self._store.newest()

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, ValueError, RuntimeError) as problem:
                reason = str(problem).splitlines()[0]
                raise CheckpointError(
                    f"{self.newest()}: its {name} does not fit this run ({reason}). Did another version of the package write "
                    "it? Finish the run with that version, or choose another checkpoint_dir."
                ) from problem
        self.position, self.best = Position(**state["position"]), Best(**state["best"])
        self.history = state["history"]
        self._batches.load_state_dict(state)
