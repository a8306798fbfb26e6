"""A grid of 2^b levels without a zero, which the weights of DoReFa, PACT and EWGS share."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Rule


@dataclass(frozen=True)
class SymmetricGrid(Rule):
    """Weights on ``2^b`` levels spread evenly over [-1, 1], without a zero: odd multiples of half a step.

    At 8 bits odd codes would not fit into a signed byte with zero point 0: there the grid is the integers -127..127.
    """

    transforms_weight = True

    @property
    def steps(self) -> int:
        """Between the lowest and the highest level."""
        return 254 if self.bits == 8 else 2**self.bits - 1

    @property
    def code_step(self) -> int:
        return 1 if self.bits == 8 else 2

    @property
    def codes(self) -> tuple[int, int]:
        limit = self.steps * self.code_step // 2
        return -limit, limit
