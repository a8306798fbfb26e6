"""Ranges of a prepared model's activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...tasks.inputs import Inputs, device_of_network
from ..adapter import Adapter, require_no_negative, require_no_zero_gamma
from ..fake_quantizers import observe_unquantized, set_range, substitute
from .configuration import fixed_fake_quantize
from .qat_layers import FUSED_BATCH_NORM


@torch.no_grad()
def calibrate(adapter: Adapter, prepared: nn.Module, batches: Iterable[Inputs], low_bit: Mapping[str, tuple[int, int]]) -> None:
    """Ranges of least squared error over all batches. Eight-bit ranges go on following the data in training, lower ones do
    not.

    Args:
        adapter: of the toolkit.
        prepared: in eval mode; its quantizers are given their ranges.
        batches: inputs of the model.
        low_bit: names of modules that quantizers of fewer bits replace, and the lowest and highest code of each.
    """
    for name, module in prepared.named_modules():
        if isinstance(module, FUSED_BATCH_NORM):
            gamma: Any = module.bn.weight
            require_no_zero_gamma(name, gamma, "the fused layer")
    activations = [q for q in adapter.quantizers(prepared) if q.role == "activation" and q.fqn not in low_bit]
    watched = {q.fqn: q.module for q in activations} | {name: prepared.get_submodule(name) for name in low_bit}
    clamps = {name: (0.0, float("inf")) for name, (low, _) in low_bit.items() if low == 0}
    observers = observe_unquantized(adapter, prepared, watched, batches, clamps)
    for quantizer in activations:
        observed, q = observers[quantizer.fqn], quantizer.module
        limits: Any = q.activation_post_process
        if limits.quant_min == 0:
            require_no_negative(quantizer.fqn, observed.minimum)
        set_range(q, torch.tensor(observed.best_clip(int(limits.quant_max))))
    for name, (low, high) in low_bit.items():
        fixed = fixed_fake_quantize(observers[name].best_clip(high), low, high, device_of_network(prepared))
        substitute(prepared, prepared.get_submodule(name), fixed)
