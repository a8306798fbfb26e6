"""Configurations and fake-quantizers of torch.ao: symmetric weights per channel, activations with zero point 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.quantization import (
    FakeQuantize,
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
)

from ...errors import QakdError
from ...placement.layer_names import WEIGHTED
from ...placement.placement import Placement, has_own_forward
from ..adapter import Precision


def require_signed_bytes(toolkit: str, precision: Precision) -> None:
    """For all else ``prepare`` does by hand what no configuration of torch.ao can say."""
    if precision.activation_bits < 8 or precision.unsigned_bytes:
        asked = "a target other than TensorRT" if precision.unsigned_bytes else f"activation_bits={precision.activation_bits}"
        raise QakdError(
            f"{asked}: toolkit={toolkit!r} has no configuration for it, because residual adds keep 8 bits and unsigned grids "
            "have to follow the ReLUs. Use qakd_plugin.prepare, which puts those quantizers in itself."
        )


def torch_ao_qconfig(weight_bits: int) -> QConfig:
    """Symmetric int8 activations; symmetric weights per channel, whose scale follows the weight without delay."""
    limit = 2 ** (weight_bits - 1)
    return QConfig(
        activation=FakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        ),
        weight=FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            averaging_constant=1.0,
            quant_min=-127 if weight_bits == 8 else -limit,
            quant_max=limit - 1,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    )


def torch_ao_qconfig_mapping(model: nn.Module, placement: Placement, precision: Precision) -> QConfigMapping:
    """The configuration for ``prepare_qat_fx`` that :func:`qakd_plugin.prepare` uses, for TensorRT's backend configuration.

    All activations take symmetric int8; weights are symmetric per channel and follow the weight without delay.

    Args:
        model: the float model.
        placement: from :func:`qakd_plugin.placement.placement.place_quantizers`.
        precision: of the weights.
    """

    mapping = QConfigMapping().set_global(torch_ao_qconfig(8))
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        if name not in placement.layers or has_own_forward(module):
            mapping.set_module_name(name, None)
        else:
            mapping.set_module_name(name, torch_ao_qconfig(precision.bits_of_weight(name in placement.edges)))
    return mapping


def unsigned_byte(signed: Any) -> nn.Module:
    """A fake-quantizer of codes 0..255 in the place of ``signed``; for what cannot be negative: its zero point stays 0."""
    made: nn.Module = FakeQuantize(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    return made.to(signed.scale.device)


def fixed_fake_quantize(clip: float, low: int, high: int, device: torch.device) -> nn.Module:
    """A fake-quantizer per tensor whose range stays as it is."""
    fixed = FakeQuantize(
        observer=FixedQParamsObserver,
        quant_min=low,
        quant_max=high,
        scale=clip / high,
        zero_point=0,
        dtype=torch.quint8 if low == 0 else torch.qint8,
        qscheme=torch.per_tensor_affine,
    ).to(device)
    fixed.scale.fill_(clip / high)
    fixed.zero_point.fill_(0)
    return fixed
