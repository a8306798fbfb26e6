"""Biases as ONNX Runtime's integer kernels take them, and where they do not: written so that no code of a layer changes.

The runtime rounds a float bias to a multiple of s_x * s_w. Weights of few bits are therefore stored times a power of two, with
a scale divided by it, so that this rounding stays far below one output step; a bias that it would still change is added after
the layer.

Such a bias has 32 bits. A channel with next to no weight beside its bias (BatchNorm has faded it out) would overflow them: its
scale is multiplied by a power of two, and its codes are divided and rounded. What is lost is about what adding the bias in
float32 loses as well. The file says which channels, and by how many bits; parity checks count on nothing else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..canonical.graph import COARSE_KEY, constant, initializer, is_weight_only, kernel_shape, only_consumer, producer

_LARGEST_BIAS = 2.0**30
"""Half of what 32 bits hold: sums of products come on top of it."""

_BIAS_ERROR = 0.08
"""Largest error of a rounded bias, in steps of the output: a little less than what parity checks allow with fusions."""


def scale_codes_up(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Store codes times the largest power of two that fits into -127..127; the scale is divided by it: the same products.

    Per channel where the scale is. A power below one, where the bias needs room, costs the lowest bits.
    """
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    assert codes is not None
    assert scale is not None
    if codes.dtype != np.int8:
        return
    room = _room_for_bias(dequantize, scale)
    if scale.ndim == 0 and (room < 0).any():
        scale = np.broadcast_to(scale, room.shape)
        dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)
    axis = dequantize.attributes.get_int("axis", 1)
    others = tuple(dim for dim in range(codes.ndim) if scale.ndim == 0 or dim != axis % codes.ndim)
    low, high = (bound(codes.astype(np.int32), axis=others, keepdims=True) for bound in (np.min, np.max))
    factor = np.ones_like(low)
    while (fits := (2 * factor * low >= -127) & (2 * factor * high <= 127) & (factor < 64)).any():
        factor = np.where(fits, 2 * factor, factor)
    largest = np.exp2(room if scale.ndim else room.min()).reshape(-1, *[1] * (codes.ndim - 1))
    factor = np.minimum(factor, largest)
    if (factor == 1).all():
        return
    if coarse := [f"{channel}:{-room[channel]}" for channel in np.flatnonzero(room < 0)]:
        dequantize.metadata_props[COARSE_KEY] = ",".join(coarse)
    codes_value, scale_value = dequantize.inputs[0], dequantize.inputs[1]
    assert codes_value is not None
    assert scale_value is not None
    wide, fine = np.rint(codes * factor).astype(np.int8), scale / factor.reshape(scale.shape)
    dequantize.replace_input_with(0, initializer(graph, f"{codes_value.name}.widened", wide))
    dequantize.replace_input_with(1, initializer(graph, f"{scale_value.name}.narrowed", fine.astype(np.float32)))


def _room_for_bias(dequantize: ir.Node, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """By which power of two each output channel's weight scale may be divided before its bias leaves 32 bits; 8 at most."""
    conv = only_consumer(dequantize.outputs[0])
    bias = constant(conv.inputs[2]) if conv is not None and conv.op_type == "Conv" and len(conv.inputs) > 2 else None
    source = None if conv is None else producer(conv.inputs[0], "DequantizeLinear")
    step = None if source is None else constant(source.inputs[1])
    per_channel = scale.ndim == 0 or (
        dequantize.attributes.get_int("axis", 1) == 0 and bias is not None and scale.size == bias.size
    )
    if bias is None or step is None or step.size != 1 or not per_channel:
        return np.full(1, 8)
    codes = np.abs(bias.astype(np.float64)) / (float(step.reshape(())) * scale.astype(np.float64).reshape(-1))
    powers: npt.NDArray[np.int64] = np.minimum(np.floor(np.log2(_LARGEST_BIAS / np.maximum(codes, 1.0))), 8).astype(np.int64)
    return powers


def overflows_bias(conv: ir.Node) -> bool:
    """Whether a convolution's bias, as a multiple of the input's scale times the weight's, has no room in 32 bits."""
    weight = producer(conv.inputs[1], "DequantizeLinear")
    scale = None if weight is None else constant(weight.inputs[1])
    return weight is not None and scale is not None and bool((_room_for_bias(weight, scale) < 0).any())


def loses_bias(layer: ir.Node) -> bool:
    """Whether a layer's bias must be added after it: the runtime would change its codes, or run on a slower kernel for it."""
    if layer.op_type == "Conv":
        return _bias_error(layer) > _BIAS_ERROR
    if layer.op_type not in {"Gemm", "ConvTranspose"}:
        return False
    weight = producer(layer.inputs[1], "DequantizeLinear")
    if weight is None or weight.attributes.get_int("block_size", 0) != 0:
        return False
    # There is no integer kernel for transposed convolutions, yet the runtime rounds their biases as if there were.
    return layer.op_type == "ConvTranspose" or not is_weight_only(weight)


def _bias_error(conv: ir.Node) -> float:
    """By how many steps of its output the runtime would change a convolution's bias, at most; 0 where it would not.

    It rounds the bias to a multiple of the input's scale times the weight's.
    """
    weight, source = (producer(value, "DequantizeLinear") for value in (conv.inputs[1], conv.inputs[0]))
    reader = only_consumer(conv.outputs[0])
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if bias is None or weight is None or source is None or reader is None or reader.op_type != "QuantizeLinear":
        return 0.0
    of_weight, of_input, of_output = (constant(node.inputs[1]) for node in (weight, source, reader))
    if of_weight is None or of_input is None or of_output is None or of_weight.size not in {1, bias.size}:
        return 0.0
    unit = of_weight.astype(np.float64).reshape(-1) * float(of_input.max())
    return float(np.abs(bias - np.rint(bias / unit) * unit).max() / of_output.min())


def split_bias(graph: ir.Graph, layer: ir.Node) -> None:
    """Add the float bias of a layer after it, where it stays exact.

    A Gemm with its bias inside computes in float; a convolution without gives its integer kernel up.
    """
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    if bias is None:
        return
    values = constant(bias)
    if layer.op_type != "Gemm" and values is not None:
        bias = initializer(graph, f"{layer.name}.bias", values.reshape(-1, *[1] * len(kernel_shape(layer))))
    layer.resize_inputs(2)
    output = layer.outputs[0]
    add = ir.node("Add", [output, bias], name=f"{layer.name}/Add")
    graph.insert_after(layer, add)
    total = add.outputs[0]
    ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    if total.is_graph_output():
        total.name, total.shape, output.name = output.name, output.shape, f"{layer.name}:out"
        total.dtype = output.dtype or ir.DataType.FLOAT
    else:
        total.name = f"{add.name}:out"
