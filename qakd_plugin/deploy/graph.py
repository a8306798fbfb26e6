"""Small questions asked of an onnx-ir graph by several passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

QUANTIZER_KEY = "qakd.quantizer"
"""Node metadata: the dotted names, comma-separated, of the quantizers of the trained model that this node carries out."""

WEIGHT_KEY = "qakd.weight"
"""Node metadata of a weight's DequantizeLinear: the dotted name of its layer in the trained model."""

COARSE_KEY = "qakd.coarse"
"""Node metadata of a weight's DequantizeLinear: "channel:bits, ..." where codes lost their lowest bits, see ``ort_form``."""


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array behind an initializer or Constant node, or None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def scalar(value: ir.Value | None, default: float) -> float:
    """The number behind a constant scalar input, ``default`` where the input is absent or not constant."""
    array = constant(value)
    return default if array is None else float(array.reshape(()))


def initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer ``name``, registered on first use."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The single node that reads ``value``, if there is exactly one and it is no graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value``, if it is one of ``op_types``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def activation_quantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every QuantizeLinear, in execution order."""
    return (node for node in graph if node.op_type == "QuantizeLinear")


def weight_dequantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every DequantizeLinear of stored integers, in execution order."""
    for node in graph:
        if node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None:
            yield node


def dequantizer_before(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that an activation comes straight from, if it comes from a quantizer."""
    between = ("DequantizeLinear", "Flatten", "Reshape", "Transpose", "MaxPool", "Squeeze", "Pad")
    node = producer(value, *between)
    while node is not None and node.op_type != "DequantizeLinear":
        node = producer(node.inputs[0], *between)
    return node if node is not None and constant(node.inputs[0]) is None else None


def is_quantized(value: ir.Value | None) -> bool:
    """Whether an activation comes straight from a quantizer."""
    return dequantizer_before(value) is not None


def is_weight_only(dequantize: ir.Node) -> bool:
    """Whether stored integers are the weight of linear layers alone whose activations stay in floating point."""
    readers: list[ir.Node] = []
    for use in dequantize.outputs[0].uses():
        readers += [inner.node for inner in use.node.outputs[0].uses()] if use.node.op_type == "Transpose" else [use.node]
    return bool(readers) and all(node.op_type in {"Gemm", "MatMul"} and not is_quantized(node.inputs[0]) for node in readers)


def replace(old: ir.Node, new: ir.Value) -> None:
    """Let every reader of ``old``'s output read ``new``, and remove ``old``."""
    output, graph = old.outputs[0], old.graph
    assert graph is not None
    ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
    graph.remove(old, safe=True)
