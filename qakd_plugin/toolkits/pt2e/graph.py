"""Reading a graph of ATen operators that ``torch.export`` captured and ``prepare_qat_pt2e`` put quantizers into."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from ...placement.exported_graph import layer_name
from ..adapter import loaded_class

_aten = torch.ops.aten
CONVOLUTIONS = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv1d.padding,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv3d.default,
        _aten.conv3d.padding,
    }
)
TRANSPOSED = frozenset({_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input})
WEIGHTED = CONVOLUTIONS | TRANSPOSED | {_aten.linear.default}
BATCH_NORM = _aten.batch_norm.default
RELUS = {
    _aten.relu.default,
    _aten.relu_.default,
    _aten.relu6.default,
    _aten.relu6_.default,
    _aten.hardtanh.default,
    _aten.hardtanh_.default,
}
ADDS = {_aten.add.Tensor, _aten.add_.Tensor}
_RETURNS_INPUT = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
"""Return their input itself in eval mode, which their schemas do not say."""


def quantizer_class() -> type[nn.Module] | None:
    """torchao's FakeQuantizeBase, if it is loaded."""
    return loaded_class("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase")


def is_quantizer(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a fake-quantizer."""
    kind = quantizer_class()
    return node.op == "call_module" and kind is not None and isinstance(model.get_submodule(str(node.target)), kind)


def from_inputs(model: fx.GraphModule, also: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes whose value depends on an input of the model, or on chance: what is written into memory counts for its readers.

    Args:
        model: a graph.
        also: nodes that count as inputs, too.
    """
    dynamic: set[fx.Node] = set(also)
    known = -1
    while known < len(dynamic):
        known = len(dynamic)
        for node in model.graph.nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if node.op == "placeholder" or random or any(source in dynamic for source in node.all_input_nodes):
                dynamic.add(node)
                if (memory := written(node)) is not None:
                    dynamic.add(memory)
    return dynamic


def written(node: fx.Node) -> fx.Node | None:
    """The node that made the memory a node writes to; None where it writes nothing, or to what a model keeps."""
    if not writes(node):
        return None
    memory = node.args[0]
    while isinstance(memory, fx.Node) and may_be_view(memory):
        memory = memory.args[0]
    return memory if isinstance(memory, fx.Node) and memory.op == "call_function" else None


def activation_name(model: fx.GraphModule, node: fx.Node, what: str) -> str:
    """``<layer>.input_<what>`` for a quantizer one layer alone reads, else ``<module>.output_<what>`` of what is before it."""
    readers = {layer_name(user) for user in node.users if user.target in WEIGHTED}
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if len(readers) == 1 and len(node.users) == 1:
        return join(next(iter(readers)), f"input_{what}")
    while is_quantizer(model, source):
        source = source.all_input_nodes[0]
    return f"input_{what}" if source.op == "placeholder" else join(layer_name(source), f"output_{what}")


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the numbers of a tensor: asking for its shape is not reading."""
    return [user for user in node.users if user.target is not _aten.sym_size.int]


def only_user(node: fx.Node, target: object) -> fx.Node | None:
    """The single node that reads ``node``, if it applies ``target`` to it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target and users[0].args[0] is node else None


def writes(node: fx.Node) -> bool:
    """Whether a node changes one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def may_be_view(node: fx.Node) -> bool:
    """Whether a node may return the memory of its first input."""
    if node.target is operator.getitem or node.target in _RETURNS_INPUT:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(
        value.alias_info is not None and not value.alias_info.is_write for value in schema.returns
    )


class Constants:
    """What the nodes of a graph compute that depend on no input of the model."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model
        self.values: dict[fx.Node, Any] = {}

    def value(self, argument: Any) -> Any:
        """Of a node; anything else is what it is."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self.values:
            self.values[argument] = self._compute(argument)
        return self.values[argument]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return attribute(self.model, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def attribute(model: nn.Module, target: str) -> Any:
    parent, _, name = target.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def is_tensor(node: fx.Node) -> bool:
    """Whether a node computes a tensor, and not a number or a shape."""
    return isinstance(node.meta.get("val"), torch.Tensor)
