"""Reading a graph that ``torch.fx`` traced: what its nodes call, and who reads them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn

TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Modules that return their input in eval mode."""

GRID_KEEPING = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU)
"""Modules whose output lies on the grid that their input lies on."""

_SMOOTH_MODULES = (nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus)
_SMOOTH = {F.silu, F.hardswish, F.gelu, F.mish, F.elu, F.sigmoid, torch.sigmoid, F.hardsigmoid, F.tanh, torch.tanh, F.softplus,
           "silu_", "hardswish_", "mish_", "elu_", "sigmoid", "sigmoid_", "hardsigmoid_", "tanh", "tanh_"}  # fmt: skip
_VIEWS = {torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.chunk, torch.split, torch.squeeze,
          operator.getitem, "view", "reshape", "transpose", "permute", "flatten", "chunk", "split", "contiguous", "squeeze",
          "unsqueeze"}  # fmt: skip
_VIEWING = (nn.Flatten, nn.Unflatten, *TRANSPARENT)
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem}


def called_module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module that a node calls; None where it does something else."""
    return modules.get(str(node.target)) if node.op == "call_module" else None


def called_function(node: fx.Node) -> object:
    """The function a node calls, or the name of a tensor's method; None where it does something else."""
    return node.target if node.op in {"call_function", "call_method"} else None


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the numbers of a tensor: asking for its shape is not reading."""
    return [
        user
        for user in node.users
        if not (user.target is getattr and user.args[1] in {"ndim", "shape", "dtype", "device"})
        and not (user.op == "call_method" and user.target in {"size", "dim", "numel"})
    ]


def leads_to(node: fx.Node, ends: Callable[[fx.Node], bool], passes: Callable[[fx.Node], bool]) -> bool:
    """Whether a node of one kind reads another, straight or through nodes that are passed.

    Args:
        node: where to begin.
        ends: whether a reader is of that kind.
        passes: whether what a reader makes counts as well.
    """
    seen, pending = {node}, [node]
    while pending:
        for reader in pending.pop().users:
            if ends(reader):
                return True
            if reader not in seen and passes(reader):
                seen.add(reader)
                pending.append(reader)
    return False


def only_reader(node: fx.Node) -> fx.Node | None:
    """Who alone reads the numbers of a tensor; None where nobody does, or several."""
    found = readers(node)
    return found[0] if len(found) == 1 else None


def relu_bounds(node: fx.Node, module: nn.Module | None) -> tuple[float, float] | None:
    """What a node lets through if it is some kind of ReLU; ``module`` is the one that it calls, if it calls one."""
    function = called_function(node)
    if isinstance(module, nn.ReLU) or function in {F.relu, torch.relu, "relu", "relu_"}:
        return 0.0, float("inf")
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:
        return 0.0, float(module.max_val)
    return (0.0, 6.0) if function is F.relu6 else None


def is_smooth_activation(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node is an activation function that no grid survives; ``module`` is the one that it calls, if it calls one."""
    return isinstance(module, _SMOOTH_MODULES) or called_function(node) in _SMOOTH


def may_be_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node may return the memory of its first input."""
    return called_function(node) in _VIEWS or isinstance(called_module(node, modules), _VIEWING)


def works_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node writes over its first input."""
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    by_name = name.endswith("_") and not name.endswith("__")  # as PyTorch names them
    function = called_function(node)
    return function is not None and (by_name or function in _IN_PLACE or node.kwargs.get("inplace") is True)


def outermost(nodes: list[fx.Node], layers: set[fx.Node]) -> set[fx.Node]:
    """Layers of a graph that no other layer stands before, or after.

    Args:
        nodes: of the whole graph, in its order.
        layers: some of them.
    """
    after: set[fx.Node] = set()
    for node in nodes:
        if any(source in after or source in layers for source in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in before or user in layers for user in node.users):
            before.add(node)
    return {node for node in layers if node not in after or node not in before}
