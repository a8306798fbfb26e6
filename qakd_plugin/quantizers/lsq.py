"""LSQ: the step is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import LOG_SCALE, ClippedActivation, Rule, check_bits
from .fake_quantize import fake_quantize, lsq_gradient_scale


@dataclass(frozen=True)
class StepWeight(Rule):
    """Weights of LSQ: ``s round(clamp(w / s, Q_n, Q_p))`` with s learned.

    At 8 bits the grid is -127..127, so that BatchNorm folding may change the sign of a code.
    """

    @property
    def codes(self) -> tuple[int, int]:
        limit = 2 ** (self.bits - 1)
        return (-127 if self.bits == 8 else -limit), limit - 1

    def install(self, holder: nn.Module, clip: Tensor) -> None:
        holder.register_parameter(LOG_SCALE, nn.Parameter(torch.log(clip.detach().float() / self.codes[1])))

    def quantize(self, x: Tensor, holder: nn.Module) -> Tensor:
        low, high = self.codes
        log_scale: Tensor = getattr(holder, LOG_SCALE)
        gradient_scale = lsq_gradient_scale(x.numel() // log_scale.numel(), high)
        return fake_quantize(x, log_scale.exp(), low, high, gradient_scale=gradient_scale)


@dataclass(frozen=True)
class LSQ:
    """Learned step size quantization.

    Args:
        weight_bits: 2 to 8; None keeps the bits each weight has.
        activation_bits: 1 (after a ReLU) or 2 to 8; None keeps the bits each activation has.
        per_channel: one step per output channel of a weight.

    Source: Esser et al., ICLR 2020, arXiv 1902.08153. Steps are learned as logarithms, which keeps them positive, and start at
    the least squared error instead of ``2 mean|x| / sqrt(Q_p)``.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    per_channel: bool = True

    def __post_init__(self) -> None:
        check_bits(self, 2)

    def weight_rule(self, bits: int, axis: int | None, block: int | None) -> Rule:
        return StepWeight(bits, axis, block, "LSQ")

    def activation_rule(self, bits: int, unsigned: bool) -> Rule:
        return ClippedActivation(bits, method="LSQ", unsigned=unsigned)
