"""torchao: models prepared by ``quantize_(model, QATConfig(..., step="prepare"))``.

Facts of the toolkit that shape this file: only linear layers (and embeddings) are quantized; a layer keeps its quantizers as
``weight_fake_quantizer`` and ``activation_fake_quantizer``; unless ranges are learned, a quantizer computes its scales from the
weight in every forward pass, and the ``scale`` it leaves behind is neither in the state_dict nor up to date once an optimizer
has moved the weight, so it is computed again here whenever it is asked for; activations are quantized per token with ranges of
the moment, which no target can compute.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .._common.module_copy import move_hooks
from .._common.optional import require
from ..errors import NotPreparedError, QakdError, UnsupportedQuantizerError
from ..export_form.modules import QuantizedLayer, replace_modules, store_weight
from ..placement.placement import Placement, place_quantizers
from ..quantizers import Rule
from ..tasks.inputs import Inputs
from .adapter import Precision, QParams, Quantizer, loaded_class, rows_of, weight_of
from .fake_quantizers import is_paused, rule_of, set_paused
from .frozen_statistics import set_training

_log = logging.getLogger(__name__)
_WEIGHT = "weight_fake_quantizer"
_ADVICE = (
    "Use QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True), step='prepare'), or "
    "qakd_plugin.prepare(model, batches, toolkit='torchao')."
)


class TorchAOQATAdapter:
    """Adapter for ``QATConfig``: weights of linear layers, per channel or in groups; activations stay in floating point."""

    name = "torchao"

    def detect(self, model: nn.Module) -> bool:
        quantizer_class = _quantizer_class("FakeQuantizerBase")
        return quantizer_class is not None and any(isinstance(m, quantizer_class) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        quantizer_class = _quantizer_class("FakeQuantizerBase")
        assert quantizer_class is not None
        found = []
        for fqn, module in model.named_modules():
            if not isinstance(module, quantizer_class) or not _is_active(module):
                continue
            parent, _, name = fqn.rpartition(".")
            if name == _WEIGHT:
                layer = model.get_submodule(parent)
                found.append(Quantizer(fqn, module, "weight", (parent,), layer, weight_of(layer)))
            else:
                found.append(Quantizer(fqn, module, "activation", (parent,)))
        return found

    def wrapper_prefix(self, model: nn.Module) -> str:
        return ""

    def qparams(self, quantizer: Quantizer) -> QParams:
        q: Any = quantizer.module
        if quantizer.role == "activation":
            raise UnsupportedQuantizerError(
                f"{quantizer.fqn}: torchao's activations are quantized with ranges of the moment, and no target has a form for "
                f"them. The model can be trained, but for export leave activations in floating point. {_ADVICE} For 8-bit "
                "activations prepare the model with toolkit='modelopt'."
            )
        if (rule := rule_of(q)) is not None:
            return rule.qparams(q, None if quantizer.layer is None else rows_of(quantizer.layer))
        _require_symmetric_integers(quantizer)
        weight, scale, zero_point = _read(quantizer)
        groups = scale.shape[1]
        per_channel = groups == 1
        low, high = _bounds(q.config.dtype)
        return QParams(
            scale=scale.reshape(-1) if per_channel else scale,
            zero_point=zero_point.reshape(-1) if per_channel else zero_point,
            quant_min=low,
            quant_max=high,
            axis=0 if per_channel else 1,
            block=None if per_channel else weight.shape[1] // groups,
        )

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        for quantizer in self.quantizers(model):
            self.switch(quantizer, enabled)

    def switch(self, quantizer: Quantizer, enabled: bool) -> None:
        q: Any = quantizer.module
        q.enabled = enabled
        set_paused(q, not enabled)

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        """Nothing to do: ranges follow the weight, or are trained like one."""

    def has_frozen_ranges(self, model: nn.Module) -> bool:
        return False

    def set_mode(self, model: nn.Module, training: bool) -> None:
        set_training(model, training)

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        """Pairs of a ``QATConfig`` and the ``filter_fn`` to call ``quantize_`` with."""
        return self._configuration(model, place_quantizers(model, precision.keep), precision)

    def _configuration(self, model: nn.Module, placement: Placement, precision: Precision) -> Any:
        qat = require("torchao.quantization.qat", extra="torchao", purpose="make a QATConfig")
        # Not a subclass: torchao would put its own forward pass in the place of the subclass's, or it is never called at all.
        layers = [name for name in placement.layers if type(model.get_submodule(name)) is nn.Linear]
        if not layers:
            raise QakdError(
                f"{type(model).__name__} holds no linear layer to quantize, and toolkit='torchao' quantizes nothing else. Use "
                "toolkit='modelopt' or 'torch_ao' for convolutions."
            )
        _log.warning(
            "toolkit='torchao' quantizes the weights of %d linear layers; activations stay in floating point whatever "
            "activation_bits says, and so do convolutions.",
            len(layers),
        )
        pairs = []
        for bits in sorted({precision.edges, precision.weight_bits}):
            chosen = {name for name in layers if bits == precision.bits_of_weight(name in placement.edges)}
            config = qat.IntxFakeQuantizeConfig(_dtype(bits), "per_channel", is_symmetric=True)
            pairs.append((qat.QATConfig(weight_config=config, step="prepare"), lambda _, name, chosen=chosen: name in chosen))
        return pairs

    def prepare(self, model: nn.Module, example: Inputs, batches: Iterator[Inputs], precision: Precision) -> nn.Module:
        purpose = "prepare a model with toolkit='torchao'"
        quantize_ = require("torchao.quantization", extra="torchao", purpose=purpose).quantize_
        prepared: nn.Module = copy.deepcopy(model).eval()
        placement = place_quantizers(model, precision.keep, example)
        for config, chosen in self._configuration(model, placement, precision):
            quantize_(prepared, config, chosen)
        return prepared

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        assert quantizer.layer is not None
        shape = (-1, 1) if rule.axis is not None else ()
        made = _learned_class()(rule, clip.reshape(shape), quantizer.layer)
        setattr(quantizer.layer, _WEIGHT, made.train(quantizer.module.training))

    @torch.no_grad()
    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        qat = require("torchao.quantization.qat", extra="torchao", purpose="go back to torchao's quantizers")
        layer, q = quantizer.layer, quantizer.module
        rule = rule_of(q)
        assert rule is not None
        assert isinstance(layer, nn.Linear | nn.Embedding)
        if rule.transforms_weight:
            layer.weight.copy_(q(layer.weight))
        qparams = self.qparams(quantizer)
        columns = 1 if qparams.block is None else qparams.scale.shape[-1]
        scale = qparams.scale.reshape(-1, columns).expand(rows_of(layer), columns)  # torchao has one per channel at least
        config = _learned_config(rule)
        config.dtype = _dtype(max(qparams.quant_max, -qparams.quant_min - 1).bit_length() + 1)
        restored = qat.FakeQuantizerBase.from_config(config)
        restored.scale = nn.Parameter(scale.clone())
        restored.zero_point = torch.zeros_like(restored.scale, dtype=torch.int32)
        setattr(layer, _WEIGHT, restored.train(q.training))

    def learned(self, quantizer: Quantizer) -> Rule | None:
        return rule_of(quantizer.module)

    def export_form(self, model: nn.Module) -> nn.Module:
        copied = copy.deepcopy(model).eval()
        exported: dict[nn.Module, nn.Module] = {}
        for quantizer in self.quantizers(copied):
            self.qparams(quantizer)  # refuses what has no export form
            layer: Any = quantizer.layer
            with torch.no_grad():
                fake_quantized: Tensor = quantizer.module(layer.weight)
            # Read only now: the scales of some learned quantizers follow the weight in the forward pass.
            stored = store_weight(fake_quantized, self.qparams(quantizer), quantizer.fqn.rpartition(".")[0])
            exported[layer] = QuantizedLayer(layer, stored, getattr(layer, "bias", None))  # an embedding has none
            move_hooks(layer, exported[layer])
        # remove_duplicate=False: a layer shared by several names stays shared.
        names = copied.named_modules(remove_duplicate=False)
        replacements = {name: exported[layer] for name, layer in names if layer in exported}
        return replace_modules(copied, replacements)


def _quantizer_class(name: str) -> type[nn.Module] | None:
    """A class of torchao's quantizers, if they are loaded: a model that torchao prepared cannot exist otherwise."""
    return loaded_class("torchao.quantization.qat.fake_quantizer", name)


def _is_active(quantizer: Any) -> bool:
    """Whether a quantizer is on, or was until ``set_fake_quant`` paused it: not one that the user switched off."""
    return getattr(quantizer, "enabled", True) or is_paused(quantizer)


def _learned_config(rule: Rule) -> Any:
    """As whose quantizer torchao's convert should see a learned one: it then takes scales in the place of its own."""
    qat = require("torchao.quantization.qat", extra="torchao", purpose="learn quantizers")
    granularity = {"granularity": "per_channel"} if rule.block is None else {"group_size": rule.block}
    return qat.IntxFakeQuantizeConfig(_dtype(rule.bits), is_dynamic=False, range_learning=True, **granularity)


@cache
def _learned_class() -> Any:
    base: Any = _quantizer_class("FakeQuantizerBase")

    class LearnedFakeQuantizer(base):  # type: ignore[misc]
        """Fake-quantizes a linear layer's weight by a rule whose tensors it holds."""

        def __init__(self, rule: Rule, clip: Tensor, layer: Any) -> None:
            super().__init__()
            self.rule = rule
            self.enabled = True
            self.config = _learned_config(rule)
            self.out_features = rows_of(layer)
            rule.install(self, clip)

        @property
        def scale(self) -> Tensor:
            """What torchao's convert reads: (N, groups)."""
            if self.rule.transforms_weight:
                raise UnsupportedQuantizerError(
                    f"{type(self.rule).__name__} does more to a weight than clip and round, which torchao's convert cannot "
                    "repeat. Call qakd_plugin.restore_quantizers(model) first: it stores the weights as they were quantized."
                )
            columns = self.rule.scale(self).reshape(self.out_features if self.rule.axis is not None else 1, -1)
            return columns.expand(self.out_features, -1)

        @property
        def zero_point(self) -> Tensor:
            return torch.zeros_like(self.scale, dtype=torch.int32)

        def forward(self, w: Tensor) -> Tensor:
            if not self.enabled:
                return w
            rows = w if self.rule.block is None else w.reshape(-1, self.rule.block)
            return self.rule(rows, self).reshape(w.shape)

    return LearnedFakeQuantizer


def _require_symmetric_integers(quantizer: Quantizer) -> None:
    """Refuse, by the layer's name, what has no export form with zero point 0."""
    integer: Any = _quantizer_class("IntxFakeQuantizer")
    q: Any = quantizer.module
    layer = quantizer.fqn.rpartition(".")[0] or "(root)"
    if not isinstance(quantizer.layer, nn.Linear | nn.Embedding):
        raise UnsupportedQuantizerError(
            f"{layer} ({type(quantizer.layer).__name__}): only weights of linear layers and embeddings can be exported. Leave "
            "this layer out with quantize_'s filter_fn."
        )
    if not isinstance(q, integer):
        raise UnsupportedQuantizerError(
            f"{layer}: {type(q).__name__} has no form with integer codes and zero point 0, which every target needs"
            + (" (Int4WeightOnlyConfig shifts its codes by a float)" if type(q).__name__.startswith("Int4") else "")
            + f". {_ADVICE}"
        )
    if type(q.config.granularity).__name__ == "PerToken":
        raise UnsupportedQuantizerError(f"{layer}: its weight is quantized per token. {_ADVICE}")
    if not q.config.is_symmetric:
        raise UnsupportedQuantizerError(
            f"{layer}: its weight is mapped asymmetrically; every target needs zero point 0. {_ADVICE}"
        )


def _read(quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """The weight with scale and zero point (N, groups) that the next forward pass uses.

    A copy of the quantizer computes them: the quantizer's own ones belong to the weight of the last forward pass.
    """
    assert quantizer.layer is not None
    weight = quantizer.layer._parameters["weight"]
    assert weight is not None
    probe: Any = copy.deepcopy(quantizer.module)
    if probe.config.range_learning and probe.scale is None:
        raise NotPreparedError(
            f"{quantizer.fqn} has no range to learn yet. Call torchao.quantization.qat.initialize_fake_quantizers(model, "
            "(batch,)) after quantize_."
        )
    with torch.no_grad():
        probe(weight)
    scale = probe.scale.detach().float().reshape(weight.shape[0], -1)
    return weight, scale, probe.zero_point.detach().to(torch.int32).reshape(scale.shape)


def _bounds(dtype: Any) -> tuple[int, int]:
    """Lowest and highest code of ``torch.int4``, ``torch.uint8``, ..."""
    name = str(dtype).rpartition(".")[2]
    bits = int(name.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _dtype(bits: int) -> Any:
    return getattr(torch, f"int{bits}")
