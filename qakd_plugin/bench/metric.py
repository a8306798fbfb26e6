"""A torchmetrics metric of the user's, counted through a runtime. Brings torch: imported only where there is a metric."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from ..errors import QakdError
from ..runtimes.base import Array
from ..tasks.metrics import AnyMetric, Counted, MetricFn, direction, outputs_and_targets
from .rows import MetricValue
from .samples import Samples

_log = logging.getLogger(__name__)

BOOTSTRAPS = 100
"""Resampled copies of the metric, each of which is updated with every batch, and computed once."""


class MetricCount:
    """Fits :class:`.accuracy.Count`.

    Args:
        name: of the file, for messages.
        metric: of torchmetrics; it is copied.
        metric_fn: what it takes of outputs and targets; None for one output, and the targets as they are.
    """

    def __init__(self, name: str, metric: AnyMetric, metric_fn: MetricFn | None) -> None:
        self._name, self._metric = name, metric
        self._counted = Counted(metric, metric_fn or outputs_and_targets, bootstraps=BOOTSTRAPS)

    def add(self, outputs: Mapping[str, Array], samples: Samples) -> None:
        """Count one batch, whose targets are as the loader has them."""
        tensors = {name: torch.from_numpy(array) for name, array in outputs.items()}
        try:
            self._counted.update(tensors, tree_map_only(np.ndarray, torch.from_numpy, samples.targets))
        except QakdError as error:
            raise QakdError(f"{self._name}: {error}") from error

    def score(self) -> dict[str, Any]:
        """Its numbers with percentile bootstrap intervals."""
        intervals, values = self._counted.intervals(), []
        for name, value in self._counted.compute().items():
            if not math.isfinite(value):
                _log.warning("%s: the metric %s is %s, and is left out.", self._name, name, value)
                continue
            low, high = intervals.get(name, (None, None))
            values.append(MetricValue(name, value, low, high, direction(self._metric, name)))
        if not values:
            raise QakdError(
                f"{self._name}: metric: {type(self._metric).__name__} is not a finite number on this loader. Look at its "
                "targets, or choose another metric."
            )
        return {"metrics": tuple(values), "samples": self._counted.samples}

    def change(self, reference: MetricCount) -> tuple[float, float | None, float | None, float | None] | None:
        """Of the first number that both have, which rows are ranked by; paired, resample by resample."""
        mine, others = self._counted.compute(), reference._counted.compute()
        name = next((name for name, value in mine.items() if math.isfinite(value)), None)
        if name is None or not math.isfinite(others.get(name, math.nan)):
            return None
        low, high = self._counted.paired_interval(reference._counted, name) or (None, None)
        return mine[name] - others[name], low, high, None
