"""The student as it would be deployed now: averaged weights, fresh statistics of BatchNorm, eval mode, frozen ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from .._common.module_mode import buffers_kept
from ..tasks.inputs import call
from ..toolkits import Adapter
from .batches import Batches
from .distributed.processes import Processes
from .distributed.sharding import gathered
from .ema import Ema


@contextmanager
def evaluated(adapter: Adapter, model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Within the block ranges are frozen, and the model is in eval mode, or in that of ``training``; afterwards both are as
    they were."""
    was_training, was_frozen = model.training, adapter.has_frozen_ranges(model)
    adapter.set_mode(model, training)
    adapter.freeze_ranges(model, True)
    try:
        yield
    finally:
        if not was_frozen:
            adapter.freeze_ranges(model, False)
        adapter.set_mode(model, was_training)


class DeployedView:
    """Shows the student as it would be deployed, and puts everything back for training to go on.

    Args:
        adapter: of the student's toolkit.
        model: the prepared model.
        batches: that refresh statistics.
        processes: that train together.
        ema: average of the weights, or None.
        recalibrate_batches: how many batches refresh statistics; 0 leaves them as training has them.
        autocast: makes the context of forward passes.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: nn.Module,
        batches: Batches,
        processes: Processes,
        *,
        ema: Ema | None,
        recalibrate_batches: int,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._adapter, self._model, self._batches, self._processes = adapter, model, batches, processes
        self._ema, self._recalibrate_batches, self._autocast = ema, recalibrate_batches, autocast

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the student is what would be deployed."""
        averaged = nullcontext() if self._ema is None else self._ema.applied()
        with averaged, self._recalibrated(), evaluated(self._adapter, self._model):
            yield

    def weights(self) -> dict[str, Any]:
        """A copy of the model's state, on the CPU, with the versions of its modules, which some of them look for."""
        return gathered(self._model)

    @contextmanager
    def _recalibrated(self) -> Iterator[None]:
        """Statistics of BatchNorm follow weights with a delay, and averaged or oscillating ones not at all.

        Some training batches pass in training mode, without gradients and with frozen ranges; works with every toolkit, whether
        it keeps modules or not. Statistics and sources of randomness are put back.
        """
        if not self._recalibrate_batches:
            yield
            return
        with buffers_kept(self._model), evaluated(self._adapter, self._model, training=True):
            with self._batches.aside() as batches, torch.no_grad(), self._autocast():
                for batch in islice(batches, self._recalibrate_batches):
                    call(self._model, batch.inputs)
            self._processes.agree()
            self._processes.average_buffers(self._model)
            yield
