"""DoReFa: weights through tanh, activations clipped to a fixed range; nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import PREFIX, ClippedActivation, Rule, check_bits
from .fake_quantize import fake_quantize
from .symmetric_grid import SymmetricGrid

SCALE, UNIT = PREFIX + "scale", PREFIX + "unit"


@dataclass(frozen=True)
class TanhWeight(SymmetricGrid):
    """Weights of DoReFa and PACT: ``m R(tanh(w) / m)`` with ``m = max|tanh(w)|``.

    The paper leaves out the factor m in front, which BatchNorm undoes; with it a pretrained network starts as it was. For the
    same reason weights beyond 1/4, as toolkits make them that fold BatchNorm before they quantize, are measured in a larger
    unit: tanh would flatten them.
    """

    def install(self, holder: nn.Module, clip: Tensor) -> None:
        clip = clip.detach().float()
        unit = (4 * clip).clamp(min=1)
        holder.register_buffer(UNIT, unit)
        holder.register_buffer(SCALE, 2 * unit * torch.tanh(clip / unit) / self.steps)

    def quantize(self, x: Tensor, holder: nn.Module) -> Tensor:
        kept: Tensor = getattr(holder, SCALE)
        unit: Tensor = getattr(holder, UNIT)
        squashed = unit * torch.tanh(x.float() / unit)
        dims = tuple(dim for dim in range(x.ndim) if kept.ndim == 0 or kept.shape[dim] == 1)
        largest = squashed.abs().amax(dims, keepdim=True).reshape(kept.shape)
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny * 2**24) * (2 / self.steps)
        with torch.no_grad():
            kept.copy_(scale)
        low, high, shift = self.levels
        return fake_quantize(squashed, scale, low, high, shift=shift).to(x.dtype)

    def scale(self, holder: nn.Module) -> Tensor:
        """Of the last forward pass: it follows the weight."""
        kept: Tensor = getattr(holder, SCALE)
        return kept.detach() / self.code_step


@dataclass(frozen=True)
class DoReFa:
    """DoReFa: nothing is learned beside the weights.

    Args:
        weight_bits: 1 to 8; None keeps the bits each weight has.
        activation_bits: 1 (after a ReLU) or 2 to 8; None keeps the bits each activation has.
        per_channel: the maximum of ``|tanh(w)|`` per output channel; the paper takes one per layer.

    Source: Zhou et al., 2016, arXiv 1606.06160. Activations are clipped to a calibrated range in place of [0, 1], which a
    pretrained network was not made for.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    per_channel: bool = True

    def __post_init__(self) -> None:
        check_bits(self, 1)

    def weight_rule(self, bits: int, axis: int | None, block: int | None) -> Rule:
        return TanhWeight(bits, axis, block, "DoReFa")

    def activation_rule(self, bits: int, unsigned: bool) -> Rule:
        return ClippedActivation(bits, method="DoReFa", unsigned=unsigned, learns="nothing", full_range=False)
