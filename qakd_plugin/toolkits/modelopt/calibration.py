"""Ranges of least squared error in the place of those of ModelOpt's max calibration, from the same forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...placement.calibration import RangeObserver, best_weight_clip, observe_inputs
from ...placement.placement import Placement
from ...tasks.inputs import Inputs
from ..adapter import Adapter, Precision, require_no_negative
from ..fake_quantizers import dead_activations
from .configuration import joined_quantizers, output_name
from .rule_backend import quantizer_class


def observe(
    model: nn.Module, batches: Iterable[Inputs], placement: Placement, precision: Precision
) -> dict[str, RangeObserver]:
    """Run batches through a model that ModelOpt calibrates, which quantizes nothing meanwhile: what its activations are.

    What is concatenated is observed as one: it gets one range. ModelOpt's own quantizers keep it in training; learned ones
    need not.
    """
    kind = quantizer_class()
    assert kind is not None
    watched: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and not module._disabled and name.endswith(("input_quantizer", "output_quantizer"))
    }
    clamps = {output_name(output, precision): output.clamp for output in placement.outputs}
    joined = joined_quantizers(placement, precision)
    groups = {name: group for name, group in joined.items() if name in watched and watched[name].num_bits == 8}
    return observe_inputs(model, watched, batches, clamps, groups)


@torch.no_grad()
def minimize_error(adapter: Adapter, model: nn.Module, observed: Mapping[str, RangeObserver]) -> None:
    """Replace the ranges of max calibration by those with the least squared error over all batches."""
    quantizers = adapter.quantizers(model)
    observers = {quantizer.fqn: observed[quantizer.fqn] for quantizer in quantizers if quantizer.role == "activation"}
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
