"""Ranges of least squared error in the place of those of ModelOpt's max calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...placement.calibration import best_weight_clip
from ...placement.placement import Placement
from ...tasks.inputs import Inputs
from ..adapter import Adapter, Precision, require_no_negative
from ..fake_quantizers import dead_activations, observe_unquantized
from .configuration import joined_quantizers, output_name


@torch.no_grad()
def minimize_error(
    adapter: Adapter, model: nn.Module, batches: Sequence[Inputs], placement: Placement, precision: Precision
) -> None:
    """Replace the ranges of max calibration by those with the least squared error over all batches.

    What is concatenated gets one range. ModelOpt's own quantizers keep it in training; learned ones need not.
    """
    clamps = {output_name(output, precision): output.clamp for output in placement.outputs}
    quantizers = adapter.quantizers(model)
    watched: dict[str, Any] = {quantizer.fqn: quantizer.module for quantizer in quantizers if quantizer.role == "activation"}
    joined = joined_quantizers(placement, precision)
    groups = {name: group for name, group in joined.items() if name in watched and watched[name].num_bits == 8}
    observers = observe_unquantized(adapter, model, watched, batches, clamps, groups)
    dead = dead_activations(observers)
    for quantizer in quantizers:
        q: Any = quantizer.module
        if quantizer.fqn in dead:
            q.disable()
            continue
        if quantizer.fqn in observers:
            if q.unsigned:
                require_no_negative(quantizer.fqn, observers[quantizer.fqn].minimum)
            q.amax = torch.full_like(q.amax, observers[quantizer.fqn].best_clip(int(q.maxbound)))
            continue
        assert quantizer.weight is not None
        qparams = adapter.qparams(quantizer)
        q.amax = best_weight_clip(quantizer.weight(), qparams.quant_min, qparams.quant_max, qparams.axis).reshape(q.amax.shape)
