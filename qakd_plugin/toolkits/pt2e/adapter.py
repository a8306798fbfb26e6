"""torchao PT2E: models prepared by ``torchao.quantization.pt2e.quantize_pt2e.prepare_qat_pt2e``.

Facts of the toolkit that shape this file: the model is a flat graph of ATen operators, in which a quantizer is a
``call_module`` node and a weight quantizer one whose input depends on no model input; ``train()`` and ``eval()`` raise and
``.training`` never changes, the mode being arguments of BatchNorm and dropout nodes; a convolution with BatchNorm computes
``conv(x, fq(w * gamma / sigma)) / (gamma / sigma)`` and normalizes that, always with an eps of 1e-5; the arithmetic is
``round(x * (1 / scale))``.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..._common.module_copy import carry_hooks, copied
from ..._common.optional import require
from ...errors import UnsupportedQuantizerError
from ...placement.exported_graph import layer_name
from ...placement.placement import Placement, place_quantizers
from ...tasks.inputs import Inputs
from ..adapter import Precision, QParams, Quantizer
from ..fake_quantizers import FakeQuantizeAdapter, is_active, require_calibrated, restored_fake_quantize, rule_of, substitute
from ..frozen_statistics import is_frozen
from ..left_out import name_left_out
from .calibration import calibrate
from .capture import (
    exported,
    refuse_grouped_transposes,
    refuse_zero_gammas,
    rename_quantizers,
    restore_momenta,
    unify_batch_norms,
)
from .export_form import ExportForm
from .graph import BATCH_NORM, WEIGHTED, Constants, attribute, from_inputs, is_quantizer, quantizer_class

_aten = torch.ops.aten
_TRAINING_ARGUMENT = {
    BATCH_NORM: 5,
    _aten.dropout.default: 2,
    _aten.dropout_.default: 2,
    _aten.feature_dropout.default: 2,
    _aten.feature_dropout_.default: 2,
    _aten.alpha_dropout.default: 2,
    _aten.alpha_dropout_.default: 2,
    _aten.feature_alpha_dropout.default: 2,
    _aten.feature_alpha_dropout_.default: 2,
}
"""Where the operators that work differently in training are told so."""


class PT2EAdapter(FakeQuantizeAdapter):
    """Adapter for ``prepare_qat_pt2e``."""

    name = "pt2e"

    def quantizer_class(self) -> Any:
        return quantizer_class()

    def detect(self, model: nn.Module) -> bool:
        kind = quantizer_class()
        return kind is not None and isinstance(model, fx.GraphModule) and any(isinstance(m, kind) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        assert isinstance(model, fx.GraphModule)
        dynamic = from_inputs(model)
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in model.graph.nodes:
            if is_quantizer(model, node):
                calls.setdefault(model.get_submodule(node.target), []).append(node)
        found = []
        for fqn, module in model.named_modules():
            if module not in calls or not is_active(module):
                continue
            nodes = calls[module]
            layers = tuple(dict.fromkeys(layer_name(u) for node in nodes for u in node.users if u.target in WEIGHTED))
            if any(node in dynamic for node in nodes):
                found.append(Quantizer(fqn, module, "activation", layers, after=_layer_before(nodes[0], dynamic)))
            else:
                found.append(Quantizer(fqn, module, "weight", layers, weight=_weight_before(model, nodes[0])))
        return found

    def qparams(self, quantizer: Quantizer) -> QParams:
        q: Any = quantizer.module
        if (rule := rule_of(q)) is not None:
            return rule.qparams(q)
        observer = getattr(q, "activation_post_process", None)
        if not isinstance(getattr(q, "scale", None), Tensor) or observer is None or getattr(q, "is_dynamic", False):
            raise UnsupportedQuantizerError(
                f"{quantizer.fqn}: {type(q).__name__} is not a static integer quantizer. Use FakeQuantize with an observer, "
                "or qakd_plugin.prepare(model, calibration_batches, toolkit='pt2e')."
            )
        require_calibrated(quantizer, self.name)
        # Ranges that are learned have a zero point in floating point, and no flag for channels.
        scale, zero_point = q.scale.detach().float(), q.zero_point.detach().round().to(torch.int32)
        per_channel = q.qscheme in {torch.per_channel_symmetric, torch.per_channel_affine}
        shape = (-1,) if per_channel else ()
        return QParams(
            scale=scale.reshape(shape),
            zero_point=zero_point.reshape(shape),
            quant_min=int(observer.quant_min),
            quant_max=int(observer.quant_max),
            axis=int(q.ch_axis) if per_channel else None,
        )

    def set_mode(self, model: nn.Module, training: bool) -> None:
        """Tell every BatchNorm and dropout of the graph.

        torchao's own ``move_exported_model_to_train`` and ``..._to_eval`` rewrite the graph by pattern matching, which takes
        0.4 s and gives each BatchNorm a momentum of 0.1. Changing the one argument keeps everything else as it is, and the
        graph itself is the only record of its mode. The flags are set for whoever reads them.
        """
        assert isinstance(model, fx.GraphModule)
        changed = False
        for node in model.graph.nodes:
            index = _TRAINING_ARGUMENT.get(node.target)
            has_statistics = node.target is not BATCH_NORM or node.args[3] is not None
            wanted = training and not (node.target is BATCH_NORM and is_frozen(*_parameters(model, node)))
            if index is not None and has_statistics and node.args[index] is not wanted:
                node.update_arg(index, wanted)
                changed = True
        if changed:
            model.recompile()
        for module in model.modules():
            module.training = training
        setattr(model, "_exported_training", training)  # noqa: B010 - what torchao's two functions look at first

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        return _configuration(_placement(model, precision), precision)

    def prepare(self, model: nn.Module, example: Inputs, batches: Iterator[Inputs], precision: Precision) -> nn.Module:
        pt2e = require(
            "torchao.quantization.pt2e.quantize_pt2e", extra="torchao", purpose="prepare a model with toolkit='pt2e'"
        )
        placement = _placement(model, precision, example)
        quantizer = _configuration(placement, precision)
        network = copy.deepcopy(model).eval()
        unify_batch_norms(network)
        graph = exported(network, example)
        refuse_zero_gammas(graph)
        refuse_grouped_transposes(graph)
        prepared: fx.GraphModule = pt2e.prepare_qat_pt2e(graph, quantizer)
        if isinstance(model, fx.GraphModule):  # of which torch.export reads the graph alone
            carry_hooks(model, prepared)
        restore_momenta(prepared, network)
        rename_quantizers(prepared)
        self.set_mode(prepared, False)
        calibrate(self, prepared, batches)
        name_left_out(self, prepared, placement)
        return prepared

    @torch.no_grad()
    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        learned: Any = quantizer.module
        if learned.rule.transforms_weight:
            assert isinstance(model, fx.GraphModule)
            assert quantizer.weight is not None
            _bake_weight(model, learned, learned(quantizer.weight()))
        toolkit: Any = sys.modules["torchao.quantization.pt2e.fake_quantize"]
        substitute(model, learned, restored_fake_quantize(learned, toolkit.FakeQuantize, toolkit.FixedQParamsObserver))

    def export_form(self, model: nn.Module) -> nn.Module:
        graph = copied(model)
        assert isinstance(graph, fx.GraphModule)
        self.set_mode(graph, False)
        self.freeze_ranges(graph, True)
        with torch.no_grad():
            return ExportForm(self, graph).build()


def _layer_before(quantizer: fx.Node, dynamic: set[fx.Node]) -> str:
    """Dotted name of the nearest layer that a quantized value comes from; empty where it is an input's."""
    pending = deque(quantizer.all_input_nodes)
    while pending:
        node = pending.popleft()
        if node.target in WEIGHTED:
            return layer_name(node)
        pending += [source for source in node.all_input_nodes if source in dynamic]
    return ""


def _parameters(model: fx.GraphModule, batch_norm: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """Gamma and beta of a BatchNorm."""
    found = []
    for argument in batch_norm.args[1:3]:
        is_stored = isinstance(argument, fx.Node) and argument.op == "get_attr"
        found.append(attribute(model, str(argument.target)) if is_stored else None)  # type: ignore[union-attr]
    return found[0], found[1]


def _placement(model: nn.Module, precision: Precision, example: Inputs | None = None) -> Placement:
    return place_quantizers(
        model,
        precision.keep,
        example,
        before_activations=precision.before_activations,
        before_sums=precision.before_sums,
    )


def _configuration(placement: Placement, precision: Precision) -> Any:
    """The Quantizer for ``prepare_qat_pt2e``."""
    require("torchao.quantization.pt2e.quantize_pt2e", extra="torchao", purpose="make a quantizer for prepare_qat_pt2e")
    from .quantizer import SymmetricQuantizer

    return SymmetricQuantizer(
        placement,
        precision.weight_bits,
        precision.activation_bits,
        edges=precision.edges,
        unsigned_bytes=precision.unsigned_bytes,
        share_grids=precision.placement > 1,
    )


def _weight_before(model: fx.GraphModule, quantizer: fx.Node) -> Callable[[], Tensor]:
    """Reads the weight in front of a quantizer, whenever it is called."""

    def weight() -> Tensor:
        with torch.no_grad():
            value: Tensor = Constants(model).value(quantizer.args[0])
        return value.detach()

    return weight


def _bake_weight(model: fx.GraphModule, quantizer: nn.Module, quantized: Tensor) -> None:
    """Replace a weight by its quantized value, so that the toolkit's own quantizer finds it on the grid."""
    for node in model.graph.nodes:
        if node.op != "call_module" or model.get_submodule(str(node.target)) is not quantizer:
            continue
        source, factor = node.args[0], None
        if source.target is _aten.mul.Tensor:  # gamma / sigma of a BatchNorm
            factor = Constants(model).value(source.args[1])
            source = source.args[0]
        if source.op != "get_attr":
            raise UnsupportedQuantizerError(
                f"{node.target}: this weight is computed from others (a parametrization), and {type(quantizer).__name__} would "
                "leave its quantized values in it. Export the model with its learned quantizers, or before prepare call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
            )
        attribute(model, str(source.target)).copy_(quantized if factor is None else quantized / factor)
        return
