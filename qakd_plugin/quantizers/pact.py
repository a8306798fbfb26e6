"""PACT: the clipping range of activations is learned; weights are DoReFa's."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import QakdError
from .base import ClippedActivation, Rule, check_bits
from .dorefa import TanhWeight


@dataclass(frozen=True)
class PACT:
    """Parameterized clipping activation: ``clamp(x, 0, alpha)`` with alpha learned.

    Args:
        weight_bits: 1 to 8, on DoReFa's weights; None keeps the bits each weight has.
        activation_bits: 1 (after a ReLU) or 2 to 8; None keeps the bits each activation has.
        per_channel: one scale per output channel of a weight.
        alpha_decay: coefficient of ``alpha^2 / 2`` in the loss: alpha's own decay. Every backward pass adds it: where a step
            sums the gradients of several (``accumulate``), divide it by their number.

    Source: Choi et al., 2018, arXiv 1805.06085. Activations that may be negative are clipped to [-alpha, alpha].
    """

    weight_bits: int | None = None
    activation_bits: int | None = None
    per_channel: bool = True
    alpha_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_bits(self, 1)
        if not self.alpha_decay >= 0:
            raise QakdError(f"PACT: alpha_decay={self.alpha_decay} must not be negative.")

    def weight_rule(self, bits: int, axis: int | None, block: int | None) -> Rule:
        return TanhWeight(bits, axis, block, "PACT")

    def activation_rule(self, bits: int, unsigned: bool) -> Rule:
        return ClippedActivation(
            bits, method="PACT", unsigned=unsigned, learns="clip", full_range=False, decay=self.alpha_decay
        )
