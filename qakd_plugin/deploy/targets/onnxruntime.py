"""Canonical graph -> the form ONNX Runtime's CPU kernels are fastest with. Exact: the same codes, the same numbers.

ONNX Runtime fuses ``DQ -> Conv -> Q`` into an integer kernel, but it cannot absorb a ReLU in front of a signed Q, and a float
Clip there stops the fusion. With unsigned codes the ReLU is the lower end of the range, and the upper end can be clipped on the
integers instead:

    Conv -> [Relu | Clip(0, c)]* -> [Clip] -> Q(s8, s) -> DQ
becomes
    Conv -> Q(u8, zero point 0, s) -> Clip_u8(0, q_max) -> DQ

and every other tensor is shifted by 128. Asymmetric quantizers become the same, with the zero point that their lowest code asks
for. A ReLU after a dequantizer, as in networks that activate before they convolve, moves in front of it, onto the integers,
since the kernel of a convolution takes codes:

    Q -> DQ -> Relu -> Conv
becomes
    Q -> Clip_u8(zero point, 255) -> DQ -> Conv

Biases, which the runtime rounds, are the matter of :mod:`.onnxruntime_bias`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.clamps import absorbed_clamps, code_range
from ..canonical.graph import (
    activation_quantizers,
    constant,
    copied,
    initializer,
    is_quantized,
    producer,
    weight_dequantizers,
)
from ..canonical.quantizers import make_unsigned
from ..canonical.sign_analysis import non_negative_values
from .onnxruntime_bias import loses_bias, scale_codes_up, split_bias
from .onnxruntime_matmul import free_matmuls
from .onnxruntime_weights import WeightOnlyLayers
from .weight_packing import WeightStorage, store_weights

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def to_onnxruntime_form(model: ir.Model, storage: WeightStorage = "int4") -> ir.Model:
    """A copy of a canonical model in ONNX Runtime's form, weights stored as :func:`.weight_packing.store_weights` does."""
    model = copied(model)
    graph = model.graph
    non_negative = non_negative_values(graph)
    for quantize in list(activation_quantizers(graph)):
        _to_unsigned(graph, quantize, non_negative)
    for node in list(graph):
        if node.op_type == "Relu":
            _clip_codes(graph, node)
    common.RemoveUnusedNodesPass()(model)  # the clamps that quantizers absorbed
    WeightOnlyLayers()(model)
    free_matmuls(graph)
    for dequantize in weight_dequantizers(graph):
        if not dequantize.attributes.get_int("block_size", 0):
            scale_codes_up(graph, dequantize)
            _add_zero_point(graph, dequantize)
    store_weights(model, storage)
    for node in list(graph):
        if loses_bias(node):
            split_bias(graph, node)
        if node.op_type in _WEIGHTED and constant(node.inputs[1]) is not None and is_quantized(node.inputs[0]):
            _keep_in_float(graph, node)  # the runtime would quantize this weight on its own (``WeightBiasQuantization``)
        if node.op_type == "Softmax" and is_quantized(node.inputs[0]):
            _keep_in_float(graph, node)  # its own, between quantizers, sums exponentials that it rounded to whole numbers
    common.RemoveUnusedNodesPass()(model)  # codes and scales that were replaced
    return model


def _to_unsigned(graph: ir.Graph, quantize: ir.Node, non_negative: set[ir.Value]) -> None:
    """Give one quantizer uint8 codes; narrower ranges and ReLUs move onto the integers."""
    source, low, high = absorbed_clamps(quantize)
    if low == 0 or quantize.inputs[0] in non_negative:
        zero_point, low = 0, max(low, 0)
    else:
        zero_point = -code_range(quantize)[0]
    quantize.replace_input_with(0, source)
    make_unsigned(graph, quantize, zero_point)
    codes = quantize.outputs[0]
    if (low + zero_point, high + zero_point) != (0, 255):
        bounds = [
            initializer(graph, f"code_u8_{bound + zero_point}", np.asarray(bound + zero_point, dtype=np.uint8))
            for bound in (low, high)
        ]
        clip = ir.node("Clip", [codes, *bounds], name=f"{quantize.name}/Clip")
        clip.outputs[0].name, clip.outputs[0].dtype = f"{clip.name}:out", ir.DataType.UINT8
        ir.convenience.replace_all_uses_with(codes, clip.outputs[0])
        clip.replace_input_with(0, codes)
        graph.insert_after(quantize, clip)


def _clip_codes(graph: ir.Graph, relu: ir.Node) -> None:
    """Let a ReLU that reads a dequantized activation clip its codes at their zero point."""
    dequantize = producer(relu.inputs[0], "DequantizeLinear")
    zero = None if dequantize is None or len(dequantize.inputs) < 3 else constant(dequantize.inputs[2])
    if dequantize is None or zero is None or zero.dtype != np.uint8 or constant(dequantize.inputs[0]) is not None:
        return
    bounds = [initializer(graph, f"code_u8_{bound}", np.asarray(bound, dtype=np.uint8)) for bound in (int(zero), 255)]
    clip = ir.node("Clip", [dequantize.inputs[0], *bounds], name=f"{relu.name}/Clip")
    again = ir.node("DequantizeLinear", [clip.outputs[0], *dequantize.inputs[1:]], name=f"{relu.name}/DequantizeLinear")
    for node, kind in ((clip, ir.DataType.UINT8), (again, ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = f"{node.name}:out", kind, relu.outputs[0].shape
    graph.insert_before(relu, [clip, again])
    ir.convenience.replace_all_uses_with(relu.outputs[0], again.outputs[0])


def _add_zero_point(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Write the zero point of a weight out: without the input, ONNX Runtime does not turn Gemm into QGemm."""
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    assert codes is not None
    assert scale is not None
    if len(dequantize.inputs) > 2 and dequantize.inputs[2] is not None:
        return
    assert dequantize.inputs[0] is not None
    # Of its own: with session.x64quantprecision the runtime replaces it, and stumbles over one that it has replaced before.
    name = f"{dequantize.inputs[0].name}.zero_point"
    dequantize.resize_inputs(3)
    dequantize.replace_input_with(2, initializer(graph, name, np.zeros(scale.shape, dtype=codes.dtype)))


def _keep_in_float(graph: ir.Graph, node: ir.Node) -> None:
    """Clip a quantized input to the range of float32, which changes nothing: the runtime does not look through a Clip."""
    if all(output.is_graph_output() for output in node.outputs):
        return
    limit = np.finfo(np.float32).max
    bounds = [
        initializer(graph, f"float32_{name}", np.asarray(sign * limit, np.float32))
        for name, sign in (("lowest", -1), ("highest", 1))
    ]
    clip = ir.node("Clip", [node.inputs[0], *bounds], name=f"{node.name}/Clip")
    clip.outputs[0].name, clip.outputs[0].dtype = f"{clip.name}:out", ir.DataType.FLOAT
    graph.insert_before(node, clip)
    node.replace_input_with(0, clip.outputs[0])
