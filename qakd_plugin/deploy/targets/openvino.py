"""Canonical graph -> the form OpenVINO's CPU kernels are fastest with. Exact: the same codes, the same numbers.

Its integer kernels are made for unsigned activations. What cannot be negative gets unsigned codes, of which it fills the lower
half; the clamps in front become one, which also ends where the signed codes did:

    Conv -> [Relu | Clip(0, c)]* -> Q(s8, s) -> DQ
becomes
    Conv -> Clip(0, q_max * s) -> Q(u8, zero point 0, s) -> DQ

The runtime fuses that clamp into the convolution. Tensors of both signs stay as they are.

A 1x1 convolution with a stride, as in the shortcut of a residual block, reads one position in every few. The runtime picks
those positions further up, and where no other layer reads the codes it does so between quantizing and dequantizing, after
which it no longer sees an integer convolution. Picking them after the dequantizer is the same, and it does:

    Q -> DQ -> Conv(1x1, stride n)
becomes
    Q -> DQ -> MaxPool(1x1, stride n) -> Conv(1x1)

torch.ao FX repeats a quantizer after every operator that only moves numbers. Quantizing what lies on the grid already changes
nothing, but the runtime would do it each time; see :func:`drop_repeated_quantizers`.

Tensors of different grids that are concatenated and then quantized are brought onto one coarser grid by the runtime, which
changes the numbers. Quantizing each of them is the same as quantizing all; see :func:`quantize_before_concat`.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.clamps import absorbed_clamps, has_signed_codes
from ..canonical.graph import (
    activation_quantizers,
    copied,
    identity,
    initializer,
    kernel_shape,
    only_consumer,
    producer,
    replace,
    scalar,
)
from ..canonical.quantizers import make_unsigned
from ..canonical.sign_analysis import non_negative_values
from .weight_packing import WeightStorage, store_weights

_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def to_openvino_form(model: ir.Model, storage: WeightStorage = "int4") -> ir.Model:
    """A copy of a canonical model in OpenVINO's form, weights stored as :func:`.weight_packing.store_weights` does."""
    model = copied(model)
    graph = model.graph
    non_negative = non_negative_values(graph)
    for quantize in list(activation_quantizers(graph)):
        if quantize.inputs[0] in non_negative and has_signed_codes(quantize):
            _clamp_once(graph, quantize)
            make_unsigned(graph, quantize, 0)
    for node in list(graph):
        if _picks_positions(node):
            _pick_before(graph, node)
    common.RemoveUnusedNodesPass()(model)  # the clamps that were merged
    store_weights(model, storage)
    return model


def drop_repeated_quantizers(model: ir.Model) -> ir.Model:
    """A copy without quantizers whose input lies on their own grid and within their range. Exact.

    Quantizers that layers, sums and concatenations read stay: by them everybody sees, :mod:`.diagnosis` among them, that their
    inputs are quantized. To be called on what :func:`to_openvino_form` returns, after parity has been checked, which asks for
    the codes of every quantizer.
    """
    model = copied(model)
    for quantize in list(activation_quantizers(model.graph)):
        source, grid, low, high = _range(quantize)
        found = _moved_range(source)
        repeats = found is not None and found[0] == grid and low <= found[1] and found[2] <= high
        for dequantize in [use.node for use in quantize.outputs[0].uses()] if repeats else ():
            if _leads_on(dequantize.outputs[0]):
                replace(dequantize, source)
    common.RemoveUnusedNodesPass()(model)
    return model


def quantize_before_concat(model: ir.Model) -> ir.Model:
    """A copy that quantizes what is concatenated one by one, where its parts come from different grids.

        Concat -> [Clip ->] Q -> DQ
    becomes
        [Clip ->] Q -> DQ -> Concat

    To be called after parity has been checked, as :func:`drop_repeated_quantizers` is.
    """
    model = copied(model)
    for quantize in list(activation_quantizers(model.graph)):
        steps = _from_concat(quantize)
        if steps and _differ_in_grid(steps[0]):
            _quantize_parts(model.graph, steps)
    return model


def _from_concat(quantize: ir.Node) -> list[ir.Node]:
    """A Concat, the clamp after it, a quantizer and its dequantizer, where nobody else reads what is between; or nothing."""
    dequantize = only_consumer(quantize.outputs[0])
    clip = producer(quantize.inputs[0], "Clip")
    first = quantize if clip is None else clip
    concat = producer(first.inputs[0], "Concat")
    if concat is None or dequantize is None or dequantize.outputs[0].is_graph_output():
        return []
    steps = [concat, *([] if clip is None else [clip]), quantize, dequantize]
    return steps if all(only_consumer(one.outputs[0]) is other for one, other in pairwise(steps)) else []


def _differ_in_grid(concat: ir.Node) -> bool:
    grids = [_grid(part) for part in concat.inputs]
    return len({grid for grid in grids if grid is not None}) > 1


def _grid(value: ir.Value | None) -> object:
    """Numbers of the dequantizer that a value comes from by operators that its codes pass through; None where there is none."""
    node = producer(value, "DequantizeLinear", "MaxPool", "Resize", *_MOVES)
    while node is not None and node.op_type != "DequantizeLinear":
        node = producer(node.inputs[0], "DequantizeLinear", "MaxPool", "Resize", *_MOVES)
    return None if node is None else tuple(identity(number) for number in node.inputs[1:])


def _quantize_parts(graph: ir.Graph, steps: list[ir.Node]) -> None:
    concat, *rest = steps
    parts: list[ir.Value | None] = []
    for index, part in enumerate(concat.inputs):
        value = part
        for node in rest:
            again = ir.node(node.op_type, [value, *node.inputs[1:]], name=f"{node.name}/part_{index}")
            again.outputs[0].name, again.outputs[0].type = f"{again.name}:out", node.outputs[0].type
            graph.insert_before(concat, again)
            value = again.outputs[0]
        parts.append(value)
    joined = ir.node("Concat", parts, {"axis": concat.attributes.get_int("axis", 1)}, name=f"{concat.name}/quantized")
    joined.outputs[0].name, joined.outputs[0].dtype = f"{joined.name}:out", ir.DataType.FLOAT
    graph.insert_before(concat, joined)
    ir.convenience.replace_all_uses_with(rest[-1].outputs[0], joined.outputs[0])
    graph.remove([*reversed(rest), concat], safe=True)


def _leads_on(value: ir.Value) -> bool:
    """Whether only operators that move numbers of a single tensor, and quantizers, read a value."""
    readers = {use.node.op_type for use in value.uses()}
    return not value.is_graph_output() and readers <= {*_MOVES, "Clip", "QuantizeLinear"} - {"Concat"}


def _range(quantize: ir.Node) -> tuple[ir.Value, object, int, int]:
    """What a quantizer reads in front of its clamps, its grid, and its lowest and highest code."""
    source, low, high = absorbed_clamps(quantize)
    return source, tuple(identity(value) for value in quantize.inputs[1:]), low, high


def _moved_range(value: ir.Value | None) -> tuple[object, int, int] | None:
    """Grid, lowest and highest code of a value that comes from quantizers with one grid by operators that only move numbers."""
    node = producer(value, "DequantizeLinear", *_MOVES)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        quantize = producer(node.inputs[0], "QuantizeLinear")
        return None if quantize is None else _range(quantize)[1:]
    found = [_moved_range(source) for source in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    ranges = [one for one in found if one is not None]
    if len(ranges) < len(found) or any(grid != ranges[0][0] for grid, _, _ in ranges):
        return None
    return ranges[0][0], min(low for _, low, _ in ranges), max(high for _, _, high in ranges)


def _clamp_once(graph: ir.Graph, quantize: ir.Node) -> None:
    """One Clip for all clamps in front of a quantizer, and for the range of its codes."""
    scale = np.float32(scalar(quantize.inputs[1], 0.0))
    source, low, high = absorbed_clamps(quantize)
    bounds = [
        initializer(graph, f"{quantize.name}/{name}", np.asarray(code * scale, dtype=np.float32))
        for name, code in (("low", max(low, 0)), ("high", high))
    ]
    clip = ir.node("Clip", [source, *bounds], name=f"{quantize.name}/Clip")
    clip.outputs[0].name, clip.outputs[0].dtype = f"{clip.name}:out", ir.DataType.FLOAT
    graph.insert_before(quantize, clip)
    quantize.replace_input_with(0, clip.outputs[0])


def _picks_positions(conv: ir.Node) -> bool:
    """Whether a node is a convolution of single positions, not of all, of codes that nobody else reads."""
    if conv.op_type != "Conv":
        return False
    pads = conv.attributes.get_ints("pads", [])
    strides = conv.attributes.get_ints("strides", [])
    dequantize = producer(conv.inputs[0], "DequantizeLinear")
    return (
        set(kernel_shape(conv)) == {1}
        and max(strides, default=1) > 1
        and not any(pads)
        and dequantize is not None
        and only_consumer(dequantize.outputs[0]) is conv
        and dequantize.inputs[0] is not None
        and only_consumer(dequantize.inputs[0]) is dequantize
    )


def _pick_before(graph: ir.Graph, conv: ir.Node) -> None:
    """Let a MaxPool pick the positions that a 1x1 convolution with a stride reads."""
    strides = conv.attributes.get_ints("strides")
    ones = [1] * len(strides)
    pool = ir.node("MaxPool", [conv.inputs[0]], {"kernel_shape": ones, "strides": strides}, name=f"{conv.name}/pick")
    pool.outputs[0].name, pool.outputs[0].dtype = f"{pool.name}:out", ir.DataType.FLOAT
    graph.insert_before(conv, pool)
    conv.replace_input_with(0, pool.outputs[0])
    conv.attributes.add(ir.AttrInt64s("strides", ones))
