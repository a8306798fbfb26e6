"""Which layers suffer most from quantization: each alone, against a teacher, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .._common.console import cell
from .._common.module_copy import copied
from .._common.one_at_a_time import one_at_a_time
from ..errors import QakdError
from ..placement.layer_names import within
from ..tasks.batches import BatchFn, batch_splitter, default_batch
from ..tasks.inputs import Inputs, arguments, call, device_of_network, sample_count, to_device
from ..tasks.matchers import Match
from ..tasks.matching import check_match
from ..tasks.metrics import AnyMetric, Counted, MetricFn, check_monitor, higher_is_better, monitored, outputs_and_targets
from ..tasks.outputs import Outputs, frozen_output, named_outputs
from ..toolkits import Adapter, Quantizer, adapter_for
from .methods import Imitation, total_loss
from .networks import on_device
from .teachers import one_teacher


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer, or the layers of one block, cost with their quantizers on and all others off.

    Attributes:
        name: of the layer, or the pattern of the block: an entry for ``prepare(keep=...)``.
        layers: names of its quantized layers.
        loss: what the matched loss grows by.
        metric: what the metric loses: positive is worse; None without one.
    """

    name: str
    layers: tuple[str, ...]
    loss: float
    metric: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Rows, worst first, and what meets the budget. Losses are counted from the model with all quantizers off.

    Attributes:
        rows: one per layer or block.
        loss: what the matched loss grows by with all quantizers on.
        metric: what the metric loses likewise, or None.
        monitor: the metric's name, or None.
        budget: as it was asked for, or None.
        keep: what to leave in floating point (``prepare(keep=...)``) to meet it; None without a budget.
        kept_lost: what is lost then, measured: of the metric where there is one, else of the loss; None without a budget.
    """

    rows: tuple[LayerSensitivity, ...]
    loss: float
    metric: float | None
    monitor: str | None
    budget: float | None
    keep: tuple[str, ...] | None
    kept_lost: float | None

    @property
    def layers(self) -> int:
        """How many layers are quantized."""
        return sum(len(row.layers) for row in self.rows)

    @property
    def kept_layers(self) -> int:
        """How many of them ``keep`` takes out of integer arithmetic."""
        return sum(len(row.layers) for row in self.rows if row.name in (self.keep or ()))

    def table(self) -> Table:
        """A rich table, worst first."""
        table = Table(title=f"each alone; together {self._lost(self.loss, self.metric)}")
        table.add_column("layer or block", overflow="fold")
        for column in ("layers", "loss", *([self.monitor] if self.monitor else []), "keep"):
            table.add_column(column, justify="right")
        for row in self.rows:
            numbers = [f"{row.loss:+.4g}", *([] if row.metric is None else [f"{-row.metric:+.4g}"])]
            table.add_row(cell(row.name), str(len(row.layers)), *numbers, "float" if row.name in (self.keep or ()) else "")
        return table

    def summary(self) -> str:
        """What to keep, and what that costs; what to do where no budget was given."""
        if self.keep is None:
            return "Pass budget= to be told what to keep in floating point."
        kept = "nothing has to be kept in floating point" if not self.keep else f"keep={list(self.keep)}"
        return (
            f"{kept}: {self.kept_layers} of {self.layers} quantized layers leave integer arithmetic; "
            f"{self.kept_lost:.4g} is lost, the budget is {self.budget:.4g}."
        )

    def _lost(self, loss: float, metric: float | None) -> str:
        return f"loss {loss:+.4g}" + ("" if metric is None else f", {self.monitor} {-metric:+.4g}")

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get() + self.summary()


@one_at_a_time
@torch.no_grad()
def sensitivity(
    prepared_model: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    batches: Iterable[Any],
    budget: float | None = None,
    blocks: Sequence[str] = (),
    *,
    match: Match | None = None,
    metric: AnyMetric | None = None,
    metric_fn: MetricFn = outputs_and_targets,
    monitor: str | None = None,
    batch_fn: BatchFn = default_batch,
) -> Sensitivity:
    """Measure how much each layer's quantizers alone cost, and which layers to keep in floating point.

    One pass over the batches for each layer, with its quantizers on and all others off, and a few more where a budget is given:
    the worst layers are switched off, as few as meet it. A quantizer that several layers read is on with each of them, and off
    when all are kept. A copy of the model is measured, in eval mode with frozen ranges: the model stays as it is.

    Args:
        prepared_model: prepared and calibrated by a supported toolkit, trained or not.
        teacher: what it is compared with; several as in ``distill``.
        batches: a few, as the loader yields them; they are kept in memory, with the teacher's outputs.
        budget: how much may be lost against the model with all quantizers off: of the metric, in its own unit, where one is
            given, else of the matched loss. None: nothing is recommended.
        blocks: patterns ("layer1.*") whose layers are measured together, one row each; other layers get rows of their own.
        match: which outputs are compared, and how, as in :class:`qakd_plugin.SQAKD`; None where one reading is possible. A KL
            without a temperature of its own has 1.
        metric: of torchmetrics: layers are then ordered by what it loses.
        metric_fn: what it takes of outputs and targets.
        monitor: which of its numbers counts, where it has several.
        batch_fn: splits a batch into (inputs, targets), as in ``distill``.

    Returns:
        Rows, worst first; prints as a table.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: there is no batch or no teacher, the budget is negative, a pattern matches no quantized layer, or outputs
            can be compared in more than one way.
    """
    if budget is not None and not budget >= 0:
        raise QakdError(f"budget={budget} must be 0 or more: how much may be lost against the model without quantizers.")
    if metric is not None:
        check_monitor(metric, monitor)
    adapter = adapter_for(prepared_model)
    network = one_teacher(teacher)
    if network is None:
        raise QakdError("teacher=None: pass the float model, which the quantized one is compared with.")
    model = copied(prepared_model)
    adapter.set_mode(model, False)
    adapter.freeze_ranges(model, True)
    split = batch_splitter(batch_fn, prepared_model)
    device = device_of_network(model)
    with on_device(device, network):
        samples = [_Sample.of(split, batch, network, device) for batch in batches]
    if not samples:
        raise QakdError("batches is empty: at least one batch is needed.")
    imitation = Imitation(1.0, match=match)
    first = named_outputs(call(model, samples[0].inputs))
    check_match(imitation.matched(first, samples[0].inputs), first, samples[0].taught, samples[0].inputs, samples[0].targets)
    meter = _Meter(model, samples, imitation, metric, metric_fn, monitor)
    switches = _Switches(adapter, model, samples[0].inputs)
    return _scan(switches, meter, _groups(switches.layers, blocks), budget)


def _scan(switches: _Switches, meter: _Meter, groups: dict[str, tuple[str, ...]], budget: float | None) -> Sensitivity:
    switches.only(frozenset())
    origin = meter.measure()
    rows = []
    for name, layers in groups.items():
        switches.only(frozenset(layers))
        rows.append(LayerSensitivity(name, layers, *origin.lost(meter.measure())))
    rows.sort(key=lambda row: row.loss if row.metric is None else row.metric, reverse=True)
    switches.without(frozenset())
    together = origin.lost(meter.measure())

    def lost(kept: int) -> float:
        """What is lost with the worst rows switched off."""
        switches.without(frozenset(layer for row in rows[:kept] for layer in row.layers))
        loss, value = origin.lost(meter.measure())
        return loss if value is None else value

    keep, kept_lost = None, None
    if budget is not None:
        low, high, kept_lost = 0, len(rows), lost(0)
        if kept_lost > budget:
            kept_lost = lost(high)
            while high - low > 1:  # ``low`` fails, ``high`` meets the budget
                middle = (low + high) // 2
                tried = lost(middle)
                low, high, kept_lost = (low, middle, tried) if tried <= budget else (middle, high, kept_lost)
        else:
            high = 0
        keep = tuple(row.name for row in rows[:high])
    return Sensitivity(tuple(rows), *together, meter.monitor, budget, keep, kept_lost)


@dataclass(frozen=True)
class _Sample:
    """A batch, and what the teacher says."""

    inputs: Inputs
    targets: Any
    taught: Outputs

    @classmethod
    def of(cls, split: BatchFn, batch: Any, teacher: nn.Module, device: torch.device) -> _Sample:
        inputs, targets = to_device(split(batch), device)
        args, kwargs = arguments(inputs)
        return cls(inputs, targets, named_outputs(frozen_output(teacher, *args, **kwargs)))


@dataclass(frozen=True)
class _Measured:
    """Of one setting of the switches: the matched loss, and the metric as a number of which less is better."""

    loss: float
    metric: float | None

    def lost(self, other: _Measured) -> tuple[float, float | None]:
        """How much worse another setting is."""
        metric = None if self.metric is None or other.metric is None else other.metric - self.metric
        return other.loss - self.loss, metric


class _Meter:
    """Measures a model as it is now."""

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[_Sample],
        imitation: Imitation,
        metric: AnyMetric | None,
        metric_fn: MetricFn,
        monitor: str | None,
    ) -> None:
        self._model, self._samples, self._imitation = model, samples, imitation
        self._metric, self._metric_fn, self._wanted = metric, metric_fn, monitor
        self.monitor: str | None = None

    def measure(self) -> _Measured:
        """One pass over all batches."""
        total, count = 0.0, 0
        counted = None if self._metric is None else Counted(self._metric, self._metric_fn, "cpu")
        for sample in self._samples:
            outputs = named_outputs(call(self._model, sample.inputs))
            loss, _ = total_loss((self._imitation,), outputs, sample.taught, sample.targets, sample.inputs)
            size = sample_count(sample.inputs)
            total, count = total + float(loss) * size, count + size
            if counted is not None:
                counted.update(outputs, sample.targets)
        return _Measured(total / count, None if counted is None else self._number(counted))

    def _number(self, counted: Counted) -> float:
        assert self._metric is not None
        numbers = counted.compute()
        self.monitor = monitored(self._metric, self._wanted, numbers)
        return -numbers[self.monitor] if higher_is_better(self._metric, self.monitor) else numbers[self.monitor]


class _Switches:
    """Which layers' quantizers are on.

    A quantizer belongs to the layers that read it; one that no layer reads, in front of an add or after a convolution, belongs
    to the layer that ran last before it.

    Args:
        adapter: of the toolkit.
        model: the copy that is measured, with all quantizers on.
        inputs: of a batch, from which the order of calls is known.
    """

    def __init__(self, adapter: Adapter, model: nn.Module, inputs: Inputs) -> None:
        self._adapter = adapter
        quantizers = adapter.quantizers(model)
        prefix = adapter.wrapper_prefix(model)
        weighted = {layer for q in quantizers if q.role == "weight" for layer in q.layers}
        if not weighted:
            raise QakdError("prepared_model quantizes no weight: there is no layer to switch off. Prepare it first.")
        order = _call_order(model, quantizers, inputs)
        before: tuple[str, ...] = next(q.layers for q in order if q.role == "weight")
        owners: dict[str, frozenset[str]] = {}
        for quantizer in order:
            if quantizer.role == "weight":
                before = quantizer.layers
            read = [layer for layer in quantizer.layers if layer in weighted]
            last = (quantizer.after,) if quantizer.after in weighted else before
            owners.setdefault(quantizer.fqn, frozenset(name.removeprefix(prefix) for name in (read or last)))
        self._owned = [(quantizer, owners[quantizer.fqn]) for quantizer in quantizers if quantizer.fqn in owners]
        of_weights = (layer for q, layers in self._owned if q.role == "weight" for layer in sorted(layers))
        self.layers = tuple(dict.fromkeys(of_weights))

    def only(self, layers: frozenset[str]) -> None:
        """Quantizers of these layers on, all others off."""
        self._set(lambda owners: not owners.isdisjoint(layers))

    def without(self, layers: frozenset[str]) -> None:
        """Quantizers of these layers alone off, all others on."""
        self._set(lambda owners: not owners <= layers)

    def _set(self, wanted: Callable[[frozenset[str]], bool]) -> None:
        for quantizer, owners in self._owned:
            self._adapter.switch(quantizer, wanted(owners))


def _call_order(model: nn.Module, quantizers: Sequence[Quantizer], inputs: Inputs) -> list[Quantizer]:
    """Quantizers in the order in which a forward pass calls them, each call once."""
    order: list[Quantizer] = []
    hooks = [
        quantizer.module.register_forward_pre_hook(lambda *_, quantizer=quantizer: order.append(quantizer))
        for quantizer in quantizers
    ]
    try:
        call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _groups(layers: Sequence[str], blocks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of rows, and the layers of each."""
    groups: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        name = next((pattern for pattern in blocks if within(layer, pattern)), layer)
        groups[name] = (*groups.get(name, ()), layer)
    for pattern in blocks:
        if pattern not in groups:
            raise QakdError(
                f"blocks: {pattern!r} matches no quantized layer, or none that patterns before it leave; layers are "
                f"called, e.g., {list(layers[:4])}."
            )
    return groups
