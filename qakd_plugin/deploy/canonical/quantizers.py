"""Quantizers repeated after a pooling, merged where they are equal, and given unsigned codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph import WEIGHT_KEY, identity, initializer, producer, replace
from .labels import labels_of, set_labels


class CarryThroughMaxPool(InPlacePass):
    """Repeat a quantizer after a MaxPool that has none: the pooled values lie on the same grid already.

    With it ONNX Runtime and TensorRT keep the pooling and what follows in integers.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MaxPool" or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
                continue
            dequantize = producer(node.inputs[0], "DequantizeLinear")
            readers = list(node.outputs[0].uses())
            if dequantize is None or all(_leads_to_quantize(use.node) for use in readers):
                continue
            numbers = dequantize.inputs[1:]
            again = ir.node("QuantizeLinear", [node.outputs[0], *numbers], name=f"{node.name}/QuantizeLinear")
            back = ir.node("DequantizeLinear", [again.outputs[0], *numbers], name=f"{node.name}/DequantizeLinear")
            again.outputs[0].name, back.outputs[0].name = f"{again.name}:out", f"{back.name}:out"
            model.graph.insert_after(node, [again, back])
            for use in readers:
                use.node.replace_input_with(use.idx, back.outputs[0])
            modified = True
        return PassResult(model, modified)


class MergeEqualQuantizers(InPlacePass):
    """Two quantizers with the same input and the same numbers become one, which keeps both labels.

    Weights of two layers stay two, even where the exporter stores their equal numbers once.
    """

    def call(self, model: ir.Model) -> PassResult:
        seen: dict[tuple[object, ...], ir.Node] = {}
        modified = False
        for node in list(model.graph):
            if node.op_type not in {"Clip", "QuantizeLinear", "DequantizeLinear"}:
                continue
            axis = node.attributes.get_int("axis", 1)
            layer = node.metadata_props.get(WEIGHT_KEY)
            key = (node.op_type, node.inputs[0], axis, layer, *(identity(value) for value in node.inputs[1:]))
            kept = seen.setdefault(key, node)
            if kept is node or node.outputs[0].is_graph_output():
                continue
            if labels := labels_of(node):
                set_labels(kept, (labels_of(kept), labels))
            replace(node, kept.outputs[0])
            modified = True
        return PassResult(model, modified)


def make_unsigned(graph: ir.Graph, quantize: ir.Node, zero_point: int) -> None:
    """Give a quantizer uint8 codes with a zero point, and tell those that read them."""
    zero = initializer(graph, f"zero_point_u8_{zero_point}", np.asarray(zero_point, dtype=np.uint8))
    quantize.attributes.pop("output_dtype", None)
    quantize.outputs[0].dtype = ir.DataType.UINT8
    for node in (quantize, *(use.node for use in quantize.outputs[0].uses())):
        node.resize_inputs(3)
        node.replace_input_with(2, zero)


def _leads_to_quantize(node: ir.Node) -> bool:
    if node.op_type == "Clip":
        return all(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses())
    return node.op_type == "QuantizeLinear"
