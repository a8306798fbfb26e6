"""How far a figure can be trusted, by leaving out one block of images at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Jackknife:
    """How far a figure can be trusted, by leaving out one block of images at a time.

    Attributes:
        corrected: the figure without its bias of first order: centroids of few images lie too close to them, so CMI is too
            small.
        error: standard error; infinite with fewer than two blocks.
        freedom: blocks - 1.
    """

    corrected: float
    error: float
    freedom: int

    @classmethod
    def of(cls, whole: float, parts: Sequence[float]) -> Jackknife:
        """Of the figure of all images, and of all but each block."""
        count = len(parts)
        if count < 2:
            return cls(whole, math.inf, 0)
        mean = math.fsum(parts) / count
        variance = (count - 1) / count * math.fsum((part - mean) ** 2 for part in parts)
        return cls(count * whole - (count - 1) * mean, math.sqrt(variance), count - 1)

    def half_width(self, confidence: float) -> float:
        """Of the two-sided interval, by Student's t."""
        return self.upper_quantile((1 - confidence) / 2) * self.error if self.freedom else math.inf

    def upper_quantile(self, tail: float) -> float:
        """Standard errors beyond which lies a probability of ``tail`` on one side."""
        return float(student_t.isf(tail, self.freedom))
