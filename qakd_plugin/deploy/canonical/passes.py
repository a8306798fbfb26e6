"""From what the exporter wrote to the canonical graph: int8, zero point 0, BatchNorm folded, nothing local left in the file.

Every pass here is exact: it changes how the numbers are computed, never which numbers come out (float rounding aside).
"""

from __future__ import annotations

import ast
import logging

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from .graph import (
    QUANTIZER_KEY,
    WEIGHT_KEY,
    activation_quantizers,
    constant,
    identity,
    initializer,
    is_linear_weight,
    is_weight_only,
    only_consumer,
    producer,
    replace,
    scalar,
    weight_dequantizers,
)

_log = logging.getLogger(__name__)
DOMAIN = "qakd"
"""Domain of the operators that carry quantizers through the exporter."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def canonicalize(model: ir.Model) -> ir.Model:
    """Run all passes on a freshly exported model, in place."""
    graph = model.graph
    name_nodes(graph)
    lower_quantizers(graph)
    fold_batch_norm(graph)
    quantize_behind_relu(graph)
    merge_clips(graph)
    carry_through_max_pool(graph)
    merge_equal_quantizers(graph)
    pack_int4(graph)
    raise_opset(model)
    _clean(model)
    return model


def to_tensorrt_form(model: ir.Model) -> ir.Model:
    """Canonical -> what TensorRT takes at its smallest: 4-bit weights of linear layers in 4 bits; in place."""
    pack_int4(model.graph, beside_int8=True)
    raise_opset(model)
    common.RemoveUnusedNodesPass()(model)
    return model


def name_nodes(graph: ir.Graph) -> None:
    """Name every node and value after the module it came from."""
    used: dict[str, int] = {}
    for node in graph:
        name = node.attributes.get_string("name", "") if node.domain == DOMAIN else ""
        if not name:
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
            name = f"{scopes[-2]}/{node.op_type}" if len(scopes) > 1 and scopes[-2] else node.op_type
        count = used.get(name, 0)
        used[name] = count + 1
        node.name = f"{name}#{count}" if count else name
        for index, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{node.name}:{index}" if len(node.outputs) > 1 else f"{node.name}:out"


def lower_quantizers(graph: ir.Graph) -> None:
    """Turn ``QDQ`` and ``DQ`` into QuantizeLinear and DequantizeLinear, and label them for parity checks.

    A float Clip goes in front where the grid is narrower than its container. A module that is called several times labels its
    quantizers ``name``, ``name#1``, ``name#2`` in the order of the calls.
    """
    for node in [node for node in graph if node.domain == DOMAIN]:
        (_lower_activation if node.op_type == "QDQ" else _lower_weight)(graph, node)


def _lower_activation(graph: ir.Graph, node: ir.Node) -> None:
    name, (x, scale) = node.name, node.inputs
    assert name is not None
    attributes = node.attributes
    zero_point, low, high = (attributes.get_int(key) for key in ("zero_point", "quant_min", "quant_max"))
    step = constant(scale)
    assert zero_point is not None
    assert low is not None
    assert high is not None
    assert step is not None
    unsigned = low >= 0 and (zero_point != 0 or high > 127)
    container = (0, 255) if unsigned else (-128, 127)
    kind = np.uint8 if unsigned else np.int8
    zero = initializer(graph, f"zero_point_{kind.__name__}_{zero_point}", np.asarray(zero_point, dtype=kind))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}/QuantizeLinear")
    quantize.metadata_props[QUANTIZER_KEY] = name
    quantize.outputs[0].dtype = ir.DataType.UINT8 if unsigned else ir.DataType.INT8
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}/DequantizeLinear")
    new = [quantize, dequantize]
    if (low, high) != container:
        clip = ir.node("Clip", [x], name=f"{name}/Clip")
        limits = np.asarray([low - zero_point, high - zero_point], dtype=np.float32) * step.reshape(())
        quantize.replace_input_with(0, clip.outputs[0])
        new.insert(0, clip)
    for made in new:
        made.outputs[0].name = f"{made.name}:out"
    graph.insert_before(node, new)
    if (low, high) != container:
        _set_bounds(graph, clip, float(limits[0]), float(limits[1]))
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


def fold_batch_norm(graph: ir.Graph) -> None:
    """``DQ(q, s) -> Conv -> BatchNorm`` becomes ``DQ(sign(a) q, s |a|) -> Conv`` with a float bias, a = gamma / sigma.

    Integer codes stay as trained, up to the sign of a channel. A channel with gamma = 0 puts out its beta: its codes become 0.
    Left alone, with a warning, where a code -128 would have to change its sign.
    """
    for node in list(graph):
        if node.op_type != "BatchNormalization" or any(output.uses() for output in node.outputs[1:]):
            continue
        conv = producer(node.inputs[0], "Conv")
        if conv is None or only_consumer(conv.outputs[0]) is not node:
            continue
        dequantize = producer(conv.inputs[1], "DequantizeLinear")
        numbers = [constant(value) for value in node.inputs[1:5]]
        if dequantize is None or any(number is None for number in numbers):
            continue
        codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
        if codes is None or scale is None or only_consumer(dequantize.outputs[0]) is not conv:
            continue
        gamma, beta, mean, variance = (np.asarray(number, dtype=np.float64) for number in numbers)
        factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        flipped = factor < 0
        if bool((codes[flipped] == -128).any()):
            _log.warning(
                "%s: BatchNorm stays in the graph: a weight code of -128 would have to change its sign. "
                "Train with a narrow range (-127..127) to have it folded.",
                conv.name,
            )
            continue
        sign = np.where(factor == 0, 0, np.where(flipped, -1, 1)).astype(np.int8).reshape(-1, *[1] * (codes.ndim - 1))
        new_scale = np.where(factor == 0, 1.0, np.abs(factor)) * scale.astype(np.float64).reshape(-1)
        old_bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
        bias = beta - mean * factor + (0.0 if old_bias is None else old_bias.astype(np.float64) * factor)
        layer = dequantize.metadata_props.get(WEIGHT_KEY, conv.name or "conv")
        dequantize.replace_input_with(0, initializer(graph, f"{layer}.folded_codes", codes * sign))
        dequantize.replace_input_with(1, initializer(graph, f"{layer}.folded_scale", new_scale.astype(np.float32)))
        dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)
        folded_bias = initializer(graph, f"{layer}.folded_bias", bias.astype(np.float32))
        conv.resize_inputs(3)
        conv.replace_input_with(2, folded_bias)
        replace(node, conv.outputs[0])


def quantize_behind_relu(graph: ir.Graph) -> None:
    """``[Clip ->] Q -> DQ -> Relu`` becomes ``Relu -> [Clip ->] Q -> DQ``: with zero point 0 both are the same.

    So every runtime sees the form that it fuses. ``Clip(0, c)`` moves likewise where c is not below the highest code's value.
    """
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        dequantize = only_consumer(quantize.outputs[0])
        relu = None if dequantize is None else only_consumer(dequantize.outputs[0])
        if dequantize is None or relu is None or not _is_relu(relu) or _zero_point(quantize) != 0:
            continue
        clip = producer(quantize.inputs[0], "Clip")
        if clip is not None and only_consumer(clip.outputs[0]) is not quantize:
            clip = None
        scale = np.float32(scalar(quantize.inputs[1], 0.0))
        top = np.float32(255 if quantize.outputs[0].dtype == ir.DataType.UINT8 else 127)
        highest = top * scale if clip is None else np.float32(scalar(clip.inputs[2], np.inf))
        if relu.op_type == "Clip" and not scalar(relu.inputs[2], np.inf) >= highest:
            continue
        first = clip if clip is not None else quantize
        moved = ir.node("Relu", [first.inputs[0]], name=relu.name)
        moved.outputs[0].name = f"{relu.name}:moved"
        graph.insert_before(first, moved)
        first.replace_input_with(0, moved.outputs[0])
        replace(relu, dequantize.outputs[0])


def quantizers_behind_relu(graph: ir.Graph) -> set[str]:
    """Labels of quantizers that read what a ReLU lets through: see :func:`quantize_behind_relu`, which moves them there."""
    found: set[str] = set()
    for quantize in activation_quantizers(graph):
        clamp = producer(quantize.inputs[0], "Relu", "Clip")
        if clamp is not None and _is_relu(clamp):
            found.update(quantize.metadata_props.get(QUANTIZER_KEY, "").split(","))
    return found


def merge_clips(graph: ir.Graph) -> None:
    """``Relu -> Clip`` and ``Clip -> Clip`` become one Clip, where nothing else reads what is between."""
    for node in list(graph):
        before = producer(node.inputs[0], "Relu", "Clip") if node.op_type == "Clip" else None
        if before is None or only_consumer(before.outputs[0]) is not node:
            continue
        low, high = _bounds(node)
        before_low, before_high = _bounds(before)
        node.replace_input_with(0, before.inputs[0])
        low, high = max(low, before_low), min(high, before_high)
        _set_bounds(graph, node, low, high)
        graph.remove(before, safe=True)


def carry_through_max_pool(graph: ir.Graph) -> None:
    """Repeat a quantizer behind a MaxPool that has none: the pooled values lie on the same grid already.

    With it ONNX Runtime and TensorRT keep the pooling and what follows in integers.
    """
    for node in list(graph):
        if node.op_type != "MaxPool" or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        dequantize = producer(node.inputs[0], "DequantizeLinear")
        readers = list(node.outputs[0].uses())
        if dequantize is None or all(_leads_to_quantize(use.node) for use in readers):
            continue
        again = ir.node("QuantizeLinear", [node.outputs[0], *dequantize.inputs[1:]], name=f"{node.name}/QuantizeLinear")
        back = ir.node("DequantizeLinear", [again.outputs[0], *dequantize.inputs[1:]], name=f"{node.name}/DequantizeLinear")
        again.outputs[0].name, back.outputs[0].name = f"{again.name}:out", f"{back.name}:out"
        graph.insert_after(node, [again, back])
        for use in readers:
            use.node.replace_input_with(use.idx, back.outputs[0])


def merge_equal_quantizers(graph: ir.Graph) -> None:
    """Two quantizers with the same input and the same numbers become one, which keeps both labels."""
    seen: dict[tuple[object, ...], ir.Node] = {}
    for node in list(graph):
        if node.op_type not in {"Clip", "QuantizeLinear", "DequantizeLinear"}:
            continue
        axis = node.attributes.get_int("axis", 1)
        key = (node.op_type, node.inputs[0], axis, *(identity(value) for value in node.inputs[1:]))
        kept = seen.setdefault(key, node)
        if kept is node or node.outputs[0].is_graph_output():
            continue
        if QUANTIZER_KEY in node.metadata_props:
            labels = [kept.metadata_props.get(QUANTIZER_KEY), node.metadata_props[QUANTIZER_KEY]]
            kept.metadata_props[QUANTIZER_KEY] = ",".join(label for label in labels if label)
        replace(node, kept.outputs[0])


def pack_int4(graph: ir.Graph, *, beside_int8: bool = False) -> None:
    """Store codes -8..7 of linear layers in 4 bits, where every target can take them: where activations are in float.

    All other weights of few bits stay in INT8: ONNX Runtime's integer kernels read INT8 only, and TensorRT has no 4-bit
    convolution beside 8-bit activations.

    Args:
        graph: changed in place.
        beside_int8: pack linear layers with quantized activations as well, which TensorRT takes with one scale per output
            channel; it fails to build one scale for all, and applies the first of several blocks to all.
    """
    for dequantize in weight_dequantizers(graph):
        codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
        assert codes is not None
        assert scale is not None
        fits = codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
        taken = is_linear_weight(dequantize) if beside_int8 else is_weight_only(dequantize)
        if fits and scale.ndim > 0 and taken:
            value = dequantize.inputs[0]
            assert value is not None
            packed = initializer(graph, f"{value.name}.int4", codes.astype(ml_dtypes.int4))
            dequantize.replace_input_with(0, packed)


def raise_opset(model: ir.Model) -> None:
    """Declare opset 21 where blocks or 4-bit codes need it."""
    nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    if any(node.attributes.get_int("block_size", 0) or _is_int4(node.inputs[0]) for node in nodes):
        declare_opset(model, 21)


def declare_opset(model: ir.Model, version: int) -> None:
    """Declare an opset from 21 to 25, in the form that ONNX Runtime loads.

    There an int8 QuantizeLinear with a zero point in front of MaxPool or Reshape fails to load (onnxruntime#25526); without one
    and with ``output_dtype`` it does not. No other operator that the exporter writes changed from 20 on but in the types it
    takes.
    """
    model.opset_imports[""] = max(version, model.opset_imports[""])
    for quantize in activation_quantizers(model.graph):
        zero_point = constant(quantize.inputs[2] if len(quantize.inputs) > 2 else None)
        if zero_point is None or zero_point.dtype != np.int8 or zero_point.any():
            continue
        quantize.resize_inputs(2)
        quantize.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.INT8.value)
        for use in quantize.outputs[0].uses():
            if use.node.op_type == "DequantizeLinear":
                use.node.resize_inputs(2)


def _is_int4(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.INT4


def _clean(model: ir.Model) -> None:
    """Remove what the exporter leaves behind: local paths, stack traces, unused values."""
    ours = {
        node: {key: node.metadata_props[key] for key in (QUANTIZER_KEY, WEIGHT_KEY) if key in node.metadata_props}
        for node in model.graph
    }
    common.ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for node, metadata in ours.items():
        node.metadata_props.update(metadata)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    common.RemoveUnusedNodesPass()(model)
    model.functions.clear()
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name, model.producer_version = "qakd_plugin", ""
    model.graph.name = "student"


def _is_relu(node: ir.Node) -> bool:
    return node.op_type == "Relu" or (node.op_type == "Clip" and _bounds(node)[0] == 0)


def _bounds(node: ir.Node) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, np.inf
    low = scalar(node.inputs[1], -np.inf) if len(node.inputs) > 1 else -np.inf
    return low, scalar(node.inputs[2], np.inf) if len(node.inputs) > 2 else np.inf


def _set_bounds(graph: ir.Graph, node: ir.Node, low: float, high: float) -> None:
    node.resize_inputs(3)
    for index, (name, bound) in enumerate((("min", low), ("max", high)), start=1):
        value = None
        if np.isfinite(bound):
            graph.initializers.pop(f"{node.name}.{name}", None)  # of an earlier call
            value = initializer(graph, f"{node.name}.{name}", np.asarray(bound, dtype=np.float32))
        node.replace_input_with(index, value)


def _zero_point(node: ir.Node) -> float:
    return scalar(node.inputs[2], 0.0) if len(node.inputs) > 2 else 0.0


def _leads_to_quantize(node: ir.Node) -> bool:
    if node.op_type == "Clip":
        return all(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses())
    return node.op_type == "QuantizeLinear"
