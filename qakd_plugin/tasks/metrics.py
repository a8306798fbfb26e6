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
        self._drawn = set[int]()  # of the copies, those that were given something
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
        args = [_on(part, self._device) for part in self._parts(outputs, targets)]
        lengths = {length for part in args for length in _lengths(part)}
        if self._copies and len(lengths) != 1:
            raise QakdError(
                "metric_fn must return what metric.update takes, with one entry per sample in each part, which are then "
                f"resampled; got {', '.join(map(_described, args))}. Write metric_fn=lambda outputs, targets: (..., ...)."
            )
        count = max(lengths, default=1)
        self._update(self._metric, args)
        for index, resampled in enumerate(self._copies):
            times = torch.poisson(torch.ones(count), generator=self._generator).long()
            rows = torch.repeat_interleave(torch.arange(count), times).tolist()
            if rows:
                self._update(resampled, [_rows(part, rows) for part in args])
                self._drawn.add(index)
        self.samples += count

    def compute(self) -> dict[str, float]:
        """Its numbers by name.

        Raises:
            QakdError: it was given nothing, or has no number to show.
        """
        if not self.samples:
            raise QakdError("metric: nothing was counted: the split is empty. Check the data set.")
        numbers = _numbers(self._metric)
        if not numbers:
            raise QakdError(f"metric: {type(self._metric).__name__} computes no single number. Average over its classes.")
        return numbers

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals by name.

        Each copy counted every sample as often as a Poisson variable of mean 1 says, which is what resampling with replacement
        comes to over many samples, whatever the batches (Hanley and MacGibbon, Computer Methods and Programs in Biomedicine
        2006). What is not finite in a copy, which may have drawn too few samples, is left out.
        """
        drawn = [_numbers(self._copies[index]) for index in sorted(self._drawn)]
        found = {}
        for name in self.compute():
            interval = _percentiles([numbers[name] for numbers in drawn if name in numbers], level)
            if interval is not None:
                found[name] = interval
        return found

    def paired_interval(self, other: Counted, name: str, level: float = 0.95) -> tuple[float, float] | None:
        """Percentile bootstrap interval of one of its numbers less that of another network on the same samples.

        Copies of both drew the same samples, since both began with the same seed; what the samples have in common cancels out.
        None where they did not, because the metric was given other numbers of entries.
        """
        if not torch.equal(self._generator.get_state(), other._generator.get_state()):
            return None
        pairs = [
            (_numbers(self._copies[index]), _numbers(other._copies[index])) for index in sorted(self._drawn & other._drawn)
        ]
        return _percentiles([mine[name] - others[name] for mine, others in pairs if name in mine and name in others], level)

    def _parts(self, outputs: Mapping[str, Tensor], targets: Any) -> Sequence[Any]:
        try:
            found = self._fn(simplified(outputs), targets)
        except KeyError as error:
            raise QakdError(
                f"metric_fn: there is no {error}. The network outputs {listed(outputs)}: take one of them."
            ) from error
        if not isinstance(found, Sequence) or isinstance(found, str) or not found:
            raise QakdError(
                f"metric_fn must return a tuple, what metric.update takes, got {type(found).__name__}: "
                "metric_fn=lambda outputs, targets: (..., ...)."
            )
        return found

    def _update(self, metric: AnyMetric, args: Sequence[Any]) -> None:
        try:
            metric.update(*args)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            shapes = ", ".join(map(_described, args))
            raise QakdError(
                f"metric: {type(metric).__name__} does not take {shapes} ({' '.join(str(error).split())[:200]}). "
                "Say what it takes: metric_fn=lambda outputs, targets: (..., ...)."
            ) from error


def _percentiles(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """Of those that are finite; None where none is."""
    known = torch.tensor(values, dtype=torch.float64)
    known = known[known.isfinite()]
    if not len(known):
        return None
    tail = (1 - level) / 2
    low, high = torch.quantile(known, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


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
    found = direction(metric, name)
    if found is None:
        owner = _owner(metric, name)
        if owner is None:
            raise QakdError(f"monitor={name!r} is none of the metric's numbers; there are {', '.join(_parts(metric))}.")
        raise QakdError(f"monitor={name!r}: {type(owner).__name__} does not say whether higher is better. Choose another.")
    return found


def direction(metric: AnyMetric, name: str) -> bool | None:
    """As :func:`higher_is_better`; None where the metric does not say."""
    owner = _owner(metric, name)
    found = None if owner is None else owner.higher_is_better
    return None if found is None else bool(found)


def _owner(metric: AnyMetric, name: str) -> Metric | None:
    """Whose number it is."""
    alone = not isinstance(metric, MetricCollection)  # its numbers may have any names: mean average precision's have
    parts = _parts(metric).items()
    return next((part for key, part in parts if alone or name == key or name.startswith(f"{key}_")), None)


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
    """Some samples of a part; what is no list of samples stays as it is."""
    if isinstance(part, Mapping):
        return {key: _rows(value, rows) for key, value in part.items()}
    if isinstance(part, Tensor) and part.ndim:
        return part[rows]
    return [part[row] for row in rows] if isinstance(part, list) else part


def _lengths(part: Any) -> set[int]:
    """Numbers of entries; none of what is no list of samples."""
    if isinstance(part, Mapping):
        return {length for value in part.values() for length in _lengths(value)}
    return {len(part)} if isinstance(part, list) or (isinstance(part, Tensor) and part.ndim) else set()


def _described(part: Any) -> str:
    return f"{tuple(part.shape)} {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
