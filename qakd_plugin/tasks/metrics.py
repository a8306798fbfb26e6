"""What is counted: a torchmetrics metric of the user's, fed alike in training and through a runtime."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ..errors import QakdError
from .outputs import listed

AnyMetric: TypeAlias = Metric | MetricCollection

MetricFn: TypeAlias = Callable[[Any, Any], Sequence[Any]]
"""Outputs and targets -> what ``metric.update`` takes. Outputs are a tensor where there is one, else a dict by path."""


def simplified(outputs: Mapping[str, Tensor]) -> Any:
    """What users' functions get of a network's outputs: the tensor where there is one, else all of them by path."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


def outputs_and_targets(outputs: Any, targets: Any) -> Sequence[Any]:
    """The default of ``metric_fn``: one output, and the targets as they are."""
    if not isinstance(outputs, Tensor):
        raise QakdError(
            f"metric: the network outputs {listed(outputs)}. Say what the metric takes of them: "
            "metric_fn=lambda outputs, targets: (outputs[...], targets)."
        )
    return outputs, targets


class Counted:
    """One metric over one split.

    Args:
        metric: of torchmetrics; it is copied, and reset.
        metric_fn: what it takes of outputs and targets.
        device: where it accumulates.
        bootstraps: how many resampled copies it keeps, for an interval; 0 for none.
    """

    def __init__(self, metric: AnyMetric, metric_fn: MetricFn, device: torch.device | str = "cpu", bootstraps: int = 0) -> None:
        check_metric(metric)
        self._metric = fresh(metric, device)
        self._copies = [fresh(metric, device) for _ in range(bootstraps)]
        self._fn = metric_fn
        self._device = torch.device(device)
        self._generator = torch.Generator().manual_seed(0)
        self.samples = 0

    def update(self, outputs: Mapping[str, Tensor], targets: Any) -> None:
        """Count one batch.

        Args:
            outputs: of the network, by path.
            targets: of the batch.

        Raises:
            QakdError: the metric does not take what it is given.
        """
        if targets is None:
            raise QakdError("metric: the batch holds no targets. Yield (x, y), or pass a batch_fn that finds them.")
        found = self._fn(simplified(outputs), targets)
        if not isinstance(found, Sequence):
            raise QakdError(f"metric_fn must return a tuple, what metric.update takes, got {type(found).__name__}.")
        args = [_on(part, self._device) for part in found]
        count = len(args[0])
        self._update(self._metric, args)
        for resampled in self._copies:
            rows = torch.randint(count, (count,), generator=self._generator).tolist()
            self._update(resampled, [_rows(part, rows) for part in args])
        self.samples += count

    def compute(self) -> dict[str, float]:
        """Its numbers by name.

        Raises:
            QakdError: it was given nothing, or has no number to show.
        """
        if not self.samples:
            raise QakdError("metric: nothing was counted: the split is empty.")
        numbers = _numbers(self._metric)
        if not numbers:
            raise QakdError(f"metric: {type(self._metric).__name__} computes no single number. Average over its classes.")
        return numbers

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals by name: batches are resampled with replacement, sample by sample."""
        drawn = [_numbers(metric) for metric in self._copies]
        tail = (1 - level) / 2
        found = {}
        for name in self.compute():
            values = torch.tensor([numbers[name] for numbers in drawn if name in numbers], dtype=torch.float64)
            if len(values):
                low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
                found[name] = (low, high)
        return found

    def _update(self, metric: AnyMetric, args: Sequence[Any]) -> None:
        try:
            metric.update(*args)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            shapes = ", ".join(f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else type(a).__name__ for a in args)
            raise QakdError(
                f"metric: {type(metric).__name__} does not take {shapes} ({' '.join(str(error).split())[:200]}). "
                "Say what it takes: metric_fn=lambda outputs, targets: (..., ...)."
            ) from error


def check_metric(metric: object) -> None:
    """Raise QakdError where it is none of torchmetrics'."""
    if not isinstance(metric, Metric | MetricCollection):
        raise QakdError(f"metric must be a torchmetrics.Metric or MetricCollection, got {type(metric).__name__}.")


def check_monitor(metric: AnyMetric, monitor: str | None) -> None:
    """Raise QakdError, before anything is trained, where it is known that ``monitor`` picks no number of the metric."""
    if monitor is not None:
        higher_is_better(metric, monitor)
    elif len(names := _parts(metric)) > 1:
        monitored(metric, None, dict.fromkeys(names, 0.0))


def monitored(metric: AnyMetric, monitor: str | None, numbers: Mapping[str, float]) -> str:
    """Which of a metric's numbers picks the best epoch.

    Raises:
        QakdError: it is not there, or there are several and none was named.
    """
    if monitor is None and len(numbers) == 1:
        return next(iter(numbers))
    if monitor is None or monitor not in numbers:
        raise QakdError(f"monitor={monitor!r}: say which number picks the best epoch; there are {', '.join(numbers)}.")
    return monitor


def higher_is_better(metric: AnyMetric, name: str) -> bool:
    """Whether larger values of one of a metric's numbers are better.

    Raises:
        QakdError: there is no such number, or the metric does not say.
    """
    parts = _parts(metric)
    alone = not isinstance(metric, MetricCollection)  # its numbers may have any names: mean average precision's have
    owner = next((part for key, part in parts.items() if alone or name == key or name.startswith(f"{key}_")), None)
    if owner is None:
        raise QakdError(f"monitor={name!r} is none of the metric's numbers; there are {', '.join(parts)}.")
    direction = owner.higher_is_better
    if direction is None:
        raise QakdError(f"monitor={name!r}: {type(owner).__name__} does not say whether higher is better. Choose another.")
    return bool(direction)


def fresh(metric: AnyMetric, device: torch.device | str) -> AnyMetric:
    """A copy that has counted nothing."""
    copied = copy.deepcopy(metric)
    copied.reset()
    return copied.to(device)


def _parts(metric: AnyMetric) -> dict[str, Metric]:
    if isinstance(metric, MetricCollection):
        return {_snake(str(name)): part for name, part in metric.items()}
    return {_snake(type(metric).__name__): metric}


def _numbers(metric: AnyMetric) -> dict[str, float]:
    if isinstance(metric, MetricCollection):
        return _flat({_snake(str(name)): value for name, value in metric.compute().items()})
    value = metric.compute()
    return _flat(value if isinstance(value, Mapping) else {_snake(type(metric).__name__): value})


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}_{key}": number for key, number in _flat(value).items()}
        elif (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, int | float):
            found[name] = float(value)
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace(" ", "_")


def _on(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part.detach().to(device).contiguous()
    if isinstance(part, Mapping):
        return {key: _on(value, device) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_on(value, device) for value in part]
    return part


def _rows(part: Any, rows: list[int]) -> Any:
    return part[rows] if isinstance(part, Tensor) else [part[row] for row in rows]
