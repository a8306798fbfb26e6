"""What is changed of a file for ONNX Runtime that is proven already, so that what only moves numbers moves integers. Exact.

The runtime moves a dequantizer over a transpose or a reshape, but not over a concatenation or a split: what a channel shuffle
does between two layers is done in floating point, and quantized again for each layer that reads it. Where all parts lie on one
grid, moving codes is moving numbers:

    DQ, DQ -> Concat -> Reshape -> Transpose -> Reshape -> Split -> Q -> Clip_u8 -> DQ
becomes
    Concat -> Reshape -> Transpose -> Reshape -> Split -> DQ

Quantizing what lies on the grid already changes nothing, and neither does clipping codes again, which the runtime would do:
torch.ao FX repeats a quantizer after every operator that it does not fuse. Nor does clipping codes on a coarser grid that end
before the clip. The parity gate asks for the codes of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.clamps import bounds
from ..canonical.graph import activation_quantizers, copied, identity, is_stored, producer, replace, scalar

_JOINS = ("Concat", "Split")
_MOVES = ("Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Single tensors only: their further inputs are sizes and positions."""

_CHOOSES = ("MaxPool", *_JOINS, *_MOVES)
"""Operators that make no new number."""


def move_codes(model: ir.Model) -> ir.Model:
    """A copy of what :func:`.onnxruntime.to_onnxruntime_form` returned, after the gate; itself where nothing changes."""
    changed = copied(model)
    graph = changed.graph
    codes: dict[ir.Value, ir.Value] = {}
    moved = [_move(graph, node, codes) for node in list(graph) if node.op_type in _JOINS]
    common.RemoveUnusedNodesPass()(changed)  # what moved numbers, and dequantizers before it
    dropped = [_drop_quantizer(graph, node, codes) for node in list(activation_quantizers(graph))]
    if not any(moved) and not any(dropped):
        return model
    for node in list(graph):
        if node.op_type == "Clip" and node.outputs[0].dtype == ir.DataType.UINT8 and _clips_nothing(node):
            replace(node, node.inputs[0])  # type: ignore[arg-type]
    common.RemoveUnusedNodesPass()(changed)
    return changed


def _drop_quantizer(graph: ir.Graph, quantize: ir.Node, codes: dict[ir.Value, ir.Value]) -> bool:
    """Drop a quantizer whose input is dequantized with its own numbers, and maybe moved since; returns whether it was one."""
    dequantize = _dequantizer(quantize.inputs[0])
    if dequantize is None or _numbers(dequantize) != _numbers(quantize):
        return False
    replace(quantize, _codes(graph, quantize.inputs[0], codes))
    return True


def _clips_nothing(clip: ir.Node) -> bool:
    low, high = bounds(clip)
    lowest, highest = _code_bounds(clip.inputs[0])
    return low <= lowest and highest <= high


def _code_bounds(value: ir.Value | None) -> tuple[float, float]:
    """Lowest and highest code that a value can hold."""
    node = producer(value, "Clip", "QuantizeLinear", *_CHOOSES)
    if node is None:
        return 0.0, 255.0
    if node.op_type == "Clip":
        return bounds(node)
    if node.op_type != "QuantizeLinear":
        return _widest(map(_code_bounds, _sources(node)))
    (low, high), scale = _number_bounds(node.inputs[0]), np.float32(scalar(node.inputs[1], 0.0))
    codes = np.clip(np.rint(np.asarray([low, high], np.float32) / scale) + scalar(node.inputs[2], 0.0), 0, 255)
    return float(codes[0]), float(codes[1])


def _number_bounds(value: ir.Value | None) -> tuple[float, float]:
    """Lowest and highest number that a value can hold, as its quantizer reads it."""
    node = producer(value, "DequantizeLinear", *_CHOOSES)
    if node is None:
        return -np.inf, np.inf
    if node.op_type != "DequantizeLinear":
        return _widest(map(_number_bounds, _sources(node)))
    codes = np.asarray(_code_bounds(node.inputs[0]), np.float32) - np.float32(scalar(node.inputs[2], 0.0))
    numbers = codes * np.float32(scalar(node.inputs[1], 0.0))
    return float(numbers[0]), float(numbers[1])


def _sources(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs if node.op_type == "Concat" else node.inputs[:1]


def _widest(found: Iterable[tuple[float, float]]) -> tuple[float, float]:
    lows, highs = zip(*found, strict=True)
    return min(lows), max(highs)


def _move(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, ir.Value]) -> bool:
    """Let a Concat or Split move codes, and dequantize what it outputs; returns whether it can."""
    sources = list(node.inputs) if node.op_type == "Concat" else [node.inputs[0]]
    before = [_dequantizer(source) for source in sources]
    first = before[0]
    if first is None or any(one is None or _numbers(one) != _numbers(first) for one in before):
        return False
    if any(output.is_graph_output() for output in node.outputs):
        return False
    codes = [_codes(graph, source, known) for source in sources]
    for index, value in enumerate(codes):
        node.replace_input_with(index, value)
    for output in node.outputs:
        _dequantize(graph, node, output, first.inputs[1:])
    return True


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The dequantizer of codes that a value is, moved by operators on single tensors; None where it is something else."""
    node = producer(value, "DequantizeLinear", *_MOVES)
    while node is not None and node.op_type != "DequantizeLinear":
        node = producer(node.inputs[0], "DequantizeLinear", *_MOVES)
    return None if node is None or len(node.inputs) < 3 or is_stored(node) else node


def _numbers(node: ir.Node) -> tuple[object, ...]:
    return tuple(identity(value) for value in node.inputs[1:])


def _codes(graph: ir.Graph, value: ir.Value | None, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """The codes of a value from :func:`_dequantizer`, moved as its numbers are; ``known`` are those that were moved before."""
    node = None if value is None else value.producer()
    assert value is not None
    assert node is not None
    if node.op_type == "DequantizeLinear":
        codes = node.inputs[0]
        assert codes is not None
        return codes
    if value not in known:
        moved = ir.node(node.op_type, [_codes(graph, node.inputs[0], known), *node.inputs[1:]], name=f"{node.name}/codes")
        moved.attributes.update(node.attributes)
        output = moved.outputs[0]
        output.name, output.dtype, output.shape = f"{moved.name}:out", ir.DataType.UINT8, value.shape
        graph.insert_after(node, moved)
        known[value] = output
    return known[value]


def _dequantize(graph: ir.Graph, node: ir.Node, output: ir.Value, numbers: Sequence[ir.Value | None]) -> None:
    """Dequantize an output of a node that moves codes now."""
    dequantize = ir.node("DequantizeLinear", [output, *numbers], name=f"{output.name}/DequantizeLinear")
    made = dequantize.outputs[0]
    made.name, made.dtype, made.shape = f"{dequantize.name}:out", ir.DataType.FLOAT, output.shape
    graph.insert_after(node, dequantize)
    ir.convenience.replace_all_uses_with(output, made)
    dequantize.replace_input_with(0, output)
    output.dtype = ir.DataType.UINT8
