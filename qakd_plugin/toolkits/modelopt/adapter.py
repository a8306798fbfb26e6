"""NVIDIA ModelOpt: models prepared by ``modelopt.torch.quantization.quantize``.

Facts of the toolkit that shape this file: a quantizer is a ``TensorQuantizer`` child named ``weight_quantizer``,
``input_quantizer`` or ``output_quantizer``; its range is the fixed buffer ``_amax``, its arithmetic
``round(x * (maxbound / amax)) / (maxbound / amax)``; BatchNorm is never fused.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._common.optional import require
from ...errors import NotPreparedError, UnsupportedQuantizerError
from ...placement.calibration import RangeObserver
from ...placement.layer_names import never_called
from ...placement.placement import place_quantizers
from ...quantizers import Rule, remove_tensors, rule_from_dict
from ...tasks.inputs import Inputs
from ..adapter import Precision, QParams, Quantizer, Role, rows_of, weight_of
from ..fake_quantizers import is_paused, per_channel, set_paused
from ..frozen_statistics import set_training
from ..left_out import name_left_out
from .calibration import minimize_error, observe
from .configuration import modelopt_config, quantized_modules
from .export_form import export_form
from .registration import registered, without_prints
from .rule_backend import BACKEND, quantizer_class

_log = logging.getLogger(__name__)
_SMALLEST_AMAX = 2.0**-24
"""ModelOpt maps everything to zero where amax is not above this."""

_ROLES: dict[str, Role] = {"weight_quantizer": "weight", "input_quantizer": "activation", "output_quantizer": "activation"}
"""Of quantizers that stand where every module has a place for one."""


class ModelOptAdapter:
    """Adapter for ``mtq.quantize``."""

    name = "modelopt"

    def detect(self, model: nn.Module) -> bool:
        kind = quantizer_class()
        return kind is not None and any(isinstance(m, kind) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        kind = quantizer_class()
        assert kind is not None
        _refuse_recurrent(model)
        found = []
        idle = never_called(model)
        for fqn, module in model.named_modules():
            if not isinstance(module, kind) or not _is_active(module) or fqn in idle:
                continue
            parent, _, name = fqn.rpartition(".")
            role = _ROLES.get(name, "internal")
            layers = () if name == "output_quantizer" else (parent,)
            if role == "weight":
                layer = model.get_submodule(parent)
                found.append(Quantizer(fqn, module, role, layers, layer, weight_of(layer)))
            else:
                found.append(Quantizer(fqn, module, role, layers))
        return found

    def wrapper_prefix(self, model: nn.Module) -> str:
        return ""

    def qparams(self, quantizer: Quantizer) -> QParams:
        _require_exportable_place(quantizer)
        q: Any = quantizer.module
        if (rule := self.learned(quantizer)) is not None:
            return rule.qparams(q, None if quantizer.layer is None or rule.block is None else rows_of(quantizer.layer))
        _require_static_integers(quantizer)
        amax = _calibrated_amax(quantizer)
        maxbound = float(q.maxbound)
        # A weight channel of zeros has no range; its codes are zero whatever the scale is.
        scale = torch.where(amax <= _SMALLEST_AMAX, torch.ones_like(amax), 1.0 / (maxbound / amax))
        quant_min = 0 if q.unsigned else int(-maxbound if q.narrow_range else -maxbound - 1)
        axis, block = None, None
        if q.block_sizes:
            axis, block, scale = _blocked(quantizer, scale)
        elif amax.numel() == 1:
            scale = scale.reshape(())
        else:
            axis, scale = int(q.axis[0] if isinstance(q.axis, tuple) else q.axis), scale.reshape(-1)
        return QParams(
            scale=scale,
            zero_point=torch.zeros_like(scale, dtype=torch.int32),
            quant_min=quant_min,
            quant_max=int(maxbound),
            axis=axis,
            block=block,
        )

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        for quantizer in self.quantizers(model):
            self.switch(quantizer, enabled)

    def switch(self, quantizer: Quantizer, enabled: bool) -> None:
        q: Any = quantizer.module
        if enabled:
            q.enable_quant()
        else:
            q.disable_quant()
        set_paused(q, not enabled)

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        """Nothing to do: ModelOpt's ranges change only when they are calibrated."""

    def has_frozen_ranges(self, model: nn.Module) -> bool:
        return False

    def set_mode(self, model: nn.Module, training: bool) -> None:
        set_training(model, training)

    def configuration(self, model: nn.Module, precision: Precision) -> dict[str, Any]:
        # Where the user calls ModelOpt it takes neither residual blocks nor ReLUs: their quantizers would silently be left out.
        placement = place_quantizers(model, precision.keep, sums=False, before_activations=precision.before_activations)
        return modelopt_config(placement, replace(precision, placement=1))

    def prepare(self, model: nn.Module, example: Inputs, batches: Iterator[Inputs], precision: Precision) -> nn.Module:
        mtq = require("modelopt.torch.quantization", extra="modelopt", purpose="prepare a model with toolkit='modelopt'")
        placement = place_quantizers(
            model,
            precision.keep,
            example,
            sums=precision.placement > 1,
            before_activations=precision.before_activations,
            before_sums=precision.before_sums,
        )
        config = modelopt_config(placement, precision)
        if placement.floating_sums:
            _log.warning(
                "%s: no module returns these sums, so ModelOpt has no place for their quantizers and they stay in floating "
                "point: %s. Compute each in a module that returns it, or use toolkit='pt2e'.",
                type(model).__name__,
                ", ".join(placement.floating_sums),
            )
        prepared: nn.Module = copy.deepcopy(model).eval()

        observed: dict[str, RangeObserver] = {}

        def forward_loop(network: nn.Module) -> None:
            observed.update(observe(network, batches, placement, precision))

        with without_prints(), registered(prepared, quantized_modules(placement, precision)) as foreign:
            if foreign:
                from .restore_mode import require_our_restore

                prepared = require_our_restore(prepared, foreign)
            prepared = mtq.quantize(prepared, config, forward_loop)
        minimize_error(self, prepared, observed)
        name_left_out(self, prepared, placement)
        return prepared

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        q: Any = quantizer.module
        remove_tensors(q)
        rule.install(q, per_channel(clip, rule, quantizer))
        q.backend, q.backend_extra_args = BACKEND, rule.as_dict()
        _set_learned(q, True)

    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        q: Any = quantizer.module
        rule = self.learned(quantizer)
        assert rule is not None
        if rule.transforms_weight:
            assert quantizer.weight is not None
            with torch.no_grad():
                weight = quantizer.weight()
                weight.copy_(q(weight))
        scale, (low, high) = rule.scale(q), rule.codes
        remove_tensors(q)
        q.backend, q.backend_extra_args = None, {}
        _set_learned(q, False)
        q.unsigned = low == 0
        q.num_bits = high.bit_length() if low == 0 else high.bit_length() + 1
        q.narrow_range = low == -high
        q.axis = None if rule.axis is None or rule.block else rule.axis
        if hasattr(q, "_amax"):
            del q._amax
        q.amax = scale * float(q.maxbound)

    def learned(self, quantizer: Quantizer) -> Rule | None:
        q: Any = quantizer.module
        return rule_from_dict(q.backend_extra_args) if q.backend == BACKEND else None

    def export_form(self, model: nn.Module) -> nn.Module:
        return export_form(self, model)


def _set_learned(quantizer: nn.Module, learned: bool) -> None:
    """Give a quantizer the class that fits, as ModelOpt itself turns one kind of quantizer into another."""
    from .quantizer import LearnedTensorQuantizer

    plain, ours = quantizer_class(), LearnedTensorQuantizer
    assert plain is not None
    if type(quantizer) is (plain if learned else ours):
        quantizer.__class__ = ours if learned else plain


def _is_active(quantizer: Any) -> bool:
    """Whether a quantizer works, or did until ``set_fake_quant`` paused it: not one that the user switched off."""
    return not quantizer._disabled and (quantizer._if_quant or is_paused(quantizer))


def _refuse_recurrent(model: nn.Module) -> None:
    """Refuse recurrent layers that ModelOpt took, even with their quantizers off: they can be neither copied nor exported.

    Raises:
        UnsupportedQuantizerError: names one.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and hasattr(module, "functionals_to_replace"):
            kind = next(base.__name__ for base in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, base))
            raise UnsupportedQuantizerError(
                f"{name or '(root)'}: what ModelOpt makes of nn.{kind} has no export form and cannot be copied. Leave it in "
                f"floating point: mtq.unregister(torch.nn.{kind}) before mtq.quantize, or prepare with qakd_plugin.prepare."
            )


def _require_exportable_place(quantizer: Quantizer) -> None:
    """Refuse a quantizer within a module, such as ``q_bmm_quantizer``: no export form has its tensor.

    Raises:
        UnsupportedQuantizerError: names it.
    """
    if quantizer.role == "internal":
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: a quantizer within a module has no export form, only those called {', '.join(_ROLES)} have. "
            'Disable it: mtq.set_quantizer_attribute(model, "*' + quantizer.fqn.rpartition(".")[2] + '", {"enable": False}).'
        )


def _require_static_integers(quantizer: Quantizer) -> None:
    """Refuse what has no fixed integer grid.

    Raises:
        UnsupportedQuantizerError: names the quantizer.
    """
    q: Any = quantizer.module
    if isinstance(q.num_bits, tuple) or q._dynamic or (q.block_sizes and q.block_sizes.get("type") == "dynamic"):
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: num_bits={q.num_bits}, block_sizes={q.block_sizes} is not a static integer quantizer. "
            "Use an integer configuration such as mtq.INT8_DEFAULT_CFG or qakd_plugin.prepare(...)."
        )


def _calibrated_amax(quantizer: Quantizer) -> Tensor:
    """The largest magnitudes that a quantizer represents.

    Raises:
        NotPreparedError: it was not calibrated, or an activation's on zeros alone.
    """
    q: Any = quantizer.module
    amax: Tensor | None = (
        q.amax_post if getattr(q, "_lsq", False) else q.amax
    )  # ModelOpt's own LSQ multiplies codes with the second
    if amax is None:
        raise NotPreparedError(
            f"{quantizer.fqn} has no calibrated range (amax). Pass a forward_loop to mtq.quantize that runs several "
            "batches, or prepare the model with qakd_plugin.prepare(model, calibration_batches)."
        )
    amax = amax.detach().float()
    if quantizer.role == "activation" and bool((amax <= _SMALLEST_AMAX).any()):
        raise NotPreparedError(
            f"{quantizer.fqn} saw only zeros during calibration (amax {float(amax.min()):.3g}). "
            f"Calibrate on real batches, or leave it off: mtq.disable_quantizer(model, '{quantizer.fqn}')."
        )
    return amax


def _blocked(quantizer: Quantizer, scale: Tensor) -> tuple[int, int | None, Tensor]:
    """Axis, block and scale of a quantizer with static blocks: ModelOpt keeps one range per block, in a single column.

    A row that one block covers has one scale per output channel, which is how it is stored.

    Raises:
        UnsupportedQuantizerError: blocks of something else than a linear layer's inputs or the columns of an embedding.
    """
    q: Any = quantizer.module
    layer = quantizer.layer
    sizes = {key: size for key, size in q.block_sizes.items() if isinstance(key, int)}
    along_rows = len(sizes) == 1 and sizes.keys() <= {-1, 1}
    if not isinstance(layer, nn.Linear | nn.Embedding) or not along_rows or q.block_sizes.get("scale_bits"):
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: block_sizes={q.block_sizes} has no export form: blocks can be taken along the rows of a linear "
            "layer's or an embedding's weight only, with scales in floating point. Use one scale per channel here (axis=0), or "
            "disable this quantizer."
        )
    (block,) = sizes.values()
    if isinstance(layer, nn.Embedding) and layer.embedding_dim > block and layer.embedding_dim % block:
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: blocks of {block} do not divide the {layer.embedding_dim} columns of this embedding, and what "
            "fills the last one up would be looked up as well. Use blocks that do, or one scale per row (axis=0)."
        )
    scale = scale.reshape(rows_of(layer), -1)
    return (0, None, scale.reshape(-1)) if scale.shape[1] == 1 else (1, int(block), scale)
