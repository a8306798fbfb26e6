"""What is changed of a file for ONNX Runtime that is proven already, so that what only moves numbers moves integers. Exact.

The runtime moves a dequantizer over a transpose or a reshape, but not over a concatenation or a split: what a channel shuffle
does between two layers is done in floating point, and quantized again for each layer that reads it. Where all parts lie on one
grid, moving codes is moving numbers:

    DQ, DQ -> Concat -> Reshape -> Transpose -> Reshape -> Split -> Q -> Clip_u8 -> DQ
becomes
    Concat -> Reshape -> Transpose -> Reshape -> Split -> DQ

Quantizing what lies on the grid already changes nothing, and neither does clipping codes again, which the runtime would do:
torch.ao FX repeats a quantizer after every operator that it does not fuse. The parity gate asks for the codes of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.clamps import bounds
from ..canonical.graph import activation_quantizers, copied, identity, is_stored, producer, replace

_JOINS = ("Concat", "Split")
_MOVES = ("Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Single tensors only: their further inputs are sizes and positions."""


def move_codes(model: ir.Model) -> ir.Model:
    """A copy of what :func:`.onnxruntime.to_onnxruntime_form` returned, after the gate; itself where nothing changes."""
    changed = copied(model)
    graph = changed.graph
    moved = [_move(graph, node) for node in list(graph) if node.op_type in _JOINS]
    common.RemoveUnusedNodesPass()(changed)  # what moved numbers, and dequantizers before it
    dropped = [_drop_quantizer(node) for node in list(activation_quantizers(graph))]
    if not any(moved) and not any(dropped):
        return model
    for node in list(graph):
        if node.op_type == "Clip" and node.outputs[0].dtype == ir.DataType.UINT8 and _clips_nothing(node):
            replace(node, node.inputs[0])  # type: ignore[arg-type]
    common.RemoveUnusedNodesPass()(changed)
    return changed


def _drop_quantizer(quantize: ir.Node) -> bool:
    """Drop a quantizer whose input is dequantized with its own numbers; returns whether it was one."""
    dequantize = producer(quantize.inputs[0], "DequantizeLinear")
    if dequantize is None or _numbers(dequantize) != _numbers(quantize):
        return False
    codes = dequantize.inputs[0]
    assert codes is not None
    replace(quantize, codes)
    return True


def _clips_nothing(clip: ir.Node) -> bool:
    low, high = bounds(clip)
    lowest, highest = _code_bounds(clip.inputs[0])
    return low <= lowest and highest <= high


def _code_bounds(value: ir.Value | None) -> tuple[float, float]:
    """Lowest and highest code that a value can hold."""
    node = producer(value, "Clip", "MaxPool", *_JOINS, *_MOVES)
    if node is None:
        return 0.0, 255.0
    if node.op_type == "Clip":
        return bounds(node)
    found = [_code_bounds(source) for source in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    return min(low for low, _ in found), max(high for _, high in found)


def _move(graph: ir.Graph, node: ir.Node) -> bool:
    """Let a Concat or Split move codes, and dequantize what it outputs; returns whether it can."""
    sources = list(node.inputs) if node.op_type == "Concat" else [node.inputs[0]]
    before = [_dequantizer(source) for source in sources]
    first = before[0]
    if first is None or any(one is None or _numbers(one) != _numbers(first) for one in before):
        return False
    if any(output.is_graph_output() for output in node.outputs):
        return False
    codes = [_codes(graph, source) for source in sources]
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


def _codes(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """The codes of a value from :func:`_dequantizer`, moved as its numbers are."""
    node = None if value is None else value.producer()
    assert node is not None
    if node.op_type == "DequantizeLinear":
        codes = node.inputs[0]
        assert codes is not None
        return codes
    moved = ir.node(node.op_type, [_codes(graph, node.inputs[0]), *node.inputs[1:]], name=f"{node.name}/codes")
    moved.attributes.update(node.attributes)
    output = moved.outputs[0]
    output.name, output.dtype, output.shape = f"{moved.name}:out", ir.DataType.UINT8, node.outputs[0].shape
    graph.insert_after(node, moved)
    return output


def _dequantize(graph: ir.Graph, node: ir.Node, output: ir.Value, numbers: Sequence[ir.Value | None]) -> None:
    """Dequantize an output of a node that moves codes now."""
    dequantize = ir.node("DequantizeLinear", [output, *numbers], name=f"{output.name}/DequantizeLinear")
    made = dequantize.outputs[0]
    made.name, made.dtype, made.shape = f"{dequantize.name}:out", ir.DataType.FLOAT, output.shape
    graph.insert_after(node, dequantize)
    ir.convenience.replace_all_uses_with(output, made)
    dequantize.replace_input_with(0, output)
    output.dtype = ir.DataType.UINT8
