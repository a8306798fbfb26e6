"""Which values of a graph cannot be negative, whatever the input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import onnx_ir as ir

from .clamps import bounds
from .graph import constant

_NON_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax"}
_KEEP_SIGN = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "GlobalAveragePool",
              "AveragePool", "ReduceMean", "Expand", "Tile", "Split", "Slice", "Gather", "Clip", "DequantizeLinear",
              "QuantizeLinear"}  # fmt: skip
"""Operators whose output is not negative where their first input is not; further inputs are sizes, positions and scales."""

_JOIN = {"Add", "Mul", "Concat"}
"""Operators whose output is not negative where none of their inputs is."""


def non_negative_values(graph: ir.Graph) -> set[ir.Value]:
    """Values that cannot be negative."""
    return propagate(graph, _is_non_negative)


def propagate(nodes: Iterable[ir.Node], holds: Callable[[ir.Node, Collection[ir.Value | None]], bool]) -> set[ir.Value]:
    """Values with a property that passes from node to node, in one walk: values of an ONNX graph are never written twice.

    Args:
        nodes: in execution order.
        holds: whether a node's outputs have the property, given the values before it that have it.
    """
    found: set[ir.Value] = set()
    for node in nodes:
        if holds(node, found):
            found.update(node.outputs)
    return found


def _is_non_negative(node: ir.Node, known: Collection[ir.Value | None]) -> bool:
    if node.op_type in _NON_NEGATIVE or (node.op_type == "Clip" and bounds(node)[0] >= 0):
        return True
    if node.op_type in _KEEP_SIGN:
        return node.inputs[0] in known
    if node.op_type == "Resize":
        return node.inputs[0] in known and node.attributes.get_string("mode", "nearest") != "cubic"  # which overshoots
    return node.op_type in _JOIN and all(value in known or _holds_no_negative(value) for value in node.inputs)


def _holds_no_negative(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and bool((array >= 0).all())
