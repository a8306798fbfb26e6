"""Intervals and tests of counted samples."""

from __future__ import annotations

import math

_Z = 1.959963984540054
"""Quantile of the normal distribution for 95 %."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927)."""
    from scipy.stats import binomtest  # takes longer to import than many a file to be measured

    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p_value(gained: int, lost: int) -> float:
    """McNemar's exact test of whether two files are equally accurate, of the samples that one alone has right (1947).

    Args:
        gained: samples that the first alone has right.
        lost: samples that the second alone has right.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of the difference of two accuracies on the same samples.

    The score interval of Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17 (1998): the differences that a score test does not refuse. It holds its
    level with few samples, and where the two never differ.

    Args:
        gained: samples that the first alone has right.
        lost: samples that the second alone has right.
        total: samples.
    """
    from scipy.optimize import brentq

    def score(difference: float) -> float:
        """Deviation from a supposed difference, in standard errors under it; falls from infinity at -1 to minus that at 1."""
        linear = (2 * total - gained + lost) * difference - gained - lost
        root = math.sqrt(max(linear**2 + 8 * total * lost * difference * (1 - difference), 0.0))
        second = (root - linear) / (4 * total)  # the share that the second alone has right, most likely under this difference
        variance = total * max(2 * second + difference * (1 - difference), 0.0)
        deviation = gained - lost - total * difference
        return deviation / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, deviation) if deviation else 0.0

    def end(sign: float, start: float, stop: float) -> float:
        def excess(difference: float) -> float:
            return max(min(score(difference), 1e9), -1e9) - sign * _Z

        return start if excess(start) * excess(stop) > 0 else float(brentq(excess, start, stop, xtol=1e-12))

    found = (gained - lost) / total
    return end(1, -1.0, found), end(-1, 1.0, found)
