"""EWGS: gradients are scaled element by element with the rounding error; intervals are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QakdError
from .base import DELTA, LOG_SCALE, PREFIX, ClippedActivation, Rule, check_bits
from .fake_quantize import discretize
from .symmetric_grid import SymmetricGrid

LOG_INTERVAL, OFFSET = PREFIX + "log_interval", PREFIX + "offset"


@dataclass(frozen=True)
class IntervalWeight(SymmetricGrid):
    """Weights of EWGS: the interval [l, u] is mapped to [-1, 1], rounded, and given its own output scale.

    Learned are the length of the interval (as a logarithm, in steps), its center (relative to half its length) and the output
    scale.

    Attributes:
        delta: until it is first refreshed.
        refresh_every: epochs between refreshes of delta; 0 never.
    """

    delta: float = 0.0
    refresh_every: int = 0

    def install(self, holder: nn.Module, clip: Tensor) -> None:
        step = torch.log(2 * clip.detach().float() / self.steps)
        holder.register_parameter(LOG_SCALE, nn.Parameter(step.clone()))
        holder.register_parameter(LOG_INTERVAL, nn.Parameter(step.clone()))
        holder.register_parameter(OFFSET, nn.Parameter(torch.zeros_like(step)))
        holder.register_buffer(DELTA, torch.tensor(self.delta, device=clip.device))

    def quantize(self, x: Tensor, holder: nn.Module) -> Tensor:
        state: Any = holder
        low, high, shift = self.levels
        v = x.float() * torch.exp(-getattr(state, LOG_INTERVAL)) - high * getattr(state, OFFSET)
        codes = discretize(v, low, high, shift=shift, delta=getattr(state, DELTA))
        scaled: Tensor = codes * getattr(state, LOG_SCALE).exp()
        return scaled.to(x.dtype)


@dataclass(frozen=True)
class EWGS:
    """Element-wise gradient scaling with learned intervals.

    ``delta`` is the mean curvature of the loss over three standard deviations of its gradient, both with respect to the
    discretized values of one quantizer; ``distill`` refreshes it with Hutchinson's estimator
    (:func:`qakd_plugin.quantizers.refresh_delta`).

    Args:
        weight_bits: 1 to 8; None keeps the bits each weight has.
        activation_bits: 1 (after a ReLU) or 2 to 8; None keeps the bits each activation has.
        per_channel: one interval and one output scale per output channel of a weight; the paper has one per layer.
        delta: until the first refresh; 0 is the straight-through estimator.
        refresh_every: epochs between refreshes, the first before training; 0 never refreshes.

    Source: Lee, Kim and Ham, CVPR 2021, arXiv 2104.00903. The interval of activations starts at 0, or is symmetric where they
    may be negative: targets take zero point 0 only.
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    per_channel: bool = True
    delta: float = 1e-3
    refresh_every: int = 10

    def __post_init__(self) -> None:
        check_bits(self, 1)
        if not self.delta >= 0:
            raise QakdError(f"EWGS: delta={self.delta} must not be negative.")
        if not self.refresh_every >= 0:
            raise QakdError(f"EWGS: refresh_every={self.refresh_every} must not be negative.")

    def weight_rule(self, bits: int, axis: int | None, block: int | None) -> Rule:
        return IntervalWeight(bits, axis, block, "EWGS", delta=self.delta, refresh_every=self.refresh_every)

    def activation_rule(self, bits: int, unsigned: bool) -> Rule:
        return ClippedActivation(
            bits, method="EWGS", unsigned=unsigned, full_range=False, delta=self.delta, refresh_every=self.refresh_every
        )
