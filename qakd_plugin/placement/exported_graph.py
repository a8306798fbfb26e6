"""The graph of a network that ``torch.fx`` cannot trace, as ``torch.export`` sees it on example inputs.

``torch.export`` captures ATen operators and notes for each the modules it ran in. :func:`exported_layer_graph` puts the
operators of one call of a module of PyTorch together again, so that the graph reads as one that ``torch.fx`` traced, and one
analysis serves both.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._common.silenced import silenced
from ..errors import QakdError
from ..tasks.inputs import Inputs, arguments, runs_on_one_sample
from .attention_products import AttentionProducts
from .folded_batch_norm import is_frozen_batch_norm
from .layer_names import WEIGHTED
from .sums import RESULT_OF

_aten = torch.ops.aten
_FUNCTIONS = {
    _aten.upsample_nearest1d.vec: F.interpolate,
    _aten.upsample_nearest2d.vec: F.interpolate,
    _aten.upsample_nearest3d.vec: F.interpolate,
    _aten.upsample_bilinear2d.vec: F.interpolate,
    _aten.dropout.default: F.dropout,
}
"""Operators whose function in Python has another name, or another way to be told that it only passes its input on."""


def layer_name(node: fx.Node) -> str:
    """Dotted name of the module of the float model that a node of the exported graph belongs to; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return _path(list(stack.values())[-1]) if stack else ""


def exported_layer_graph(model: nn.Module, inputs: Inputs) -> fx.Graph:
    """A model in eval mode as a graph of calls of PyTorch's modules, and of functions between them.

    Args:
        model: the float model; it is not changed.
        inputs: a batch of it. What depends on shapes is settled by theirs.

    Raises:
        Exception: whatever ``torch.export`` or the model's own code raises.
    """
    args, kwargs = arguments(inputs)
    copied = copy.deepcopy(model).eval()  # tensors that a network keeps, such as anchors, would be left without values
    unfit = _unfit(copied)
    graph = exported(copied, args, kwargs).graph
    return _Translation(copied, unfit).graph(graph)


def _unfit(model: nn.Module) -> set[str]:
    """Names of modules that take or return something else than a tensor; complete once the model has run."""
    unfit: set[str] = set()
    for name, module in model.named_modules():

        def note(_: nn.Module, args: tuple[Any, ...], result: Any, name: str = name) -> None:
            if not (args and isinstance(args[0], torch.Tensor) and isinstance(result, torch.Tensor)):
                unfit.add(name)

        module.register_forward_hook(note)
    return unfit


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any = None) -> fx.GraphModule:
    """What ``torch.export`` captures of a model in its present mode.

    Where ``shapes`` are refused, it is tried again after a call with one sample, for what the model keeps of its last one.

    Args:
        model: called with ``args`` and ``kwargs``.
        args: positional.
        kwargs: by name.
        shapes: ``dynamic_shapes`` of ``torch.export.export``.

    Raises:
        QakdError: a module's name cannot be told from what ``torch.export`` writes around it.
        Exception: whatever ``torch.export`` or the model's own code raises.
    """
    _require_names(model)
    try:
        return _captured(model, args, kwargs, shapes)
    except Exception:
        if shapes is None or not runs_on_one_sample(model, args, kwargs):
            raise
    return _captured(model, args, kwargs, shapes)


def _require_names(model: nn.Module) -> None:
    """torch counts a module's calls as "name@1", and writes names between double quotes into the code of its graphs."""
    for name, _ in model.named_modules():
        if any(letter in '@"\\' for letter in name):
            raise QakdError(f"the module {name!r} has @, a double quote or a backslash in its name: give it another.")


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> fx.GraphModule:
    # On failure torch.export prints the whole graph so far.
    with silenced("torch.export._trace"), torch.enable_grad(), _without_fast_path():
        graph = torch.export.export(model, args, kwargs, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention as separate operators, not as the one that only inference knows."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _path(entry: Any) -> str:
    """Dotted name of the module of an entry of ``nn_module_stack``; repeated calls are told apart by "@1", "@2", ..."""
    return str(entry[0]).partition("@")[0].removeprefix("L['self']").removeprefix(".")


class _Translation:
    """From operators to calls."""

    def __init__(self, model: nn.Module, unfit: Set[str]) -> None:
        self._unfit = unfit
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._names = {module: name for name, module in model.named_modules()}  # of shared ones, the first
        self._new = fx.Graph()
        self._made: dict[fx.Node, fx.Node | None] = {}  # None: a number or a parameter, not a tensor that is computed
        self._calls: dict[str, fx.Node] = {}

    def graph(self, exported: fx.Graph) -> fx.Graph:
        """The translation of a whole graph."""
        for node in exported.nodes:
            self._made[node] = self._translated(node)
        for node, made in self._made.items():
            if made is not None and "nn_module_stack" not in made.meta:
                made.meta["nn_module_stack"] = self._stack(node)
        self._note_results()
        return self._new

    def _stack(self, node: fx.Node) -> dict[str, tuple[str, Any]]:
        """The calls that a node belongs to, as ``torch.fx`` notes them, but under the first name of a shared module."""
        stack = node.meta.get("nn_module_stack") or {}
        found = {key: (self._modules.get(_path(entry)), entry[1]) for key, entry in stack.items()}
        return {key: (self._names[module], kind) for key, (module, kind) in found.items() if module is not None}

    def _note_results(self) -> None:
        """Which node each module returns: the only one that is read outside of it."""
        inside: dict[str, dict[str, set[fx.Node]]] = {}
        for node in self._new.nodes:
            for key, (name, _) in node.meta.get("nn_module_stack", {}).items():
                inside.setdefault(name, {}).setdefault(key, set()).add(node)
        for name, calls in sorted(inside.items(), key=lambda item: -item[0].count(".")):  # innermost first
            nodes = next(iter(calls.values()))
            read_outside = [node for node in nodes if not nodes.issuperset(node.users)]
            if name and name not in self._unfit and len(calls) == 1 and len(read_outside) == 1:
                read_outside[0].meta.setdefault(RESULT_OF, []).append(name)

    def _translated(self, node: fx.Node) -> fx.Node | None:
        if node.op == "placeholder":
            return self._new.placeholder(node.name)
        if node.op == "output":
            returned: fx.Node = self._new.output(self._argument(node.args[0]))
            return returned
        if node.op != "call_function" or not _is_computed(node):
            return None
        call = self._leaf(node)
        if call is None:
            return self._function(node)
        key, name = call
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = self._new.call_module(name)
        sources = [made for source in node.all_input_nodes if (made := self._made[source]) not in (None, found)]
        found.args = tuple(dict.fromkeys([*found.args, *sources]))
        return found

    def _leaf(self, node: fx.Node) -> tuple[str, str] | None:
        """Which call of which module of PyTorch a node belongs to: the call's key, and the module's name."""
        for key, entry in (node.meta.get("nn_module_stack") or {}).items():
            module = self._modules.get(_path(entry))
            if module is not None and _is_leaf(module):
                return key, self._names[module]
        return None

    def _function(self, node: fx.Node) -> fx.Node:
        args, kwargs = self._argument(node.args), self._argument(node.kwargs)
        target = _function_of(node)
        if isinstance(target, str):
            return self._new.call_method(target, args, kwargs)
        return self._new.call_function(target, args, kwargs)

    def _argument(self, value: Any) -> Any:
        return fx.map_arg(value, lambda node: self._made[node])


def _is_computed(node: fx.Node) -> bool:
    """Whether a node computes tensors, and not a shape, or nothing, as assertions do."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, Sequence) and any(isinstance(item, torch.Tensor) for item in value)
    )


def _is_leaf(module: nn.Module) -> bool:
    """As ``torch.fx`` has it, but for modules of PyTorch that call layers, which are looked into."""
    if isinstance(module, (*WEIGHTED, nn.MultiheadAttention, AttentionProducts)) or is_frozen_batch_norm(module):
        return True
    return type(module).__module__.startswith("torch.nn") and next(module.children(), None) is None


def _function_of(node: fx.Node) -> Any:
    """What a network calls to get an ATen operator: a function, or a method's name where the operator works in place."""
    if node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target]
    if _returns_view(node):
        return operator.getitem  # the same numbers, in the same memory
    overload: Any = node.target
    name = str(getattr(overload, "_opname", getattr(overload, "__name__", overload)))
    if name.endswith("_"):
        return name
    return getattr(F, name, None) or getattr(torch, name, None) or name


def _returns_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or (
        schema is not None and any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    )
