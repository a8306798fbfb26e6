"""Canonical graph -> the form ONNX Runtime's CPU kernels are fastest with. Exact: the same codes, the same numbers.

ONNX Runtime fuses ``DQ -> Conv -> Q`` into an integer kernel, but it cannot absorb a ReLU in front of a signed Q, and a float
Clip there stops the fusion. With unsigned codes the ReLU is the lower end of the range, and the upper end can be clipped on the
integers instead:

    Conv -> [Relu | Clip(0, c)]* -> [Clip] -> Q(s8, s) -> DQ
becomes
    Conv -> Q(u8, zero point 0, s) -> Clip_u8(0, q_max) -> DQ

and every other tensor is shifted by 128. Asymmetric quantizers become the same, with the zero point that their lowest code asks
for. The runtime also rounds float biases to multiples of s_x * s_w; weights of few bits are therefore stored times a power of
two, with a scale divided by it, so that this rounding stays far below one output step.

Such a bias has 32 bits. A channel with next to no weight beside its bias (BatchNorm has faded it out) would overflow them: its
scale is multiplied by a power of two, and its codes are divided and rounded. What is lost is about what adding the bias in
float32 loses as well. The file says which channels, and by how many bits; parity checks count on nothing else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from .graph import (
    COARSE_KEY,
    activation_quantizers,
    constant,
    initializer,
    is_quantized,
    is_weight_only,
    only_consumer,
    producer,
    scalar,
    stored_codes,
    weight_dequantizers,
)
from .storage import WeightStorage, store_weights

_NON_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax"}
_KEEP_SIGN = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "GlobalAveragePool",
              "AveragePool", "ReduceMean", "Split", "Slice", "Gather", "Clip", "DequantizeLinear",
              "QuantizeLinear"}  # fmt: skip
"""Operators whose output is not negative where their first input is not; further inputs are sizes, positions and scales."""

_JOIN = {"Add", "Mul", "Concat"}
"""Operators whose output is not negative where none of their inputs is."""

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

_LARGEST_BIAS = 2.0**30
"""Half of what 32 bits hold: sums of products come on top of it."""


def to_onnxruntime_form(model: ir.Model, storage: WeightStorage = "int4") -> ir.Model:
    """A copy of a canonical model in ONNX Runtime's form, weights stored as :func:`.storage.store_weights` does."""
    model = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    graph = model.graph
    positive = non_negative_values(graph)
    for quantize in list(activation_quantizers(graph)):
        _to_unsigned(graph, quantize, positive)
    common.RemoveUnusedNodesPass()(model)  # the clamps that quantizers absorbed
    for dequantize in weight_dequantizers(graph):
        if not is_weight_only(dequantize) and not dequantize.attributes.get_int("block_size", 0):
            _widen(graph, dequantize)
            _add_zero_point(graph, dequantize)
    store_weights(model, storage)
    if model.opset_imports[""] >= 21:
        for dequantize in filter(is_weight_only, weight_dequantizers(graph)):
            _shield_transpose(graph, dequantize)
    for node in list(graph):
        if _loses_bias(node):
            _split_bias(graph, node)
        if node.op_type in _WEIGHTED and constant(node.inputs[1]) is not None and is_quantized(node.inputs[0]):
            _shield_float_weight(graph, node)
    common.RemoveUnusedNodesPass()(model)  # codes and scales that were replaced
    return model


def _loses_bias(layer: ir.Node) -> bool:
    """Whether a layer's bias must be added behind it: the runtime would change its codes, or run on a slower kernel for it."""
    if layer.op_type == "Conv":
        return _bias_error(layer) > _BIAS_ERROR
    if layer.op_type not in {"Gemm", "ConvTranspose"}:
        return False
    weight = producer(layer.inputs[1], "DequantizeLinear")
    if weight is None or weight.attributes.get_int("block_size", 0) != 0:
        return False
    # There is no integer kernel for transposed convolutions, yet the runtime rounds their biases as if there were.
    return layer.op_type == "ConvTranspose" or not is_weight_only(weight)


_BIAS_ERROR = 0.08
"""Largest error of a rounded bias, in steps of the output: a little less than what parity checks allow with fusions."""


def _to_unsigned(graph: ir.Graph, quantize: ir.Node, positive: set[ir.Value | None]) -> None:
    """Give one quantizer uint8 codes; narrower ranges and ReLUs move onto the integers."""
    source, low, high = absorbed_clamps(quantize)
    if low == 0 or quantize.inputs[0] in positive:
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


def has_signed_codes(quantize: ir.Node) -> bool:
    """Whether a quantizer puts out int8 codes."""
    zero_point = constant(quantize.inputs[2] if len(quantize.inputs) > 2 else None)
    if zero_point is None:
        return quantize.attributes.get_int("output_dtype", 0) == ir.DataType.INT8
    return bool(zero_point.dtype == np.int8)


def make_unsigned(graph: ir.Graph, quantize: ir.Node, zero_point: int) -> None:
    """Give a quantizer uint8 codes with a zero point, and tell those that read them."""
    zero = initializer(graph, f"zero_point_u8_{zero_point}", np.asarray(zero_point, dtype=np.uint8))
    quantize.attributes.pop("output_dtype", None)
    quantize.outputs[0].dtype = ir.DataType.UINT8
    for node in (quantize, *(use.node for use in quantize.outputs[0].uses())):
        node.resize_inputs(3)
        node.replace_input_with(2, zero)


def code_range(quantize: ir.Node) -> tuple[int, int]:
    """Lowest and highest code of an 8-bit quantizer, less its zero point."""
    zero_point = int(scalar(quantize.inputs[2] if len(quantize.inputs) > 2 else None, 0.0))
    low, high = (-128, 127) if has_signed_codes(quantize) else (0, 255)
    return low - zero_point, high - zero_point


def absorbed_clamps(quantize: ir.Node) -> tuple[ir.Value, int, int]:
    """The value in front of the clamps before a quantizer, and the codes, less the zero point, that stand for those clamps.

    Rounding is monotonic, so quantizing a clamped value is clamping the quantized one.
    """
    source = quantize.inputs[0]
    assert source is not None
    scale = np.float32(scalar(quantize.inputs[1], 0.0))
    low, high = lowest, highest = code_range(quantize)
    while (node := producer(source, "Relu", "Clip")) is not None:
        if node.op_type == "Relu":
            bounds = (0.0, np.inf)
        else:
            optional = [*node.inputs[1:], None, None]
            bounds = (scalar(optional[0], -np.inf), scalar(optional[1], np.inf))
        codes = np.clip(np.rint(np.asarray(bounds, dtype=np.float32) / scale), lowest, highest)
        low, high = max(low, int(codes[0])), min(high, int(codes[1]))
        source = node.inputs[0]
        assert source is not None
        if only_consumer(node.outputs[0]) is None:
            break
    return source, low, high


def non_negative_values(graph: ir.Graph) -> set[ir.Value | None]:
    """Values that cannot be negative, whatever the input."""
    positive: set[ir.Value | None] = set()
    for node in graph:
        if (
            node.op_type in _NON_NEGATIVE
            or (node.op_type == "Clip" and len(node.inputs) > 1 and scalar(node.inputs[1], -np.inf) >= 0)
            or (node.op_type in _KEEP_SIGN and node.inputs[0] in positive)
            or (node.op_type in _JOIN and all(value in positive or _holds_no_negative(value) for value in node.inputs))
        ):
            positive.update(node.outputs)
    return positive


def _holds_no_negative(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and bool((array >= 0).all())


def _widen(graph: ir.Graph, dequantize: ir.Node) -> None:
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


def _shield_transpose(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Write one scale per channel of a transposed int8 weight as one block per row: the same numbers.

    From opset 21 on ONNX Runtime would move the transpose in front of DequantizeLinear and then fuse that with the MatMul into
    MatMulNBits, which rounds activations to 8 bits that the model never had. It does not look through blocks, and leaves 4-bit
    codes and Gemm alone.
    """
    codes, scale = stored_codes(dequantize), constant(dequantize.inputs[1])
    assert scale is not None
    transposed = any(use.node.op_type == "Transpose" for use in dequantize.outputs[0].uses())
    if not transposed or codes.dtype != np.int8 or scale.ndim != 1 or dequantize.attributes.get_int("axis", 1) != 0:
        return
    assert dequantize.inputs[1] is not None
    column = initializer(graph, f"{dequantize.inputs[1].name}.column", scale.reshape(-1, 1))
    dequantize.replace_input_with(1, column)
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
    dequantize.attributes["block_size"] = ir.AttrInt64("block_size", codes.shape[1])


def _shield_float_weight(graph: ir.Graph, layer: ir.Node) -> None:
    """Clip a layer's quantized input to the range of float32, which changes nothing.

    The runtime would quantize a float weight that it finds between DequantizeLinear and QuantizeLinear on its own
    (``WeightBiasQuantization``); it does not look through a Clip.
    """
    if all(output.is_graph_output() for output in layer.outputs):
        return
    limit = np.finfo(np.float32).max
    bounds = [
        initializer(graph, f"float32_{name}", np.asarray(sign * limit, np.float32))
        for name, sign in (("lowest", -1), ("highest", 1))
    ]
    clip = ir.node("Clip", [layer.inputs[0], *bounds], name=f"{layer.name}/Clip")
    clip.outputs[0].name, clip.outputs[0].dtype = f"{clip.name}:out", ir.DataType.FLOAT
    graph.insert_before(layer, clip)
    layer.replace_input_with(0, clip.outputs[0])


def _bias_error(conv: ir.Node) -> float:
    """By how many steps of its output the runtime would change a convolution's bias, at most; 0 where it would not.

    It rounds the bias to a multiple of the input's scale times the weight's.
    """
    weight, source = (producer(value, "DequantizeLinear") for value in (conv.inputs[1], conv.inputs[0]))
    behind = only_consumer(conv.outputs[0])
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if bias is None or weight is None or source is None or behind is None or behind.op_type != "QuantizeLinear":
        return 0.0
    of_weight, of_input, of_output = (constant(node.inputs[1]) for node in (weight, source, behind))
    if of_weight is None or of_input is None or of_output is None or of_weight.size not in {1, bias.size}:
        return 0.0
    unit = of_weight.astype(np.float64).reshape(-1) * float(of_input.max())
    return float(np.abs(bias - np.rint(bias / unit) * unit).max() / of_output.min())


def _split_bias(graph: ir.Graph, layer: ir.Node) -> None:
    """Add the float bias of a layer behind it, where it stays exact.

    A Gemm with its bias inside computes in float; a convolution without gives its integer kernel up.
    """
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    if bias is None:
        return
    values = constant(bias)
    if layer.op_type != "Gemm" and values is not None:
        rank = 2 + len(layer.attributes.get_ints("kernel_shape", (1, 1)))
        bias = initializer(graph, f"{layer.name}.bias", values.reshape(-1, *[1] * (rank - 2)))
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
