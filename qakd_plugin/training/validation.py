"""The held-out split of a run: what is counted on it, and what its labels say of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._common.rng_state import generators_of, undisturbed
from ..tasks.batches import batch_splitter
from ..tasks.evaluation import count
from ..tasks.inputs import arguments, call, to_device
from ..tasks.outputs import frozen_output
from .config import Data
from .distributed.processes import Processes
from .distributed.shards import held_out
from .methods import Phase

_log = logging.getLogger(__name__)


class Validation:
    """Counts a network on the held-out batches.

    Args:
        data: whose ``val_loader`` it is; without one nothing is counted.
        teacher: that the network is compared with, or None.
        phases: one that compares outputs says which.
        processes: that train together: each counts its share, and all get the sum.

    Attributes:
        classes: between which the network chooses, once it was counted; None where it does not, or before.
    """

    def __init__(self, data: Data, teacher: nn.Module | None, phases: Sequence[Phase], processes: Processes) -> None:
        self._data, self._teacher, self._processes = data, teacher, processes
        self._loader = None if data.val_loader is None else held_out(data.val_loader, processes, self._call)
        self._counted: nn.Module | None = None
        self._match = next((phase.imitation.match for phase in phases if phase.imitation is not None), None)
        self.classes: int | None = None

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Metrics of a network in eval mode with frozen ranges; empty without a split."""
        return self._count(network, first=False)

    def of_start(self, network: nn.Module) -> dict[str, float]:
        """Likewise, before the first step: nothing is drawn from the generators that training draws from."""
        with undisturbed([] if self._data.val_loader is None else generators_of(self._data.val_loader)):
            return self._count(network, first=True)

    def _count(self, network: nn.Module, *, first: bool) -> dict[str, float]:
        if self._loader is None:
            return {}
        data, self._counted = self._data, network
        counts = count(
            network,
            self._teacher,
            self._loader,
            data.batch_fn,
            self._processes.device,
            match=self._match,
            metric=data.metric,
            metric_fn=data.metric_fn,
        )
        self.classes = counts.classes
        if first:
            warn_of_one_class("val_loader", self._processes.gather(counts.labels), "an accuracy on them says nothing")
        return counts.result()

    @torch.no_grad()
    def _call(self, batch: Any) -> None:
        """Both networks on a batch that does not count."""
        assert self._counted is not None
        inputs = to_device(batch_splitter(self._data.batch_fn, self._counted)(batch)[0], self._processes.device)
        call(self._counted, inputs)
        if self._teacher is not None:
            args, kwargs = arguments(inputs)
            frozen_output(self._teacher, *args, **kwargs)


def warn_of_one_class(name: str, ranges: Sequence[tuple[int, int] | None], consequence: str) -> None:
    """Warn where all labels of a loader are one class: a sorted data set that was cut, or a column that is no label.

    Args:
        name: of the argument.
        ranges: smallest and largest label that each process saw; None where it saw none.
        consequence: for the message.
    """
    found = {label for pair in ranges if pair is not None for label in pair}
    if len(found) == 1:
        _log.warning(
            "%s: all labels are %d: %s. Is the data set sorted by class, or is that no label?", name, *found, consequence
        )
