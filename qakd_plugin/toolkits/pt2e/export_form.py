"""The export form of a prepared graph: stored weights, explicit quantizers, and BatchNorm folded as PT2E computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..._common.module_copy import carry_hooks
from ...export_form.modules import ActivationQDQ, StoredWeight, store_weight
from ...placement.exported_graph import layer_name
from ..adapter import Adapter
from .graph import (
    BATCH_NORM,
    WEIGHTED,
    Constants,
    activation_name,
    attribute,
    from_inputs,
    is_quantizer,
    join,
    only_user,
    writes,
    written,
)

_aten = torch.ops.aten
_UNIT_TOLERANCE = 1e-6
"""How far from 1 the product of the folded scale and its inverse may lie: float32 rounding leaves about 2e-7."""


class ExportForm:
    """One prepared graph on its way to its export form. The graph belongs to a copy and is consumed."""

    def __init__(self, adapter: Adapter, model: fx.GraphModule) -> None:
        self.model = model
        self.graph = model.graph
        self.quantizers = {quantizer.module: quantizer for quantizer in adapter.quantizers(model)}
        self.qparams = adapter.qparams
        self._drop_inactive()
        # What is written piece by piece is no constant: whoever computes it by its name alone misses the pieces.
        self.dynamic = from_inputs(model, [memory for node in self.graph.nodes if (memory := written(node)) is not None])
        self._constants = Constants(model)
        self._value = self._constants.value
        self.targets: dict[str, Any] = {}
        self.done: set[fx.Node] = set()

    def build(self) -> fx.GraphModule:
        for node in self._pending():
            if node.target in WEIGHTED and node in self.dynamic and node.args[1] not in self.dynamic:
                self._layer(node)
        quantizers = [node for node in self._pending() if node in self.dynamic and is_quantizer(self.model, node)]
        names = [activation_name(self.model, node, "qdq") for node in quantizers]  # which look at the quantizer in front, too
        activations: dict[nn.Module, str] = {}
        for node, name in zip(quantizers, names, strict=True):
            self._activation(node, name, activations)
        constants = [node for node in self._pending() if node not in self.dynamic and node.op not in {"get_attr", "output"}]
        values = [self._read_constant(node) for node in constants]  # of all of them: some read others, which are replaced next
        for node, value in zip(constants, values, strict=True):
            if value is not None:
                node.replace_all_uses_with(self._insert_constant(node, node.name, value))
        self._drop_unused()
        kept: dict[str, str] = {}
        for node in self._pending():
            if node.op in {"get_attr", "call_module"}:
                target = str(node.target)
                if target not in kept:
                    kept[target] = self._add(target, attribute(self.model, target))
                self._retarget(node, kept[target])
        exported_model = fx.GraphModule(self.targets, self.graph, type(self.model).__name__)
        exported_model.graph.lint()
        carry_hooks(self.model, exported_model)
        for name, module in exported_model.named_modules():
            if isinstance(module, ActivationQDQ | StoredWeight):
                module.name = name
        return exported_model.eval()

    def _drop_inactive(self) -> None:
        """Quantizers that the user switched off pass on what they get."""
        for node in list(self.graph.nodes):
            if is_quantizer(self.model, node) and self.model.get_submodule(str(node.target)) not in self.quantizers:
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.graph.erase_node(node)

    def _pending(self) -> list[fx.Node]:
        """Nodes that still speak of the prepared model's attributes, not of the export form's."""
        return [node for node in self.graph.nodes if node not in self.done]

    def _retarget(self, node: fx.Node, name: str) -> None:
        node.target = name
        self.done.add(node)

    def _insert_constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", self._add(name, value.detach().clone()))
        self.done.add(node)
        self._constants.values[node] = value  # others are computed from it, and the model has no such attribute
        return node

    def _layer(self, node: fx.Node) -> None:
        """Store the weight of a convolution or linear layer, and fold the BatchNorm after it into its bias."""
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if weight not in self.done and is_quantizer(self.model, weight):
            quantizer = self.quantizers[self.model.get_submodule(str(weight.target))]
            layer = layer_name(node)
            stored = store_weight(self._value(weight), self.qparams(quantizer), layer or quantizer.fqn)
            self._retarget(weight, self._add(join(layer, "weight"), stored))
            weight.args = ()
        folded = self._folded_bias(node)
        if folded is None:
            return
        end, bias = folded
        folded_bias = self._insert_constant(node, join(layer_name(node), "bias"), bias.float())
        node.args = (*node.args[:2], folded_bias, *node.args[3:])
        end.replace_all_uses_with(node)

    def _folded_bias(self, layer: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """The BatchNorm of ``layer -> / factor [-> + bias] -> BatchNorm`` and the one bias it all comes down to.

        None where it is something else, or where the BatchNorm does not undo the division by ``factor`` (a plain convolution
        with BatchNorm: that is folded into the stored scale later, in the ONNX graph, as every toolkit's is).
        """
        bias = self._value(layer.args[2]).double() if len(layer.args) > 2 and layer.args[2] is not None else 0.0
        end = only_user(layer, _aten.div.Tensor)
        if end is None or not self._is_constant(end.args[1]):
            return None
        factor = self._value(end.args[1]).double().flatten()
        bias = bias / factor
        shifted = only_user(end, _aten.add.Tensor)
        if shifted is not None and self._is_constant(shifted.args[1]) and not shifted.kwargs:
            bias = bias + self._value(shifted.args[1]).double().flatten()
            end = shifted
        norm = only_user(end, BATCH_NORM)
        if norm is None or not all(self._is_constant(argument) for argument in norm.args[1:5]):
            return None
        gamma, beta, mean, variance = (self._value(argument).double() for argument in norm.args[1:5])
        scale = gamma / torch.sqrt(variance + norm.args[7])
        if not bool(((scale / factor - 1).abs() < _UNIT_TOLERANCE).all()):
            return None
        return norm, (bias - mean) * scale + beta

    def _activation(self, node: fx.Node, name: str, made: dict[nn.Module, str]) -> None:
        module = self.model.get_submodule(str(node.target))
        if module not in made:
            quantizer = self.quantizers[module]
            made[module] = self._add(name, ActivationQDQ(self.qparams(quantizer), quantizer.fqn))
        self._retarget(node, made[module])

    def _read_constant(self, node: fx.Node) -> Tensor | None:
        """The tensor that a calculation without inputs of the model makes; None where nothing that has some reads it."""
        if not any(user in self.dynamic or user.op == "output" for user in node.users):
            return None
        value = self._value(node)
        return value if isinstance(value, Tensor) else None

    def _drop_unused(self) -> None:
        """Constants nobody reads any more (among them the counters of BatchNorm), and torch.export's checks of its inputs."""
        for node in reversed(list(self.graph.nodes)):
            unread = not node.users and node.op not in {"placeholder", "output"}
            checks = node.op == "call_module" and node not in self.done
            if unread and (node not in self.dynamic or checks or not writes(node)):
                self.graph.erase_node(node)

    def _is_constant(self, argument: object) -> bool:
        return isinstance(argument, fx.Node) and argument not in self.dynamic

    def _add(self, name: str, target: nn.Module | Tensor) -> str:
        """Register a module or tensor under ``name``, or the next free one like it."""
        free, count = name, 0
        while free in self.targets or hasattr(nn.Module, free):  # torch.export calls constants "to", "half" ...
            count += 1
            free = f"{name}_{count}"
        self.targets[free] = target
        return free
