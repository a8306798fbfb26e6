"""Ranges that observers update in training, made those of all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...toolkits import Adapter
from .processes import Processes


@contextmanager
def joint_ranges(processes: Processes, adapter: Adapter, model: nn.Module) -> Iterator[None]:
    """Within the block, observers of activations see the smallest and largest value of all processes in training.

    A moving average of the joined batch's minimum is the smallest of the averages, so what each has observed can be reduced
    before the scale is computed from it.
    """
    observers = [] if processes.count == 1 else _observers(adapter, model)
    handles = [observer.register_forward_hook(partial(_join_range, processes)) for observer in observers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observers(adapter: Adapter, model: nn.Module) -> Sequence[nn.Module]:
    """Modules below quantizers of activations that keep a smallest and a largest value."""
    found = {}
    for quantizer in adapter.quantizers(model):
        for module in quantizer.module.modules():
            both = (getattr(module, name, None) for name in ("min_val", "max_val"))
            if quantizer.role == "activation" and all(isinstance(value, Tensor) and value.numel() for value in both):
                found[id(module)] = module
    return list(found.values())


def _join_range(processes: Processes, observer: Any, *_: object) -> None:
    if not torch.is_grad_enabled():  # one process alone looks for the layer that went wrong
        return
    processes.agree()
    both = torch.stack([-observer.min_val, observer.max_val])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    observer.min_val.copy_(-both[0])
    observer.max_val.copy_(both[1])
