"""Calibration batches, held one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..errors import QakdError
from ..tasks.batches import BatchFn
from ..tasks.inputs import Inputs, named_tensors, to_device


class CalibrationBatches:
    """What calibration batches put into a network, each on its device when its turn comes.

    However many there are, two are held: the first, which a network is traced with, and the one that runs. They come once.

    A loader that draws its random numbers batch by batch gives what it would give by itself: toolkits draw some in between, but
    not from its course of torch's generator.

    Args:
        batches: as the loader yields them; walked through once.
        split: a batch into inputs and targets.
        device: of the network.

    Attributes:
        first: the inputs of the first batch.
        index: of the batch that came last.
        last: its inputs.
        error: what the loader raised, or what is wrong with a batch; None so far.

    Raises:
        QakdError: there is no batch, or one holds what is no finite number.
    """

    def __init__(self, batches: Iterable[object], split: BatchFn, device: torch.device) -> None:
        self.error: Exception | None = None
        self._coming = self._inputs(batches, split, device)
        first = next(self._coming, None)
        if first is None:
            raise QakdError("calibration_batches is empty: ranges need at least one batch, and are better with several.")
        self.first: Inputs = first
        self.index, self.last = 0, first
        self._begun = False
        self._before = self._random = torch.get_rng_state()

    def __iter__(self) -> Iterator[Inputs]:
        return self

    def __next__(self) -> Inputs:
        if not self._begun:
            self._begun = True
            return self.first
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            self.last = next(self._coming)
        except StopIteration:
            if torch.equal(torch.get_rng_state(), self._before):  # the loader drew nothing: what others drew counts
                torch.set_rng_state(outside)
            raise
        self._random = torch.get_rng_state()
        torch.set_rng_state(outside)
        self.index += 1
        return self.last

    def _inputs(self, batches: Iterable[object], split: BatchFn, device: torch.device) -> Iterator[Inputs]:
        try:
            for index, batch in enumerate(batches):
                inputs, _ = split(batch)
                _require_numbers(inputs, index)
                yield to_device(inputs, device)
        except Exception as error:
            self.error = error
            raise


def _require_numbers(inputs: Inputs, index: int) -> None:
    for tensor in named_tensors(inputs).values():
        if tensor.is_meta:
            raise QakdError(f"calibration_batches: batch {index} lies on the meta device, without numbers. Pass real batches.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise QakdError(f"calibration_batches: batch {index} holds NaN or infinite values. Clean the data.")
