"""NVIDIA ModelOpt: models prepared by ``modelopt.torch.quantization.quantize``.

Facts of the toolkit that shape this file: a quantizer is a ``TensorQuantizer`` child named ``weight_quantizer``,
``input_quantizer`` or ``output_quantizer``; its range is the fixed buffer ``_amax``, its arithmetic
``round(x * (maxbound / amax)) / (maxbound / amax)``; BatchNorm is never fused.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._common.optional import require
from ...errors import NotPreparedError, UnsupportedQuantizerError
from ...export_form.modules import ActivationQDQ, QuantizedLayer, QuantizedModule, replace_modules, store_weight
from ...placement.attention import open_attention
from ...placement.calibration import best_weight_clip, observe_inputs
from ...placement.placement import WEIGHTED, OutputQuantizer, Placement, has_own_forward, never_called, place_quantizers
from ...quantizers import Rule, remove_tensors, rule_from_dict
from ..adapter import Precision, QParams, Quantizer, Role, require_no_negative, weight_of

_log = logging.getLogger(__name__)
_SMALLEST_AMAX = 2.0**-24
"""ModelOpt maps everything to zero where amax is not above this."""

_PAUSED = "_qakd_paused"
"""Attribute of quantizers that ``set_fake_quant`` switched off."""

BACKEND = "qakd"
"""Under which ModelOpt finds learned quantizers."""


class ModelOptAdapter:
    """Adapter for ``mtq.quantize``."""

    name = "modelopt"

    def detect(self, model: nn.Module) -> bool:
        quantizer_class = _quantizer_class()
        return quantizer_class is not None and any(isinstance(m, quantizer_class) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        quantizer_class = _quantizer_class()
        assert quantizer_class is not None
        found = []
        idle = never_called(model)
        for fqn, module in model.named_modules():
            if not isinstance(module, quantizer_class) or not _is_active(module) or fqn in idle:
                continue
            name = fqn.rpartition(".")[0]
            layers = () if fqn.endswith("output_quantizer") else (name,)
            if _role(fqn) == "weight":
                layer = model.get_submodule(name)
                found.append(Quantizer(fqn, module, "weight", layers, layer, weight_of(layer)))
            else:
                found.append(Quantizer(fqn, module, "activation", layers))
        return found

    def qparams(self, quantizer: Quantizer) -> QParams:
        q: Any = quantizer.module
        if (rule := self.learned(quantizer)) is not None:
            return rule.qparams(q, getattr(quantizer.layer, "out_features", None))
        if isinstance(q.num_bits, tuple) or q._dynamic or (q.block_sizes and q.block_sizes.get("type") == "dynamic"):
            raise UnsupportedQuantizerError(
                f"{quantizer.fqn}: num_bits={q.num_bits}, block_sizes={q.block_sizes} is not a static integer quantizer. "
                "Use an integer configuration such as mtq.INT8_DEFAULT_CFG or qakd_plugin.prepare(...)."
            )
        amax = q.amax_post if getattr(q, "_lsq", False) else q.amax  # ModelOpt's own LSQ multiplies codes with the second one
        if amax is None:
            raise NotPreparedError(
                f"{quantizer.fqn} has no calibrated range (amax). Pass a forward_loop to mtq.quantize that runs several "
                "batches, or prepare the model with qakd_plugin.prepare(model, calibration_batches)."
            )
        amax = amax.detach().float()
        dead = amax <= _SMALLEST_AMAX
        if quantizer.role == "activation" and bool(dead.any()):
            raise NotPreparedError(
                f"{quantizer.fqn} saw only zeros during calibration (amax {float(amax.min()):.3g}). "
                "Calibrate on real batches, or exclude this layer from quantization."
            )
        maxbound = float(q.maxbound)
        # A weight channel of zeros has no range; its codes are zero whatever the scale is.
        scale = torch.where(dead, torch.ones_like(amax), 1.0 / (maxbound / amax))
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
            q: Any = quantizer.module
            if enabled:
                q.enable_quant()
                q.__dict__.pop(_PAUSED, None)  # ModelOpt saves whatever attributes a quantizer has
            else:
                q.disable_quant()
                setattr(q, _PAUSED, True)

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        """Nothing to do: ModelOpt's ranges change only when they are calibrated."""

    def set_mode(self, model: nn.Module, training: bool) -> None:
        model.train(training)

    def configuration(self, model: nn.Module, precision: Precision) -> dict[str, Any]:
        return modelopt_config(place_quantizers(model, precision.keep), precision)

    def prepare(self, model: nn.Module, batches: Sequence[Tensor], precision: Precision) -> nn.Module:
        mtq = require("modelopt.torch.quantization", extra="modelopt", purpose="prepare a model with toolkit='modelopt'")
        placement = place_quantizers(model, precision.keep)
        config = modelopt_config(placement, precision)
        prepared: nn.Module = copy.deepcopy(model).eval()

        def forward_loop(network: nn.Module) -> None:
            with torch.no_grad():
                for batch in batches:
                    network(batch)

        names = [*placement.layers, *(output.name for output in placement.outputs)]
        # mtq prints how many quantizers it inserted.
        with contextlib.redirect_stdout(io.StringIO()), _registered(prepared, names):
            prepared = mtq.quantize(prepared, config, forward_loop)
        _minimize_error(prepared, batches, placement)
        return prepared

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        q: Any = quantizer.module
        remove_tensors(q)
        if rule.axis is not None:
            assert quantizer.weight is not None
            clip = clip.reshape([-1 if dim == rule.axis else 1 for dim in range(quantizer.weight().ndim)])
        rule.install(q, clip)
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
        form = copy.deepcopy(model).eval()
        active = {q.fqn: q for q in self.quantizers(form)}
        parents = {fqn.rpartition(".")[0] for fqn in active}
        replacements = {name: self._exported(form.get_submodule(name), name, active) for name in sorted(parents)}
        idle: dict[str, Any] = {name: form.get_submodule(name) for name in sorted(never_called(form))}
        for name, module in idle.items():
            if hasattr(module, "weight_quantizer"):
                if not module.weight_quantizer._disabled:
                    _log.warning(
                        "%s: nn.MultiheadAttention reads its weight without calling it, so its quantizers never act: it is "
                        "exported in floating point. Quantize qakd_plugin.placement.attention.open_attention(model) instead.",
                        name,
                    )
                replacements[name] = _plain(module)
        return replace_modules(form, replacements)

    def _exported(self, module: Any, name: str, active: dict[str, Quantizer]) -> nn.Module:
        """``module`` with its quantizers made explicit."""

        def activation(which: str) -> ActivationQDQ | None:
            quantizer = active.get(f"{name}.{which}" if name else which)
            return None if quantizer is None else ActivationQDQ(self.qparams(quantizer), quantizer.fqn)

        input_qdq, output_qdq = activation("input_quantizer"), activation("output_quantizer")
        weight = active.get(f"{name}.weight_quantizer" if name else "weight_quantizer")
        stored = None
        if weight is not None:
            with torch.no_grad():
                fake_quantized: Tensor = weight.module(module._parameters["weight"])
            qparams = self.qparams(weight)
            if qparams.block is not None:  # ModelOpt fills the last block of a row up with zeros, and so does the export form
                fake_quantized = F.pad(fake_quantized, (0, -fake_quantized.shape[1] % qparams.block))
            stored = store_weight(fake_quantized, qparams, name)
        # AWQ and SmoothQuant leave a factor in the input's quantizer, which multiplies even when that is disabled.
        factor = getattr(getattr(module, "input_quantizer", None), "pre_quant_scale", None)
        plain = _plain(module)
        if stored is None:
            return QuantizedModule(plain, input_qdq, output_qdq)
        bias = plain.bias
        assert bias is None or isinstance(bias, Tensor)
        return QuantizedLayer(
            plain,
            stored,
            bias,
            own_forward=has_own_forward(plain),
            input_qdq=input_qdq,
            output_qdq=output_qdq,
            input_factor=factor,
        )


def modelopt_config(placement: Placement, precision: Precision) -> dict[str, Any]:
    """The configuration for ``mtq.quantize`` that :func:`qakd_plugin.prepare` uses.

    Quantizers behind a convolution are signed, whatever is wanted: they stand in front of the ReLU, and ModelOpt's unsigned
    ones refuse negative values.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]

    def enable(name: str, **attributes: Any) -> None:
        entries.append({"quantizer_name": name, "cfg": attributes, "enable": True})

    for layer in placement.layers:
        edge = layer in placement.edges
        bits = 8 if edge else precision.weight_bits
        enable(f"{layer}.weight_quantizer", num_bits=bits, axis=0, narrow_range=bits == 8)
        bits = 8 if edge else precision.activation_bits
        if bits < 8 or layer not in placement.covered:
            enable(
                f"{layer}.input_quantizer",
                num_bits=bits,
                axis=None,
                unsigned=precision.is_unsigned(bits, layer in placement.unsigned),
            )
    for output in placement.outputs:
        enable(_output_name(output), num_bits=8, axis=None)
    return {"quant_cfg": entries, "algorithm": "max"}


@torch.no_grad()
def _minimize_error(model: nn.Module, batches: Iterable[Tensor], placement: Placement) -> None:
    """Replace the ranges of max calibration by those with the least squared error over all batches."""
    adapter = ModelOptAdapter()
    clamps = {_output_name(output): output.clamp for output in placement.outputs}
    quantizers = adapter.quantizers(model)
    adapter.set_fake_quant(model, False)
    watched = {quantizer.fqn: quantizer.module for quantizer in quantizers if quantizer.role == "activation"}
    observers = observe_inputs(model, watched, batches, clamps)
    adapter.set_fake_quant(model, True)
    for quantizer in quantizers:
        q: Any = quantizer.module
        if quantizer.fqn in observers:
            if q.unsigned:
                require_no_negative(quantizer.fqn, observers[quantizer.fqn].minimum)
            q.amax = torch.full_like(q.amax, observers[quantizer.fqn].best_clip(int(q.maxbound)))
            continue
        qparams = adapter.qparams(quantizer)
        weight = model.get_submodule(quantizer.fqn.rpartition(".")[0])._parameters["weight"]
        assert weight is not None
        q.amax = best_weight_clip(weight, qparams.quant_min, qparams.quant_max, qparams.axis).reshape(q.amax.shape)


def restore_modelopt(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Put what ``modelopt.torch.opt.save`` wrote of a model from :func:`qakd_plugin.prepare` back into its float model.

    ``modelopt.torch.opt.restore`` does the same where the model holds neither ``nn.MultiheadAttention`` nor layers of classes
    that are not PyTorch's own; it knows nothing of those.

    Args:
        model: the float model; it is not changed.
        path: of the file.

    Returns:
        A prepared copy.
    """
    mto = require("modelopt.torch.opt", extra="modelopt", purpose="restore a model that it saved")
    utils = require("modelopt.torch.utils", extra="modelopt", purpose="restore a model that it saved")
    copied = copy.deepcopy(open_attention(model))
    saved = utils.safe_load(path, map_location="cpu")["model_state_dict"]
    names = {key.rpartition("_quantizer.")[0].rpartition(".")[0] for key in saved if "_quantizer." in key}
    with contextlib.redirect_stdout(io.StringIO()), _registered(copied, sorted(names - {""})):
        restored: nn.Module = mto.restore(copied, path)
    return restored.eval()


def _output_name(output: OutputQuantizer) -> str:
    return f"{output.name}.{'input' if output.in_front else 'output'}_quantizer"


@contextlib.contextmanager
def _registered(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within the block ModelOpt takes the classes of all modules of these names.

    By itself it leaves classes out that override the forward of PyTorch's layers, and activations. Only within the block: what
    the user's own calls of ``mtq.quantize`` choose must not depend on whether this package ran before.
    """
    toolkit = require("modelopt.torch.quantization.nn", extra="modelopt", purpose="quantize a model")
    registry, base = toolkit.QuantModuleRegistry, toolkit.QuantInputBase
    added: list[type[nn.Module]] = []
    try:
        for name in names:
            kind = type(model.get_submodule(name))
            if kind not in registry:
                parent = next((cls for cls in kind.__mro__ if issubclass(cls, WEIGHTED) and cls in registry), None)
                registry.register({kind: f"{kind.__module__}.{kind.__qualname__}"})(registry[parent] if parent else base)
                added.append(kind)
        yield
    finally:
        for kind in added:
            registry.unregister(kind)


def _quantizer_class() -> type[nn.Module] | None:
    """ModelOpt's TensorQuantizer, if ModelOpt is loaded: a model it prepared cannot exist otherwise."""
    module: Any = sys.modules.get("modelopt.torch.quantization.nn.modules.tensor_quantizer")
    if module is None:
        return None
    if not module.is_registered_quant_backend(BACKEND):
        # From here on ModelOpt can run, save and restore quantizers that were swapped.
        module.register_quant_backend(BACKEND, run_rule)
    quantizer_class: type[nn.Module] = module.TensorQuantizer
    return quantizer_class


def run_rule(inputs: Tensor, quantizer: Any) -> Tensor:
    """What ModelOpt calls in the place of its own arithmetic."""
    return rule_from_dict(quantizer.backend_extra_args)(inputs, quantizer)


def _set_learned(quantizer: nn.Module, learned: bool) -> None:
    """Give a quantizer the class that fits, as ModelOpt itself turns one kind of quantizer into another."""
    from .quantizer import LearnedTensorQuantizer

    plain, ours = _quantizer_class(), LearnedTensorQuantizer
    assert plain is not None
    if type(quantizer) is (plain if learned else ours):
        quantizer.__class__ = ours if learned else plain


def _is_active(quantizer: Any) -> bool:
    """Whether a quantizer works, or did until ``set_fake_quant`` paused it: not one that the user switched off."""
    return not quantizer._disabled and (quantizer._if_quant or hasattr(quantizer, _PAUSED))


def _role(fqn: str) -> Role:
    return "weight" if "weight_quantizer" in fqn.split(".")[-2:] or fqn.endswith("weight_quantizer") else "activation"


def _blocked(quantizer: Quantizer, scale: Tensor) -> tuple[int, int | None, Tensor]:
    """Axis, block and scale of a quantizer with static blocks: ModelOpt keeps one range per block, in a single column.

    A row that one block covers has one scale per output channel, which is how it is stored.

    Raises:
        UnsupportedQuantizerError: blocks of something else than a linear layer's inputs.
    """
    q: Any = quantizer.module
    layer = quantizer.layer
    sizes = {key: size for key, size in q.block_sizes.items() if isinstance(key, int)}
    if not isinstance(layer, nn.Linear) or len(sizes) != 1 or not sizes.keys() <= {-1, 1} or q.block_sizes.get("scale_bits"):
        raise UnsupportedQuantizerError(
            f"{quantizer.fqn}: block_sizes={q.block_sizes} has no export form: blocks can be taken along the inputs of a "
            "linear layer's weight only, with scales in floating point. Use one scale per channel here (axis=0), or disable "
            "this quantizer."
        )
    (block,) = sizes.values()
    scale = scale.reshape(layer.out_features, -1)
    return (0, None, scale.reshape(-1)) if scale.shape[1] == 1 else (1, int(block), scale)


def _plain(module: Any) -> nn.Module:
    """The user's own float module, without ModelOpt's dynamic class. ``module`` belongs to a copy and is consumed."""
    plain: nn.Module = module.export() if hasattr(module, "export") else module
    return plain
