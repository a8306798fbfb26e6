"""Tests over seeds: intervals of means, differences in pairs, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Comparison:
    """One test.

    Attributes:
        estimate: a difference of accuracies, or a correlation; positive speaks for the claim.
        p: two-sided; 1 where nothing can be tested.
        half_width: of the 95 % interval, where it is known.
        detectable: the true mean that such a test would have found with 80 % power, where it is known.
    """

    estimate: float
    p: float
    half_width: float | None = None
    detectable: float | None = None


def compare(differences: Sequence[float] | NDArray[np.float64]) -> Comparison:
    """Whether the mean of paired differences is zero: Student's t over seeds, or over whatever was repeated."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not values.any():
        return Comparison(float(values.mean()), 1.0)
    found = stats.ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(0.95)
    return Comparison(float(values.mean()), float(found.pvalue), float(high - low) / 2, detectable(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the chance of even one false one among all is bounded by each (Holm, 1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    factors = np.arange(len(p_values), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return [float(p) for p in adjusted]


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of the mean (Student's t); None of a single value."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def detectable(values: Sequence[float] | NDArray[np.float64], power: float = 0.8) -> float | None:
    """The mean difference that a two-sided test at 5 % finds with that power, with as many seeds and as much spread.

    Args:
        values: paired differences, whose standard deviation is taken for the true one.
        power: chance to find it.
    """
    if len(values) < 2:
        return None
    count, spread = len(values), float(np.std(values, ddof=1))
    critical = float(stats.t.ppf(0.975, count - 1))
    low, high = 0.0, 100.0  # in standard errors
    for _ in range(60):
        middle = (low + high) / 2
        found = float(stats.nct.sf(critical, count - 1, middle))
        low, high = (middle, high) if found < power else (low, middle)
    return high * spread / math.sqrt(count)


def percent(share: float, spread: float | None = None, sign: str = "") -> str:
    """Of a share, with the half width of its interval."""
    return f"{100 * share:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def p_text(value: float | None) -> str:
    """As tables show it."""
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
