"""torch.ao's layers that quantize their own weight, and BatchNorm folded into it as they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
from torch import Tensor, nn

from ...errors import UnsupportedQuantizerError

FUSED_BATCH_NORM = tuple(
    getattr(nniqat, name) for name in ("ConvBn1d", "ConvBn2d", "ConvBn3d", "ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d")
)
FUSED_RELU = tuple(
    getattr(nniqat, name)
    for name in ("ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")
)
QAT_LAYERS = (*FUSED_BATCH_NORM, *FUSED_RELU, nnqat.Conv1d, nnqat.Conv2d, nnqat.Conv3d, nnqat.Linear)


def folded(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with BatchNorm folded in, as the fused QAT module quantizes the weight."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    factor = _batch_norm_factor(module, name)
    if factor is None:
        return weight, bias
    norm = module.bn
    shift = norm.bias.detach() - norm.running_mean.detach() * factor
    if bias is not None:
        shift = shift + bias * factor
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), shift


def _batch_norm_factor(module: Any, name: str) -> Tensor | None:
    """gamma / sigma of a fused BatchNorm (C,), or None."""
    if not isinstance(module, FUSED_BATCH_NORM):
        return None
    norm = module.bn
    if norm.running_var is None:
        raise UnsupportedQuantizerError(
            f"{name}: its BatchNorm has no running statistics (track_running_stats=False), so it cannot be folded. Give it "
            "some, or prepare with toolkit='modelopt'."
        )
    factor: Tensor = norm.weight.detach() / torch.sqrt(norm.running_var.detach() + norm.eps)
    return factor


@torch.no_grad()
def bake_weight(layer: Any, name: str, quantizer: nn.Module) -> None:
    """Replace a weight by its quantized value, so that the toolkit's own quantizer finds it on the grid."""
    quantized = quantizer(folded(layer, name)[0])
    factor = _batch_norm_factor(layer, name)
    layer.weight.copy_(quantized if factor is None else quantized / factor.reshape(-1, *[1] * (quantized.ndim - 1)))


def folded_weight_of(layer: nn.Module, name: str) -> Callable[[], Tensor]:
    return lambda: folded(layer, name)[0]
