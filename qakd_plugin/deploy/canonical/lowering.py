"""The operators that carry quantizers through the exporter become ONNX's own, every node named after its module."""

from __future__ import annotations

import ast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from .clamps import set_bounds
from .graph import DOMAIN, WEIGHT_KEY, constant, initializer, replace
from .labels import escaped, set_labels

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameNodes(InPlacePass):
    """Name every node and value after the module it came from."""

    def call(self, model: ir.Model) -> PassResult:
        used: dict[str, int] = {}
        for node in model.graph:
            name = escaped(node.attributes.get_string("name", "")) if node.domain == DOMAIN else ""
            if not name:
                scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
                name = f"{scopes[-2]}/{node.op_type}" if len(scopes) > 1 and scopes[-2] else node.op_type
            count = used.get(name, 0)
            used[name] = count + 1
            node.name = f"{name}#{count}" if count else name
            for index, output in enumerate(node.outputs):
                if not output.is_graph_output():
                    output.name = f"{node.name}:{index}" if len(node.outputs) > 1 else f"{node.name}:out"
        return PassResult(model, modified=bool(used))


class LowerQuantizers(InPlacePass):
    """Turn ``QDQ`` and ``DQ`` into QuantizeLinear and DequantizeLinear, and label them for parity checks.

    A float Clip goes in front where the grid is narrower than its container. A module that is called several times labels its
    quantizers ``name``, ``name#1``, ``name#2`` in the order of the calls.
    """

    def requires(self, model: ir.Model) -> None:
        for node in _carriers(model):
            if constant(node.inputs[1]) is None:
                raise PreconditionError(f"{node.name}: its scale is computed by the graph, not stored in it")

    def call(self, model: ir.Model) -> PassResult:
        carriers = _carriers(model)
        for node in carriers:
            (_lower_activation if node.op_type == "QDQ" else _lower_weight)(model.graph, node)
        return PassResult(model, modified=bool(carriers))

    def ensures(self, model: ir.Model) -> None:
        if left := _carriers(model):
            raise PostconditionError(f"{left[0].name}: a quantizer was not lowered")


def _carriers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


def _lower_activation(graph: ir.Graph, node: ir.Node) -> None:
    name, (x, scale) = node.name, node.inputs
    step = constant(scale)
    assert name is not None
    assert step is not None
    zero_point, low, high = (node.attributes[key].as_int() for key in ("zero_point", "quant_min", "quant_max"))
    unsigned = low >= 0 and (zero_point != 0 or high > 127)
    container = (0, 255) if unsigned else (-128, 127)
    kind = np.uint8 if unsigned else np.int8
    zero = initializer(graph, f"zero_point_{kind.__name__}_{zero_point}", np.asarray(zero_point, dtype=kind))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}/QuantizeLinear")
    set_labels(quantize, [name])
    quantize.outputs[0].dtype = ir.DataType.UINT8 if unsigned else ir.DataType.INT8
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}/DequantizeLinear")
    new = [quantize, dequantize]
    if (low, high) != container:
        clip = ir.node("Clip", [x], name=f"{name}/Clip")
        limits = np.asarray([low - zero_point, high - zero_point], dtype=np.float32) * step.reshape(())
        set_bounds(graph, clip, float(limits[0]), float(limits[1]))
        quantize.replace_input_with(0, clip.outputs[0])
        new.insert(0, clip)
    for made in new:
        made.outputs[0].name = f"{made.name}:out"
    graph.insert_before(node, new)
    _take_over(node, dequantize.outputs[0])


def _lower_weight(graph: ir.Graph, node: ir.Node) -> None:
    scale = constant(node.inputs[1])
    assert scale is not None
    per_tensor, block = scale.ndim == 0, node.attributes.get_int("block", 0)
    attributes = {} if per_tensor else {"axis": node.attributes.get_int("axis", 0)}
    if block:
        attributes["block_size"] = block
    dequantize = ir.node("DequantizeLinear", list(node.inputs), attributes, name=f"{node.name}/DequantizeLinear")
    dequantize.metadata_props[WEIGHT_KEY] = node.attributes.get_string("name", "")
    dequantize.outputs[0].name = f"{dequantize.name}:out"
    graph.insert_before(node, dequantize)
    _take_over(node, dequantize.outputs[0])


def _take_over(node: ir.Node, value: ir.Value) -> None:
    value.shape = node.outputs[0].shape
    value.dtype = node.outputs[0].dtype or ir.DataType.FLOAT
    if node.outputs[0].is_graph_output():
        value.name, node.outputs[0].name = node.outputs[0].name, f"{node.name}:replaced"
    replace(node, value)
