"""Sums of quantized tensors, as residual blocks compute them: which are quantized as well, and on the output of which module.

Integers in, integers out: a sum whose operands lie on 8-bit grids is quantized, after its ReLU. So are all sums of a residual
network, and none of a transformer, whose norms read them in floating point. Otherwise ONNX Runtime and OpenVINO dequantize both
operands, add in floating point, and quantize again for each layer that reads the sum.

A toolkit that keeps quantizers in modules has a place for one only where some module returns the sum: the residual block.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from .fx_graph import GRID_KEEPING, called_function, called_module, leads_to, only_reader, readers, relu_bounds

RESULT_OF = "result_of"
"""In the ``meta`` of a node: names of the modules that return it, innermost first; only of modules that are called once, with a
tensor first."""

ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONCATS = {torch.cat, torch.concat}
_MOVES = {operator.getitem, torch.chunk, torch.split, torch.reshape, torch.flatten, torch.transpose, torch.permute, "chunk",
          "split", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous"}  # fmt: skip
"""Of single tensors; what follows the first argument are sizes and positions."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Run their children, or let others do so: a quantizer among them would be one more."""


@dataclass(frozen=True)
class Sum:
    """A quantizer on the output of module ``name``, which is a sum of quantized tensors, or the ReLU of one."""

    name: str
    unsigned: bool


@dataclass
class Grids:
    """What lies on the 8-bit grid of a quantizer after a module.

    Attributes:
        on_grid: nodes.
        sums: quantizers of sums, by the nodes that they quantize.
        by_layers: sums of what lies on grids, or their ReLUs, that one layer alone reads, which quantizes its input itself.
        floating: sums that belong on a grid, and that no module returns: they stay in floating point.
    """

    on_grid: set[fx.Node] = field(default_factory=set)
    sums: dict[fx.Node, Sum] = field(default_factory=dict)
    by_layers: list[fx.Node] = field(default_factory=list)
    floating: list[fx.Node] = field(default_factory=list)


def grids(
    nodes: Iterable[fx.Node],
    modules: Mapping[str, nn.Module],
    layers: Set[str],
    quantized: Set[fx.Node],
    positive: Set[fx.Node],
    *,
    sums: bool,
) -> Grids:
    """Follow the grids of quantized tensors through a graph.

    Args:
        nodes: in order.
        modules: that they call, by name.
        layers: names of the layers that quantize their input, if it is not.
        quantized: nodes that have a quantizer.
        positive: nodes that cannot be negative.
        sums: quantize sums; or else nothing lies on the grid of one.
    """
    found = Grids()
    wanted: set[fx.Node] = set()  # on a grid, if every sum had a place for its quantizer
    for node in nodes:
        sources = node.all_input_nodes
        for known in (found.on_grid, wanted):
            if node in quantized or (_keeps_grid(node, modules) and known.issuperset(sources)):
                known.add(node)
        if not sums or called_function(node) not in ADDS or len(sources) != 2 or not wanted.issuperset(sources):
            continue
        end = after_relu(node, modules)
        reading = readers(end)
        alone = len(reading) == 1 and reading[0].op == "call_module" and reading[0].target in layers  # quantizes it itself
        if alone and found.on_grid.issuperset(sources):
            found.by_layers.append(end)
        if alone or any(reader.op == "output" for reader in reading):
            continue
        wanted.update((node, end))
        name = returning(end, modules)
        if name is not None and found.on_grid.issuperset(sources):
            found.on_grid.update((node, end))
            found.sums[end] = Sum(name, end in positive)
        else:
            found.floating.append(node)
    return found


def joined(
    nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module], layers: Set[str], quantized: Set[fx.Node]
) -> list[tuple[list[fx.Node], list[str]]]:
    """Quantizers that should have one grid, because what they quantize is concatenated for a layer: then only codes are moved.

    Args:
        nodes: in order.
        modules: that they call, by name.
        layers: names of the layers that quantize their input.
        quantized: nodes that have a quantizer.

    Returns:
        Groups: quantized nodes, and layers that read what was made of them by concatenating, splitting and moving.
    """
    of: dict[fx.Node, fx.Node] = {}  # the quantized node that a node's grid is of
    earlier: dict[fx.Node, fx.Node] = {}
    divided: set[fx.Node] = set()

    def first(node: fx.Node) -> fx.Node:
        node = of[node]
        while node in earlier:
            node = earlier[node]
        return node

    def is_layer(node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in layers

    def moves(node: fx.Node) -> bool:
        return called_function(node) in _MOVES | _CONCATS or _keeps_grid(node, modules)

    reading: list[tuple[fx.Node, str]] = []
    for node in nodes:
        sources, function = node.all_input_nodes, called_function(node)
        if node in quantized:
            of[node] = node
        elif function in _CONCATS and all(source in of for source in sources) and leads_to(node, is_layer, moves):
            root, *others = dict.fromkeys(map(first, sources))
            earlier.update(dict.fromkeys(others, root))
            of[node] = root
            divided.add(node)
        elif is_layer(node):
            if sources and sources[0] in divided:
                reading.append((sources[0], str(node.target)))
        elif sources and sources[0] in of and moves(node):
            of[node] = of[sources[0]]
            if function in _MOVES or sources[0] in divided:
                divided.add(node)
    groups: dict[fx.Node, tuple[list[fx.Node], list[str]]] = {}
    for node in [node for node in of if node in quantized]:
        groups.setdefault(first(node), ([], []))[0].append(node)
    for source, layer in reading:
        groups[first(source)][1].append(layer)
    return [group for group in groups.values() if len(group[0]) + len(group[1]) > 1]


def made_by(node: fx.Node) -> str:
    """The module that a tensor comes from, for messages."""
    while node.op != "call_module" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target)


def after_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """A node, or the ReLU that alone reads it."""
    reader = only_reader(node)
    return node if reader is None or relu_bounds(reader, called_module(reader, modules)) is None else reader


def returning(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The module that computes and returns a node; one with children if any: a toolkit takes all of a class, or none."""
    names = [
        name
        for name in node.meta.get(RESULT_OF, ())
        if not isinstance(modules[name], _CONTAINERS)
        and name in _scopes(node)
        and not any(name in _scopes(reader) for reader in readers(node))  # which would read what is not quantized
    ]
    blocks = [name for name in names if next(modules[name].children(), None) is not None]
    return next(iter(blocks or names), None)


def _scopes(node: fx.Node) -> set[str]:
    """Names of the modules that a node is computed in."""
    return {name for name, _ in (node.meta.get("nn_module_stack") or {}).values()}


def _keeps_grid(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if isinstance(called_module(node, modules), GRID_KEEPING):
        return True
    function = called_function(node)
    passes_on = function is F.dropout or getattr(function, "__name__", "") == "stochastic_depth"  # of torchvision
    return passes_on and False in (*node.args, *node.kwargs.values())  # in eval mode
