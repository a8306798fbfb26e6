"""The training batches of a run: the one place that splits a batch, augments it, and knows where an epoch was interrupted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .._common.labels import label_range
from .._common.rng_state import generators_of, random_state, restore_random_state, samplers_of, undisturbed
from ..augment.selector import Augmentation
from ..errors import QakdError, TrainingError
from ..tasks.batches import BatchFn
from ..tasks.evaluation import IGNORED
from ..tasks.inputs import sample_count, to_device
from ..tasks.outputs import Outputs
from .distributed.processes import Processes
from .distributed.shards import Whole, shared
from .methods import Method, require_labels
from .streams import Stream, is_walked_once, length_of
from .teacher_cache import TeacherCache


@dataclass(frozen=True)
class Batch:
    """One batch of this process, on its device and augmented.

    Attributes:
        inputs: as both networks get them: a tensor, a tuple of positional arguments, or a mapping of keywords.
        targets: labels, in a phase that reads them, or masks.
        weight: samples in it that count; 0 where they are borrowed from another process.
        total: samples that count in this batch of all processes together.
        taught: what the teacher outputs, by path, where a cache knows it.
    """

    inputs: Any
    targets: Any
    weight: int
    total: int = 0
    taught: Outputs | None = None


class Batches:
    """The batches of every epoch, in groups of one optimizer step, and the state of all that they are drawn from.

    Args:
        loader: as the user passed it.
        processes: that train together: each takes its share.
        steps_per_epoch: optimizer steps in an epoch, each epoch going on where the one before ended; None: the whole loader.
        batch_fn: splits a batch.
        augment: of inputs and labels.
        method: for messages.
        accumulate: batches in a group.
        cache: of what the teacher outputs, or None.
        masks: whether targets may hold masks, which are read where labels are not.

    Attributes:
        classes: between which labels lie, where cross-entropy reads them; None where that is not known, and nothing is checked.
        label_range: the smallest and the largest label so far.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        processes: Processes,
        *,
        batch_fn: BatchFn,
        augment: Augmentation,
        method: Method,
        accumulate: int = 1,
        steps_per_epoch: int | None = None,
        cache: TeacherCache | None = None,
        masks: bool = False,
    ) -> None:
        self._samplers, self.generators = samplers_of(loader), generators_of(loader)
        self._stream = _stream(loader, steps_per_epoch, accumulate, self.generators, processes)
        self._shares = shared(loader, processes) if self._stream is None else Whole(self._stream)
        self._processes = processes
        self._batch_fn, self._augment, self._method = batch_fn, augment, method
        self._accumulate, self._cache, self._masks = accumulate, cache, masks
        self._epoch_start: dict[str, Any] = {}
        self.classes: int | None = None
        self.label_range: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return len(self._shares)

    @property
    def repeat(self) -> bool:
        """Whether batches can be read again; those of a stream cannot, and it may have ended."""
        return self._stream is None

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(len(self) / self._accumulate)

    def epoch(self, number: int, done: int, *, labels: bool) -> Iterator[list[Batch]]:
        """The groups of one epoch; an interrupted epoch draws and drops the batches that it has seen already.

        Args:
            number: of the epoch, from 0.
            done: batches of it that were trained with before the run was interrupted.
            labels: whether they are read.

        Raises:
            TrainingError: the epoch holds no batch.
            QakdError: a batch cannot be split or augmented.
        """
        batches = self._begin(number, done)
        if self._cache is not None:
            self._cache.start_epoch()
        left = len(self) - done
        # Never asks for more than there are before the last group is done with: a sampler that is asked once more draws again,
        # and a checkpoint in between would hold what it drew.
        while group := self._group(batches, min(self._accumulate, max(left, 1)), left, labels):
            left, done = left - len(group), done + len(group)
            yield group
        if done == 0:
            raise TrainingError("loader is empty: it yielded no batch. Check the data set and drop_last.")

    @contextmanager
    def aside(self, *, labels: bool = False, augmented: bool = True) -> Iterator[Iterator[Batch]]:
        """Batches of a pass beside training: whatever is drawn within the block is undone at its end.

        What a stream draws cannot be undone, so training gets these batches, too.
        """
        if self._stream is not None:
            yield (self._ready(batch, True, labels, augmented) for batch in self._stream.ahead())
            return
        with undisturbed(self.generators):
            yield (self._ready(batch, counts, labels, augmented) for batch, counts in self._shares)

    @property
    def has_cache(self) -> bool:
        """Whether what the teacher outputs is known of batches that are augmented."""
        return self._cache is not None

    def looked_up(self, batch: Batch) -> Batch:
        """An augmented batch with what the cache knows of it."""
        return batch if self._cache is None else replace(batch, taught=self._cache.find(batch.inputs))

    def state_dict(self) -> dict[str, Any]:
        """Sources of randomness of every process, at the start of this epoch and now: with the first, a resumed epoch shuffles
        alike."""
        gather = self._processes.gather
        state = {"epoch_start": gather(self._epoch_start), "now": gather(random_state(self.generators))}
        return state if self._stream is None else state | {"stream": gather(self._stream.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written. Processes that were not there then go on with draws of their own."""
        index = self._processes.index
        if index < len(state["now"]):
            self._epoch_start = state["epoch_start"][index]
            restore_random_state(state["now"][index], self.generators)
        else:
            self._epoch_start = random_state(self.generators)
        if self._stream is None:
            return
        # One process was all that there could be before, and its place stood alone.
        places = [state["stream"]] if isinstance(state["stream"], Mapping) else state["stream"]
        if index < len(places):
            self._stream.load_state_dict(places[index])

    def _begin(self, number: int, done: int) -> Iterator[tuple[Any, bool]]:
        if self._stream is not None:
            return islice(self._shares, len(self) - done)
        now = random_state(self.generators)
        if done:
            restore_random_state(self._epoch_start, self.generators)
        else:
            self._epoch_start = now
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        batches = iter(self._shares)
        for _ in islice(batches, done):
            pass
        if done:
            restore_random_state(now, self.generators)
        return batches

    def _group(self, batches: Iterator[tuple[Any, bool]], size: int, left: int, labels: bool) -> list[Batch]:
        drawn = list(islice(batches, size))
        if len(drawn) < min(size, left) and self._processes.count > 1:
            raise QakdError(
                f"loader: it ended {left - len(drawn)} batches before its length ({len(self)}) said. Correct its __len__."
            )
        group = [self._ready(batch, counts, labels) for batch, counts in drawn]
        group = [self.looked_up(batch) for batch in group]
        weights = [float(batch.weight) for batch in group]
        totals = self._processes.sums(weights + [0.0] * (self._accumulate - len(group)))
        return [replace(batch, total=int(total)) for batch, total in zip(group, totals, strict=False)]

    def _ready(self, batch: Any, counts: bool, labels: bool, augmented: bool = True) -> Batch:
        inputs, targets = self._batch_fn(batch)
        device = self._processes.device
        if labels:
            require_labels(self._method, targets)
            self._check_range(targets)
        inputs = to_device(inputs, device)
        targets = to_device(targets, device) if labels or self._masks else None
        if augmented:
            inputs, targets = self._augment(inputs, targets)
        return Batch(inputs, targets, sample_count(inputs) if counts else 0)

    def _check_range(self, targets: Any) -> None:
        """Here, where labels are on the host still: a device would stop with an assertion that names none."""
        if self.classes is None or not isinstance(targets, Tensor) or targets.device.type != "cpu":
            return
        if targets.is_floating_point() or targets.dtype == torch.bool:  # probabilities, or what the loss will refuse
            return
        found = label_range(targets[targets != IGNORED], self.classes, "loader: labels")
        if found is not None:
            low, high = self.label_range or found
            self.label_range = min(low, found[0]), max(high, found[1])


def _stream(
    loader: Iterable[Any],
    steps_per_epoch: int | None,
    accumulate: int,
    generators: list[torch.Generator],
    processes: Processes,
) -> Stream | None:
    if steps_per_epoch is not None:
        return Stream(loader, steps_per_epoch * accumulate, generators)
    length = length_of(loader)
    # Several processes walk it alike, and none of them puts a batch back.
    if length is not None and is_walked_once(loader) and processes.count == 1:
        return Stream(loader, length, generators)
    return None
