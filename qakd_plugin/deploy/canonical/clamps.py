"""ReLU and Clip around quantizers: moved where runtimes fuse them, merged, and read as ranges of codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph import activation_quantizers, constant, initializer, only_consumer, producer, replace, scalar
from .labels import Call, calls_in, labels_of


class QuantizeAfterRelu(InPlacePass):
    """``[Clip ->] Q -> DQ -> Relu`` becomes ``Relu -> [Clip ->] Q -> DQ``: with zero point 0 both are the same.

    So every runtime sees what it fuses. ``Clip(0, c)`` moves likewise where c is not below the highest code's value.
    """

    def call(self, model: ir.Model) -> PassResult:
        moved = [_move_relu(model.graph, quantize) for quantize in list(activation_quantizers(model.graph))]
        return PassResult(model, modified=any(moved))


class MergeClips(InPlacePass):
    """``Relu -> Clip`` and ``Clip -> Clip`` become one Clip, where nothing else reads what is between."""

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            before = producer(node.inputs[0], "Relu", "Clip") if node.op_type == "Clip" else None
            if before is None or only_consumer(before.outputs[0]) is not node:
                continue
            (low, high), (before_low, before_high) = bounds(node), bounds(before)
            node.replace_input_with(0, before.inputs[0])
            set_bounds(model.graph, node, max(low, before_low), min(high, before_high))
            model.graph.remove(before, safe=True)
            modified = True
        return PassResult(model, modified)


def quantizers_after_relu(graph: ir.Graph) -> set[Call]:
    """Calls of quantizers that read what a ReLU lets through: see :class:`QuantizeAfterRelu`, which moves them there."""
    found: set[Call] = set()
    for quantize in activation_quantizers(graph):
        clamp = producer(quantize.inputs[0], "Relu", "Clip")
        if clamp is not None and _is_relu(clamp):
            found.update(calls_in(labels_of(quantize)))
    return found


def absorbed_clamps(quantize: ir.Node) -> tuple[ir.Value, int, int]:
    """The value in front of the clamps before a quantizer, and the codes, less the zero point, that stand for those clamps.

    Rounding is monotonic, so quantizing a clamped value is clamping the quantized one.
    """
    source = quantize.inputs[0]
    assert source is not None
    scale = np.float32(scalar(quantize.inputs[1], 0.0))
    low, high = lowest, highest = code_range(quantize)
    while (node := producer(source, "Relu", "Clip")) is not None:
        codes = np.clip(np.rint(np.asarray(bounds(node), dtype=np.float32) / scale), lowest, highest)
        low, high = max(low, int(codes[0])), min(high, int(codes[1]))
        source = node.inputs[0]
        assert source is not None
        if only_consumer(node.outputs[0]) is None:
            break
    return source, low, high


def code_range(quantize: ir.Node) -> tuple[int, int]:
    """Lowest and highest code of an 8-bit quantizer, less its zero point."""
    zero_point = int(_zero_point(quantize))
    low, high = (-128, 127) if has_signed_codes(quantize) else (0, 255)
    return low - zero_point, high - zero_point


def has_signed_codes(quantize: ir.Node) -> bool:
    """Whether a quantizer outputs int8 codes."""
    zero_point = constant(quantize.inputs[2] if len(quantize.inputs) > 2 else None)
    if zero_point is None:
        return quantize.attributes.get_int("output_dtype", 0) == ir.DataType.INT8
    return bool(zero_point.dtype == np.int8)


def bounds(clamp: ir.Node) -> tuple[float, float]:
    """Lowest and highest output of a ReLU or Clip."""
    if clamp.op_type == "Relu":
        return 0.0, np.inf
    low, high, *_ = [*clamp.inputs[1:], None, None]
    return scalar(low, -np.inf), scalar(high, np.inf)


def set_bounds(graph: ir.Graph, clip: ir.Node, low: float, high: float) -> None:
    """Let a Clip end at ``low`` and ``high``, infinite where it has no such end."""
    clip.resize_inputs(3)
    for index, (name, bound) in enumerate((("min", low), ("max", high)), start=1):
        clip.replace_input_with(index, None)
        graph.initializers.pop(f"{clip.name}.{name}", None)  # of an earlier call
        if np.isfinite(bound):
            clip.replace_input_with(index, initializer(graph, f"{clip.name}.{name}", np.asarray(bound, dtype=np.float32)))


def _move_relu(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Move what follows a quantizer in front of it, where it is a ReLU that may go there; returns whether it did."""
    dequantize = only_consumer(quantize.outputs[0])
    relu = None if dequantize is None else only_consumer(dequantize.outputs[0])
    if dequantize is None or relu is None or not _is_relu(relu) or _zero_point(quantize) != 0:
        return False
    clip = producer(quantize.inputs[0], "Clip")
    if clip is not None and only_consumer(clip.outputs[0]) is not quantize:
        clip = None
    scale = np.float32(scalar(quantize.inputs[1], 0.0))
    top = np.float32(255 if quantize.outputs[0].dtype == ir.DataType.UINT8 else 127)
    highest = top * scale if clip is None else np.float32(bounds(clip)[1])
    if relu.op_type == "Clip" and not bounds(relu)[1] >= highest:
        return False
    first = quantize if clip is None else clip
    moved = ir.node("Relu", [first.inputs[0]], name=relu.name)
    moved.outputs[0].name = f"{relu.name}:moved"
    graph.insert_before(first, moved)
    first.replace_input_with(0, moved.outputs[0])
    replace(relu, dequantize.outputs[0])
    return True


def _is_relu(node: ir.Node) -> bool:
    return node.op_type in {"Relu", "Clip"} and bounds(node)[0] == 0


def _zero_point(quantize: ir.Node) -> float:
    return scalar(quantize.inputs[2], 0.0) if len(quantize.inputs) > 2 else 0.0
