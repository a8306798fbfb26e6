"""What is counted on a held-out split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from .._common.labels import label_range
from ..errors import QakdError, TrainingError
from .batches import BatchFn, batch_splitter
from .inputs import Inputs, arguments, call, dtypes_named, to_device
from .matchers import KL, Match, Matcher, agreed_labels
from .matching import default_match
from .metrics import AnyMetric, Counted, MetricFn, higher_is_better, monitored, outputs_and_targets
from .outputs import Outputs, frozen_output, listed, named_outputs

IGNORED = -100
"""Positions with this label do not count, as in torch's cross-entropy."""


@torch.no_grad()
def evaluate(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Any],
    batch_fn: BatchFn,
    device: torch.device,
    *,
    match: Match | None = None,
    metric: AnyMetric | None = None,
    metric_fn: MetricFn = outputs_and_targets,
) -> dict[str, float]:
    """Top-1 accuracy of both networks where the split has class labels, and how often they agree; or the user's metric.

    Args:
        student: in eval mode, ranges frozen.
        teacher: or None.
        loader: held-out batches.
        batch_fn: splits a batch.
        device: of the networks.
        match: which outputs are compared with the teacher's; None where one reading is possible.
        metric: of torchmetrics, counted for both networks in the place of accuracy.
        metric_fn: what it takes of outputs and targets.

    Returns:
        "val_accuracy" and "val_teacher_accuracy", or the metric's numbers likewise; with a teacher "val_agreement", the share
        of labels (positions, where outputs have several) on which both agree, and "val_sqnr_db" of matched outputs that hold
        values.

    Raises:
        TrainingError: there is nothing to compare with.
        QakdError: the metric does not fit, or what is compared can be read in more than one way.
    """
    return count(student, teacher, loader, batch_fn, device, match=match, metric=metric, metric_fn=metric_fn).result()


@torch.no_grad()
def count(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Any],
    batch_fn: BatchFn,
    device: torch.device,
    *,
    match: Match | None = None,
    metric: AnyMetric | None = None,
    metric_fn: MetricFn = outputs_and_targets,
) -> Counts:
    """What :func:`evaluate` computes its numbers from."""
    split = batch_splitter(batch_fn, student)
    counts = Counts(device, metric, metric_fn)
    for batch in loader:
        inputs, targets = split(batch)
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        with dtypes_named(student, inputs, "val_loader"):
            outputs = named_outputs(call(student, inputs))
        expected = None
        if teacher is not None:
            args, kwargs = arguments(inputs)
            expected = named_outputs(frozen_output(teacher, *args, **kwargs))
        counts.add(outputs, expected, inputs, targets, match)
    return counts


class Counts:
    """Metrics of both networks by name.

    Attributes:
        classes: between which the one output that is compared chooses; None where it does not.
        labels: the smallest and the largest label so far; None before the first.
    """

    def __init__(self, device: torch.device, metric: AnyMetric | None, metric_fn: MetricFn) -> None:
        self._device, self._metric, self._metric_fn = device, metric, metric_fn
        self._own: dict[str, Metric] = {}
        self._users: dict[str, Counted] = {}
        self._power: dict[str, tuple[Metric, Metric]] = {}
        self.classes: int | None = None
        self.labels: tuple[int, int] | None = None

    def add(self, outputs: Outputs, expected: Outputs | None, inputs: Inputs, targets: Any, match: Match | None) -> None:
        """Count one batch."""
        if self._metric is not None:
            self._count("", outputs, targets)
            if expected is not None:
                self._count("teacher_", expected, targets)
        found = self._matched(outputs, inputs, match) if self._metric is None or expected is not None else {}
        for name, matcher in found.items():
            for whose, those in (("student", outputs), ("teacher", expected)):
                if those is not None and name not in those:
                    raise QakdError(
                        f"val_loader: match names {name!r}, which the {whose} does not output in eval mode; it outputs "
                        f"{listed(those)}. Match outputs that both modes have, or leave val_loader out."
                    )
            other = None if expected is None else expected[name]
            if len(found) == 1 and isinstance(matcher, KL):
                self.classes = outputs[name].shape[matcher.dim]
            if self._metric is None and len(found) == 1 and isinstance(matcher, KL):
                self._accuracy(matcher, outputs[name], other, targets)
            if other is not None:
                self._compare(name if len(found) > 1 else "", matcher, outputs[name], other)

    def result(self) -> dict[str, float]:
        """All numbers."""
        numbers = {name: float(metric.compute()) for name, metric in self._own.items()}
        for prefix, counted in self._users.items():
            numbers |= {f"val_{prefix}{name}": value for name, value in counted.compute().items()}
        for name, sums in self._power.items():
            signal, noise = (float(total.compute()) for total in sums)  # over all processes, as every metric
            numbers[name] = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
        if not numbers:
            raise TrainingError(
                "val_loader yields neither labels nor, without a teacher, anything to compare with. Yield (x, y)."
            )
        return numbers

    def _matched(self, outputs: Outputs, inputs: Inputs, match: Match | None) -> Match:
        """What is compared: with a metric, nothing where no reading is the only one, since the metric decides."""
        if match is not None:
            return match
        try:
            return default_match(outputs, inputs)
        except QakdError:
            if self._metric is None:
                raise
            return {}

    def _count(self, prefix: str, outputs: Outputs, targets: Any) -> None:
        assert self._metric is not None
        if prefix not in self._users:
            self._users[prefix] = Counted(self._metric, self._metric_fn, self._device)
        self._users[prefix].update(outputs, targets)

    def _compare(self, name: str, matcher: Matcher, output: Tensor, expected: Tensor) -> None:
        suffix = f"_{name}" if name else ""
        own, others = agreed_labels(matcher, output), agreed_labels(matcher, expected)
        if own is not None and others is not None:
            same = self._own.setdefault(f"val_agreement{suffix}", MeanMetric().to(self._device))
            same.update((own == others).float())
            return
        signal, noise = self._power.setdefault(f"val_sqnr_db{suffix}", (self._sum(), self._sum()))
        signal.update(expected.double().square().sum())
        noise.update((output.double() - expected.double()).square().sum())

    def _sum(self) -> Metric:
        return SumMetric().set_dtype(torch.float64).to(self._device)

    def _accuracy(self, matcher: KL, output: Tensor, expected: Tensor | None, targets: Any) -> None:
        logits = output.movedim(matcher.dim, 1)
        positions = logits.shape[:1] + logits.shape[2:]
        if not (isinstance(targets, Tensor) and targets.shape == positions and not targets.is_floating_point()):
            return
        if (found := label_range(targets[targets != IGNORED], logits.shape[1], "val_loader: labels")) is not None:
            self.labels = found if self.labels is None else (min(found[0], self.labels[0]), max(found[1], self.labels[1]))
        theirs = None if expected is None else expected.movedim(matcher.dim, 1)
        for name, scores in (("val_accuracy", logits), ("val_teacher_accuracy", theirs)):
            if scores is not None:
                self._metric_of(name, logits.shape[1]).update(scores, targets)

    def _metric_of(self, name: str, classes: int) -> Metric:
        if name not in self._own:
            self._own[name] = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED).to(self._device)
        return self._own[name]


def value_of(row: Mapping[str, Any], metric: AnyMetric | None, monitor: str | None) -> float | None:
    """What picks the best epoch, larger is better: the monitored number, else accuracy, agreement or SQNR; None without any."""
    names, sign = picking(row, metric, monitor)
    return float(sign * sum(row[name] for name in names) / len(names)) if names else None


def picking(row: Mapping[str, Any], metric: AnyMetric | None, monitor: str | None) -> tuple[list[str], int]:
    """Names of a row whose mean picks the best epoch, none where nothing does; and 1 where larger is better, else -1."""
    if metric is not None:
        numbers = {name.removeprefix("val_"): value for name, value in row.items() if name.startswith("val_")}
        own = {name: value for name, value in numbers.items() if not name.startswith(("teacher_", "agreement", "sqnr_db"))}
        if not own:
            return [], 1
        name = monitored(metric, monitor, own)
        return [f"val_{name}"], 1 if higher_is_better(metric, name) else -1
    for key in ("val_accuracy", "val_agreement", "val_sqnr_db"):
        if found := [name for name in row if name == key or name.startswith(f"{key}_")]:
            return found, 1
    return [], 1
