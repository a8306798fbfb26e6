"""Ranges of a prepared graph's activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...tasks.inputs import Inputs
from ..adapter import Adapter, require_no_negative
from ..fake_quantizers import dead_activations, observe_unquantized, set_range


@torch.no_grad()
def calibrate(adapter: Adapter, prepared: nn.Module, batches: Iterable[Inputs]) -> None:
    """Ranges of least squared error over all batches. Eight-bit ranges go on following the data in training, lower ones do
    not."""
    activations = [q for q in adapter.quantizers(prepared) if q.role == "activation"]
    observers = observe_unquantized(adapter, prepared, {q.fqn: q.module for q in activations}, batches, {})
    dead = dead_activations(observers)
    for quantizer in activations:
        q: Any = quantizer.module
        if quantizer.fqn in dead:
            q.enable_fake_quant(False)
            q.enable_observer(False)
            continue
        low, high = int(q.activation_post_process.quant_min), int(q.activation_post_process.quant_max)
        if low == 0:
            require_no_negative(quantizer.fqn, observers[quantizer.fqn].minimum)
        clip = torch.tensor(observers[quantizer.fqn].best_clip(high))
        set_range(q, clip)
        if high - low < 255:
            q.scale.fill_(clip / high)
            q.zero_point.fill_(0)
            q.enable_observer(False)
