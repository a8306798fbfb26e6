"""Which tensors of a graph cannot be negative, whatever its inputs.

An unsigned grid has twice the levels for them. One propagation serves every kind of graph; what is particular to one are the
operators that it knows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Set

import torch
import torch.nn.functional as F
from torch import fx, nn

from .fx_graph import called_function, called_module, may_be_view, works_in_place

_MAKES_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus)
_MAKES = {F.relu, F.relu6, torch.relu, torch.sigmoid, F.hardsigmoid, F.softmax, torch.softmax, "relu", "relu_"}
"""Operators whose output is never negative."""

_KEEPS_MODULES = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
                  nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d,
                  nn.ChannelShuffle, nn.Upsample)  # fmt: skip
_KEEPS = {torch.flatten, torch.cat, torch.reshape, torch.transpose, torch.permute, torch.chunk, torch.split, torch.mean,
          torch.squeeze, operator.getitem, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, F.interpolate, "view",
          "reshape", "transpose", "permute", "flatten", "chunk", "split", "contiguous", "mean", "squeeze",
          "unsqueeze"}  # fmt: skip
"""Operators whose output is not negative where their first argument, or each tensor of a list, is not."""

_MERGES = {torch.add, torch.mul, operator.add, operator.iadd, operator.mul, "add", "add_", "mul"}
"""Operators whose output is not negative where none of their arguments is."""


def propagate(
    nodes: Iterable[fx.Node],
    holds: Callable[[fx.Node, Set[fx.Node]], bool],
    may_be_view: Callable[[fx.Node], bool],
    works_in_place: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """Nodes that cannot be negative, also after everything that is done to them in place.

    Args:
        nodes: of the graph, in order.
        holds: whether a node is never negative if the given ones are not.
        may_be_view: whether it may return the memory of its first input.
        works_in_place: whether it writes over its first input.
    """
    nodes = list(nodes)
    overwritten: set[fx.Node] = set()  # with what may be negative
    while True:
        found: set[fx.Node] = set()
        for node in nodes:
            if node not in overwritten and holds(node, found):
                found.add(node)
        more = {
            source
            for node in nodes
            if node not in found and works_in_place(node)
            for source in _with_views(node.all_input_nodes[:1], may_be_view)
        }
        if more <= overwritten:
            return found
        overwritten |= more


def _with_views(nodes: list[fx.Node], may_be_view: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Nodes, and what they may be views of."""
    found, pending = [], list(nodes)
    while pending:
        node = pending.pop()
        found.append(node)
        if may_be_view(node):
            pending += node.all_input_nodes[:1]
    return found


def non_negative(nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """Nodes of a graph traced by ``torch.fx`` that cannot be negative, whatever its inputs.

    Args:
        nodes: in order.
        modules: that they call, by name.
    """

    def holds(node: fx.Node, found: Set[fx.Node]) -> bool:
        module, function = called_module(node, modules), called_function(node)
        if isinstance(module, _MAKES_MODULES) or function in _MAKES:
            return True
        if isinstance(module, nn.Hardtanh):
            return module.min_val >= 0
        if "bicubic" in {getattr(module, "mode", None), node.kwargs.get("mode")}:  # which overshoots
            return False
        if function in _MERGES:
            return all(_at_least_zero(operand, found) for operand in (*node.args, *node.kwargs.values()))
        if isinstance(module, _KEEPS_MODULES) or function in _KEEPS:
            first = node.args[0] if node.args else None
            return all(_at_least_zero(operand, found) for operand in (first if isinstance(first, list | tuple) else [first]))
        return False

    return propagate(nodes, holds, lambda node: may_be_view(node, modules), lambda node: works_in_place(node, modules))


def _at_least_zero(operand: object, found: Set[fx.Node]) -> bool:
    """Whether an operand cannot be negative. A parameter can be: training may change its sign."""
    return operand in found if isinstance(operand, fx.Node) else isinstance(operand, int | float) and operand >= 0
