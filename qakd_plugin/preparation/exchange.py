"""``use_quantizers``: learned quantizers instead of a toolkit's own, inside its own structure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._common.module_copy import copied
from ..errors import QakdError, UnsupportedQuantizerError
from ..placement.calibration import RangeObserver, best_weight_clip, observe_inputs
from ..placement.layer_names import within
from ..placement.targets import TARGETS, Target
from ..quantizers import QuantizerConfig, Rule
from ..quantizers.qparams import QParams
from ..tasks.batches import BatchFn, batch_splitter, default_batch
from ..tasks.inputs import device_of_network, dtypes_named
from ..toolkits import Adapter, Quantizer, adapter_for
from .calibration_batches import CalibrationBatches

_log = logging.getLogger(__name__)


@torch.no_grad()
def use_quantizers(
    prepared_model: nn.Module,
    config: QuantizerConfig,
    keep: Sequence[str] = (),
    calibration_batches: Iterable[object] | None = None,
    *,
    target: Target = "tensorrt",
    batch_fn: BatchFn = default_batch,
) -> nn.Module:
    """Let LSQ, PACT, DoReFa or EWGS quantizers work in the place of the toolkit's own.

    The toolkit's structure stays: its way to save, restore, copy and convert the model goes on working, and quantizers that
    were swapped can be swapped again, or back with :func:`restore_quantizers`. Numbers of bits that ``config`` leaves at None
    stay as prepared, so the first and last layer and residual adds keep the 8 bits that :func:`prepare` gave them; numbers
    that are given hold for every quantizer that is not kept.

    Args:
        prepared_model: prepared and calibrated by a supported toolkit; changed in place.
        config: LSQ(...), PACT(...), DoReFa(...) or EWGS(...).
        keep: names or patterns ("conv1", "layer4.*") of layers or quantizers that stay as they are.
        calibration_batches: several batches as the loader yields them. Ranges of activations whose number of bits changes
            come from all of them, and so does whether an activation can be negative. They pass through a copy in eval mode.
            Without them, ranges and signs are the toolkit's.
        target: as in :func:`prepare`, for activations that get 8 bits here; those that have codes 0..255 keep them.
        batch_fn: splits a batch into (inputs, targets), as in ``distill``.

    Returns:
        ``prepared_model``.

    Raises:
        NotPreparedError: no toolkit prepared the model, or a range was never calibrated.
        UnsupportedQuantizerError: a quantizer is asymmetric, or dynamic.
        QakdError: a pattern of ``keep`` matches nothing, nothing is left to swap, the quantizer is not defined for the bits, or
            the target is unknown.
    """
    if target not in TARGETS:
        raise QakdError(f"target={target!r} is unknown: use one of {list(TARGETS)}.")
    if isinstance(config, type):
        raise QakdError(f"config={config.__name__} is a class: pass qakd.{config.__name__}().")
    adapter = adapter_for(prepared_model)
    swaps = [_Swap.of(adapter, quantizer, config) for quantizer in _chosen(adapter, prepared_model, keep)]
    observed = _observe(adapter, prepared_model, swaps, calibration_batches, batch_fn)
    # All rules are made before the first is installed: an error leaves the model as it was.
    plans = [_plan(swap, config, observed.get(swap.quantizer.fqn), target) for swap in swaps]
    _announce(config, swaps, bool(observed))
    for plan in plans:
        adapter.install(prepared_model, plan.quantizer, plan.rule, plan.clip)
    for quantizer in adapter.quantizers(prepared_model):
        if quantizer.weight is not None and adapter.learned(quantizer) is not None:
            quantizer.module(quantizer.weight())  # scales that follow the weight are set
    return prepared_model


@dataclass(frozen=True)
class _Swap:
    """A quantizer that is to be swapped, the numbers it has, and the bits it will have."""

    quantizer: Quantizer
    old: QParams
    bits: int

    @classmethod
    def of(cls, adapter: Adapter, quantizer: Quantizer, config: QuantizerConfig) -> _Swap:
        old = adapter.qparams(quantizer)
        _require_symmetric(quantizer, old)
        wanted = config.weight_bits if quantizer.role == "weight" else config.activation_bits
        return cls(quantizer, old, old.bits if wanted is None else wanted)

    @property
    def changes_activation(self) -> bool:
        return self.quantizer.role == "activation" and self.bits != self.old.bits


@dataclass(frozen=True)
class _Plan:
    """What :meth:`.Adapter.install` is told."""

    quantizer: Quantizer
    rule: Rule
    clip: Tensor


def _plan(swap: _Swap, config: QuantizerConfig, observer: RangeObserver | None, target: Target) -> _Plan:
    quantizer, old = swap.quantizer, swap.old
    if quantizer.role == "weight":
        rule = config.weight_rule(swap.bits, _scale_axis(old, config.per_channel), old.block)
        return _Plan(quantizer, rule, _weight_clip(quantizer, rule))
    rule = config.activation_rule(swap.bits, _is_unsigned(swap, observer, target))
    return _Plan(quantizer, rule, _activation_clip(old, observer, rule.codes[1]))


def _scale_axis(old: QParams, per_channel: bool) -> int | None:
    """The dimension of a weight with one scale per element; None for one scale in all."""
    if old.block:
        return 0  # of a weight whose rows are its blocks
    if not per_channel:
        return None
    return 0 if old.axis is None else old.axis


def restore_quantizers(prepared_model: nn.Module, keep: Sequence[str] = ()) -> nn.Module:
    """Put the toolkit's own quantizers back, with the ranges that were learned: the model computes the same.

    Weights that DoReFa, PACT or EWGS quantize are stored as they were quantized, because the toolkit's quantizer can clip and
    round only.

    Args:
        prepared_model: with quantizers that :func:`use_quantizers` put in; changed in place.
        keep: names or patterns of layers or quantizers that stay as they are.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: no quantizer of it was swapped.
    """
    adapter = adapter_for(prepared_model)
    learned = [q for q in _chosen(adapter, prepared_model, keep) if adapter.learned(q) is not None]
    if not learned:
        raise QakdError(f"prepared_model ({type(prepared_model).__name__}) holds no quantizer of use_quantizers to take back.")
    for quantizer in learned:
        adapter.uninstall(prepared_model, quantizer)
    return prepared_model


def install_rules(prepared_model: nn.Module, rules: Mapping[str, Rule]) -> None:
    """Put learned quantizers in by name, for a state_dict that holds their numbers to be loaded.

    Args:
        prepared_model: changed in place.
        rules: what each computes, by the name of the quantizer whose place it takes.

    Raises:
        QakdError: there is no quantizer of that name.
    """
    adapter = adapter_for(prepared_model)
    quantizers = {quantizer.fqn: quantizer for quantizer in adapter.quantizers(prepared_model)}
    missing = next((name for name in rules if name not in quantizers), None)
    if missing is not None:
        raise QakdError(
            f"prepared_model ({type(prepared_model).__name__}) holds no quantizer {missing!r}. Prepare it as it was."
        )
    for name, rule in rules.items():
        quantizer = quantizers[name]
        clip = torch.ones(()) if quantizer.role == "activation" else _weight_clip(quantizer, rule)
        adapter.install(prepared_model, quantizer, rule, clip.to(device_of_network(prepared_model)))


def _chosen(adapter: Adapter, model: nn.Module, keep: Sequence[str]) -> list[Quantizer]:
    """Quantizers that no pattern names, neither by themselves nor by all the layers that read them."""
    quantizers = adapter.quantizers(model)
    names = {name for q in quantizers for name in (q.fqn, *q.layers)}
    for pattern in keep:
        if not any(within(name, pattern) for name in names):
            layers = sorted({layer for q in quantizers for layer in q.layers})
            raise QakdError(f"keep: {pattern!r} matches no quantizer or layer; layers are called, e.g., {layers[:4]}.")

    def kept(quantizer: Quantizer) -> bool:
        return any(
            within(quantizer.fqn, pattern) or (quantizer.layers and all(within(name, pattern) for name in quantizer.layers))
            for pattern in keep
        )

    chosen = [quantizer for quantizer in quantizers if not kept(quantizer)]
    if not chosen:
        raise QakdError(f"nothing is left to swap: keep={list(keep)} matches all {len(quantizers)} quantizers. Keep fewer.")
    return chosen


def _require_symmetric(quantizer: Quantizer, params: QParams) -> None:
    if not params.symmetric:
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: asymmetric (zero point {int(params.zero_point.flatten()[0])}); learned quantizers have zero "
            "point 0. Prepare the model with a symmetric configuration (qakd_plugin.prepare makes one), or keep this one."
        )
    if quantizer.role == "activation" and params.scale.numel() != 1:
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: has {params.scale.numel()} scales; learned activation quantizers have one per tensor. "
            "Prepare the model with per-tensor activations, or keep this one."
        )


def _weight_clip(quantizer: Quantizer, rule: Rule) -> Tensor:
    assert quantizer.weight is not None
    weight = quantizer.weight().float()
    if rule.block:  # the last block of a row may be filled up with zeros
        weight = F.pad(weight, (0, -weight.shape[1] % rule.block)).reshape(-1, rule.block)
    low, high, shift = rule.levels
    clip = best_weight_clip(weight, low, high, rule.axis, shift)
    # A channel of zeros has no range; its codes are zero whatever the scale is.
    spare = clip.max() if bool((clip > 0).any()) else torch.ones((), device=clip.device)
    return torch.where(clip > 0, clip, spare)


def _is_unsigned(swap: _Swap, observer: RangeObserver | None, target: Target) -> bool:
    """Whether an activation gets codes from 0 on. TensorRT takes signed bytes only."""
    if swap.bits == 8 and target == "tensorrt":
        return swap.old.quant_min == 0 and swap.old.quant_max > 127
    return swap.old.quant_min == 0 or (observer is not None and observer.minimum >= 0)


def _activation_clip(params: QParams, observer: RangeObserver | None, highest: int) -> Tensor:
    clip = params.scale.reshape(()) * params.quant_max
    best = 0.0 if observer is None else observer.best_clip(highest)
    return torch.full_like(clip, best) if best > 0 else clip


def _observe(
    adapter: Adapter, model: nn.Module, swaps: Sequence[_Swap], batches: Iterable[object] | None, batch_fn: BatchFn
) -> dict[str, RangeObserver]:
    changed = [swap.quantizer.fqn for swap in swaps if swap.changes_activation]
    if batches is None or not changed:
        return {}
    inputs = CalibrationBatches(batches, batch_splitter(batch_fn, model), device_of_network(model))
    # A copy: what observing asks for, and what passes through the model leave behind, is no business of the model's.
    observed = copied(model)
    adapter.set_mode(observed, False)
    adapter.freeze_ranges(observed, True)
    adapter.set_fake_quant(observed, False)
    with dtypes_named(observed, inputs.first, "calibration_batches"):
        return observe_inputs(observed, {fqn: observed.get_submodule(fqn) for fqn in changed}, inputs, {})


def _announce(config: QuantizerConfig, swaps: Sequence[_Swap], observed: bool) -> None:
    lowered = [swap.quantizer.fqn for swap in swaps if swap.bits < swap.old.bits]
    changed = [swap for swap in swaps if swap.changes_activation]
    mixed = len({swap.old.bits for swap in swaps}) > 1
    if lowered and mixed:
        _log.warning(
            "%s: %d quantizers work with fewer bits than they were prepared with, among them %s. Leave weight_bits and "
            "activation_bits at None to keep the bits of each, or name layers in keep=(...).",
            type(config).__name__,
            len(lowered),
            ", ".join(lowered[:4]),
        )
    if changed and not observed:
        _log.warning(
            "%s: %d activation quantizers change their number of bits without calibration_batches: ranges and signs are the "
            "toolkit's. Pass several batches.",
            type(config).__name__,
            len(changed),
        )
