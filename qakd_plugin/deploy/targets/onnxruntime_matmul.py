"""What keeps ONNX Runtime from computing a linear layer in integers, written otherwise. Exact: the same numbers.

    MatMul(x, t), MatMul(y, t), t = Transpose(DequantizeLinear(codes, scale))      one layer that is called twice
    MatMul(x, ...) -> Relu or Clip, where no quantizer follows

The runtime moves a transpose that several products read into these products, and leaves a product in floating point where a
ReLU follows that is not part of a quantizer. With a transpose each, and with ``Max(x, 0)`` (and ``Min``), it takes both.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..canonical.graph import initializer, is_quantized, only_consumer, replace, weight_dequantizers, weight_readers


def free_matmuls(graph: ir.Graph) -> None:
    """Rewrite both, in place."""
    for dequantize in list(weight_dequantizers(graph)):
        layers = [node for node in weight_readers(dequantize) if node.op_type == "MatMul" and is_quantized(node.inputs[0])]
        _separate(graph, dequantize)
        for layer in layers:
            clamp = only_consumer(layer.outputs[0])
            if clamp is not None and clamp.op_type in {"Relu", "Clip"}:
                _to_extrema(graph, clamp)


def _separate(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Give every reader of a transposed weight a transpose of its own."""
    for use in list(dequantize.outputs[0].uses()):
        transpose = use.node
        if transpose.op_type != "Transpose" or transpose.outputs[0].is_graph_output():
            continue
        for number, (reader, index) in enumerate(list(transpose.outputs[0].uses())[1:], 1):
            own = ir.node("Transpose", [dequantize.outputs[0]], attributes=dict(transpose.attributes))
            own.name = f"{transpose.name}#{number}"
            own.outputs[0].name, own.outputs[0].dtype = f"{own.name}:out", ir.DataType.FLOAT
            graph.insert_after(transpose, own)
            reader.replace_input_with(index, own.outputs[0])


def _to_extrema(graph: ir.Graph, clamp: ir.Node) -> None:
    low, high = (clamp.inputs[1], [*clamp.inputs, None][2]) if clamp.op_type == "Clip" else (_zero(graph), None)
    value, output = clamp.inputs[0], clamp.outputs[0]
    for kind, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            node = ir.node(kind, [value, bound], name=f"{clamp.name}/{kind}")
            value = node.outputs[0]
            value.name, value.dtype, value.shape = f"{node.name}:out", ir.DataType.FLOAT, output.shape
            graph.insert_before(clamp, node)
    assert value is not None
    replace(clamp, value)


def _zero(graph: ir.Graph) -> ir.Value:
    return initializer(graph, "float32_zero", np.zeros((), np.float32))
