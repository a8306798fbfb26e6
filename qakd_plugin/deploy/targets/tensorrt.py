"""Canonical graph -> what TensorRT takes at its smallest; and the weights that it does not take, or computes wrongly.

TensorRT rejects some of them late and without naming the culprit. Weights with several scales along the summed dimension are
multiplied by the first one only when the activations are quantized too (found in the programs that TensorRT-RTX 1.7.1
generates).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import Sequential, common

from ...errors import UnsupportedQuantizerError
from ..canonical.graph import WEIGHT_KEY, constant, copied, is_linear_weight, is_quantized, producer
from ..canonical.int4 import PackInt4
from ..canonical.opset import RaiseOpset

CONVOLUTIONS = {"Conv", "ConvTranspose"}
PRODUCTS = {"Gemm", "MatMul"}
ADVICE = "Export with target='tensorrt' from a symmetric configuration (qakd_plugin.prepare makes one)."


def to_tensorrt_form(model: ir.Model) -> ir.Model:
    """A copy of a canonical model with the 4-bit weights of all linear layers in 4 bits.

    Beside quantized activations TensorRT takes them with one scale per output channel; it fails to build one scale for all, and
    applies the first of several blocks to all (:func:`check_weights` refuses these). It has no 4-bit convolution beside 8-bit
    activations.
    """
    return Sequential(PackInt4(is_linear_weight), RaiseOpset(), common.RemoveUnusedNodesPass())(copied(model)).model


def check_weights(model: ir.Model) -> None:
    """Refuse combinations of weight and activation that TensorRT does not compute; the toolkits can train all of them.

    Raises:
        UnsupportedQuantizerError: names the layer.
    """
    for node in model.graph:
        problem = weight_problem(node) if node.op_type in CONVOLUTIONS | PRODUCTS else None
        if problem is not None:
            weight = stored_weight(node.inputs[1])
            assert weight is not None
            raise UnsupportedQuantizerError(f"{weight.metadata_props[WEIGHT_KEY]}: {problem}")


def weight_problem(node: ir.Node) -> str | None:
    """Why TensorRT cannot take the stored weight of a convolution or matrix product beside its activations, if it cannot.

    These fail in TensorRT, or compute something else.
    """
    stored = stored_weight(node.inputs[1])
    if stored is None:
        return None
    codes, scale = constant(stored.inputs[0]), constant(stored.inputs[1])
    assert codes is not None
    assert scale is not None
    blocks = _blocks(stored, codes.shape, scale.shape)
    both = is_quantized(node.inputs[0])
    int4 = codes.dtype.name == "int4"
    if node.op_type in CONVOLUTIONS and blocks > 1:
        return f"a convolution's weights take one scale per channel, got blocks. {ADVICE}"
    if node.op_type in CONVOLUTIONS and int4 and both:
        return "4-bit weights beside 8-bit activations: TensorRT has no such convolution. Store the codes as INT8."
    if blocks > 1 and both:
        return (
            f"weights with {blocks} scales along the summed dimension beside quantized activations: TensorRT fails, or applies "
            "the first scale to all. Take one scale per output channel (axis=0), leave this layer's input in floating point, "
            "or export for another target."
        )
    if int4 and both and scale.size == 1:
        return (
            "one scale for all 4-bit weights beside 8-bit activations: TensorRT fails to build it. Take one scale per output "
            "channel, or store the codes as INT8."
        )
    return None


def stored_weight(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of stored codes that a weight comes from, if there is one."""
    transpose = producer(value, "Transpose", "Reshape")
    node = producer(value if transpose is None else transpose.inputs[0], "DequantizeLinear")
    return node if node is not None and constant(node.inputs[0]) is not None else None


def _blocks(dequantize: ir.Node, codes: tuple[int, ...], scale: tuple[int, ...]) -> int:
    """Number of scales along the blocked axis of a weight; 1 where it is not blocked."""
    if not dequantize.attributes.get_int("block_size", 0) or len(scale) != len(codes):
        return 1
    return scale[dequantize.attributes.get_int("axis", 1) or 0]
