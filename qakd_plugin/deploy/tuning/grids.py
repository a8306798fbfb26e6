"""Quantizers made finer than they were trained: left out, or on half their step. No number moves by more than half a step.

What is left out is the rounding alone. The clamp at the ends of the range stays, a ReLU or a learned clip that it stands for
with it, so that every number is one that rounding would have taken to the code that was trained, or one half a step from it:

    Q -> [Clip_u8 ->] DQ
becomes
    Clip(lowest, highest)

Layers that read such numbers compute in floating point, their weights on the grid that was trained, as float constants.

Codes 0 to 127 of what cannot be negative, which is all that TensorRT has, leave half of an unsigned type unused, and each is
clipped at 127. On half the step the same range takes 0 to 255, and ends by itself:

    Q(u8, s) -> Clip_u8(0, 127) -> DQ(s)          Clip(0, 127 s) -> Q(u8, s) -> DQ(s)
becomes
    Q(u8, s / 2) -> DQ(s / 2)

Codes that are moved, joined or split between quantizers and dequantizers lie on one grid, and change together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.clamps import bounds, has_signed_codes
from ..canonical.graph import (
    WEIGHT_KEY,
    activation_quantizers,
    constant,
    copied,
    identity,
    initializer,
    only_consumer,
    producer,
    replace,
    scalar,
    stored_codes,
    weight_dequantizers,
    weight_readers,
)
from ..canonical.labels import first_quantizer, labels_of
from ..targets.onnxruntime_bias import loses_bias, overflows_bias

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CODE_MOVES = (
    "Clip", "Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
_TOP = 127


@dataclass(frozen=True)
class Grid:
    """Codes on one grid, from the quantizers that make them to the dequantizers that read them.

    Attributes:
        name: of the first quantizer, as the trained model has it; of the node in files of others.
        quantizers: QuantizeLinear nodes.
        moves: what moves or clips codes between.
        dequantizers: DequantizeLinear nodes.
    """

    name: str
    quantizers: tuple[ir.Node, ...]
    moves: tuple[ir.Node, ...]
    dequantizers: tuple[ir.Node, ...]

    @property
    def step(self) -> np.float32:
        """The scale."""
        return np.float32(scalar(self.quantizers[0].inputs[1], 0.0))

    @property
    def zero_point(self) -> np.float32:
        """Code of the number 0."""
        return np.float32(_zero_point(self.quantizers[0]))

    @cached_property
    def readers(self) -> tuple[ir.Node, ...]:
        """Layers that multiply what is dequantized."""
        found: dict[ir.Node, None] = {}
        for dequantize in self.dequantizers:
            found |= dict.fromkeys(_layers_after(dequantize.outputs[0]))
        return tuple(found)

    @cached_property
    def makers(self) -> tuple[ir.Node, ...]:
        """Layers whose output is quantized."""
        found = (_layer_before(quantize.inputs[0]) for quantize in self.quantizers)
        return tuple(node for node in found if node is not None)


def grids_of(model: ir.Model) -> tuple[Grid, ...]:
    """All grids of activations that can be made finer, in execution order: with one scale and zero point throughout."""
    order = {node: index for index, node in enumerate(model.graph)}
    found: list[Grid] = []
    seen: set[ir.Node] = set()
    for quantize in activation_quantizers(model.graph):
        if quantize in seen:
            continue
        nodes = _connected(quantize)
        seen.update(nodes)
        if (grid := _grid(sorted(nodes, key=order.__getitem__))) is not None:
            found.append(grid)
    return tuple(found)


def _connected(quantize: ir.Node) -> list[ir.Node]:
    """All nodes that hold the codes of a quantizer, or codes that are joined with them."""
    nodes: dict[ir.Node, None] = {quantize: None}
    waiting = [quantize]
    while waiting:
        node = waiting.pop()
        others = [] if node.op_type == "DequantizeLinear" else [use.node for value in node.outputs for use in value.uses()]
        if node.op_type != "QuantizeLinear":
            read = node.inputs if node.op_type == "Concat" else node.inputs[:1]
            others += [one for value in read if value is not None and (one := value.producer()) is not None]
        for other in others:
            if other not in nodes:
                nodes[other] = None
                if other.op_type in ("QuantizeLinear", "DequantizeLinear", *_CODE_MOVES):
                    waiting.append(other)
    return list(nodes)


def _grid(nodes: Sequence[ir.Node]) -> Grid | None:
    """The grid of all nodes that hold its codes; None where they are not on one, or something else reads them."""
    quantizers, dequantizers = (
        tuple(node for node in nodes if node.op_type == kind) for kind in ("QuantizeLinear", "DequantizeLinear")
    )
    moves = tuple(node for node in nodes if node.op_type in _CODE_MOVES)
    ends = (*quantizers, *dequantizers)
    clips = [node for node in moves if node.op_type == "Clip"]
    scales = [constant(node.inputs[1]) for node in ends]
    if (
        not dequantizers
        or len(ends) + len(moves) < len(nodes)
        or any(output.is_graph_output() for node in (*quantizers, *moves) for output in node.outputs)
        or any(len(clip.inputs) < 3 or constant(clip.inputs[1]) is None or constant(clip.inputs[2]) is None for clip in clips)
        or any(scale is None or scale.size != 1 or scale.dtype != np.float32 for scale in scales)
        or any(_zero_point(node) is None for node in ends)
        or len({(identity(node.inputs[1]), _zero_point(node)) for node in ends}) > 1
        or len({has_signed_codes(quantize) for quantize in quantizers}) > 1
    ):
        return None
    labels = labels_of(quantizers[0])
    return Grid(first_quantizer(labels) if labels else str(quantizers[0].name), quantizers, moves, dequantizers)


def _zero_point(node: ir.Node) -> int | None:
    """0 where there is none; None where it is no constant number."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(value)
    if array is None:
        return 0 if value is None else None
    return int(array.reshape(())) if array.size == 1 else None


def _layers_after(value: ir.Value) -> list[ir.Node]:
    """Layers that read a value, straight or through what only moves numbers."""
    found: list[ir.Node] = []
    for use in value.uses():
        if use.node.op_type in LAYERS:
            found.append(use.node)
        elif use.node.op_type in _CODE_MOVES:
            found += [node for output in use.node.outputs for node in _layers_after(output)]
    return found


def _layer_before(value: ir.Value | None) -> ir.Node | None:
    """The layer that computes a value, before clamps and the bias that is added to it."""
    between = (*LAYERS, "Add", "Clip", "LeakyRelu", "Relu")
    node = producer(value, *between)
    while node is not None and node.op_type not in LAYERS:
        computed = [one for one in node.inputs if one is not None and constant(one) is None]
        node = producer(computed[0], *between) if len(computed) == 1 else None
    return node


def floats_of(grids: Iterable[Grid], runtime: str) -> list[ir.Node]:
    """Layers that compute in floating point where grids are left out: ONNX Runtime's convolutions need codes on both sides."""
    found: dict[ir.Node, None] = {}
    for grid in grids:
        makers = [node for node in grid.makers if node.op_type == "Conv"] if runtime == "onnxruntime" else []
        found |= dict.fromkeys([*makers, *grid.readers])
    return list(found)


def layer_name(layer: ir.Node) -> str:
    """As the trained model has it; of the node where no weight says so."""
    weight = producer(layer.inputs[1], "DequantizeLinear", "Transpose")
    if weight is not None and weight.op_type == "Transpose":
        weight = producer(weight.inputs[0], "DequantizeLinear")
    name = "" if weight is None else weight.metadata_props.get(WEIGHT_KEY, "")
    return name.removesuffix(".weight") or str(layer.name)


def halvable(model: ir.Model, runtime: str) -> frozenset[int]:
    """Positions, among :func:`grids_of`, of grids whose step can be halved: unsigned codes that all end at 127.

    Not where a convolution of ONNX Runtime, which rounds its bias to a multiple of steps, would lose it.
    """
    wanted = {index for index, grid in enumerate(grids_of(model)) if all(map(_end_at_127, grid.quantizers))}
    while wanted and runtime == "onnxruntime":
        changed = copied(model)
        grids = grids_of(changed)
        for index in wanted:
            _halve(changed.graph, grids[index], [_end_at_127(quantize) for quantize in grids[index].quantizers])
        lost = {
            index
            for index in wanted
            for layer in (*grids[index].readers, *grids[index].makers)
            if layer.op_type == "Conv" and (loses_bias(layer) or overflows_bias(layer))
        }
        if not lost:
            break
        wanted -= lost
    return frozenset(wanted)


def _end_at_127(quantize: ir.Node) -> ir.Node | None:
    """What ends unsigned codes with zero point 0 at 127: a Clip of codes after the quantizer, or of numbers before it."""
    if has_signed_codes(quantize) or _zero_point(quantize) != 0:
        return None
    after, before = only_consumer(quantize.outputs[0]), producer(quantize.inputs[0], "Clip")
    if after is not None and after.op_type == "Clip":
        return after if bounds(after) == (0, _TOP) else None
    if before is None or only_consumer(before.outputs[0]) is not quantize:
        return None
    highest = np.float32(_TOP) * np.float32(scalar(quantize.inputs[1], 0.0))
    return before if bounds(before)[0] == 0 and np.float32(bounds(before)[1]) == highest else None


@dataclass(frozen=True)
class Finer:
    """Which grids change, by their positions among :func:`grids_of`.

    Attributes:
        unrounded: left out.
        halved: on half their step, where they are not left out.
    """

    unrounded: frozenset[int] = frozenset()
    halved: frozenset[int] = frozenset()


def made_finer(model: ir.Model, changes: Finer, runtime: str, *, witnessed: bool = False) -> ir.Model:
    """A copy with grids left out or on half their step.

    Args:
        model: as exported for ``runtime``.
        changes: which.
        runtime: decides which layers compute in floating point.
        witnessed: let the copy also output, for each quantizer that changed, by how many of its steps the new numbers differ
            from those that it would have made of the same input, at most: one number each, after the outputs of the model.
    """
    changed = copied(model)
    graph, grids = changed.graph, grids_of(changed)
    unrounded = [grids[index] for index in sorted(changes.unrounded)]
    of_halves = [grids[index] for index in sorted(changes.halved - changes.unrounded)]
    halved = [(grid, list(map(_end_at_127, grid.quantizers))) for grid in of_halves]
    layers = set(floats_of(unrounded, runtime))
    every = [*unrounded, *of_halves]
    trained = [_as_trained(graph, quantize) for grid in every for quantize in grid.quantizers] if witnessed else []
    made = [value for grid in unrounded for value in _leave_out(graph, grid)]
    made += [value for grid, ends in halved for value in _halve(graph, grid, ends)]
    for dequantize in list(weight_dequantizers(graph)):
        readers = weight_readers(dequantize)
        if readers and layers.issuperset(readers) and not dequantize.attributes.get_int("block_size", 0):
            _fold(graph, dequantize)
    if witnessed:
        for (expected, scale), value in zip(trained, made, strict=True):
            _witness(graph, expected, value, scale)
    common.RemoveUnusedNodesPass()(changed)
    common.TopologicalSortPass()(changed)
    return changed


def _leave_out(graph: ir.Graph, grid: Grid) -> list[ir.Value]:
    """Returns what takes the place of each quantizer's numbers."""
    made = []
    step, zero = grid.step, grid.zero_point
    kind = np.iinfo(np.int8 if has_signed_codes(grid.quantizers[0]) else np.uint8)
    ends = [(np.float32(code) - zero) * step for code in (kind.min, kind.max)]
    for clip in [node for node in grid.moves if node.op_type == "Clip"]:
        _set_bounds(graph, clip, *((np.float32(bound) - zero) * step for bound in bounds(clip)))
    for quantize in grid.quantizers:
        source = _without_identity(quantize.inputs[0])
        after = only_consumer(quantize.outputs[0])
        if after is not None and after.op_type == "Clip":
            made.append(after.outputs[0])
        elif not _is_within(source, *ends):
            clamp = ir.node("Clip", [source], name=f"{quantize.name}/range")
            clamp.outputs[0].name, clamp.outputs[0].shape = f"{clamp.name}:out", source.shape
            graph.insert_before(quantize, clamp)
            _set_bounds(graph, clamp, *ends)
            source = clamp.outputs[0]
            made.append(source)
        else:
            made.append(source)
        replace(quantize, source)
    for output in [output for node in grid.moves for output in node.outputs]:
        output.dtype = ir.DataType.FLOAT
    for dequantize in grid.dequantizers:
        value = dequantize.inputs[0]
        assert value is not None
        replace(dequantize, value)
    return made


def _without_identity(value: ir.Value | None) -> ir.Value:
    """What is before a leaky ReLU that changes nothing, which only quantizers need (:mod:`..targets.openvino_kernels`)."""
    node = producer(value, "LeakyRelu")
    found = value if node is None or node.attributes.get_float("alpha", 0.01) != 1.0 else node.inputs[0]
    assert found is not None
    return found


def _halve(graph: ir.Graph, grid: Grid, ends: Sequence[ir.Node | None]) -> list[ir.Value]:
    """Returns what takes the place of each quantizer's numbers, given what :func:`_end_at_127` says of each."""
    name = f"{grid.quantizers[0].name}/half_step"
    scale = initializer(graph, name, np.asarray(grid.step / np.float32(2), dtype=np.float32))
    for quantize, end in zip(grid.quantizers, ends, strict=True):
        if end is not None and end not in grid.moves:
            quantize.replace_input_with(0, end.inputs[0])
    for clip in [node for node in grid.moves if node.op_type == "Clip"]:
        value = clip.inputs[0]
        assert value is not None
        replace(clip, value)
    for node in (*grid.quantizers, *grid.dequantizers):
        node.replace_input_with(1, scale)
    return [_dequantized(graph, quantize, quantize.outputs[0], scale) for quantize in grid.quantizers]


def _set_bounds(graph: ir.Graph, clip: ir.Node, low: np.float32, high: np.float32) -> None:
    clip.resize_inputs(3)
    for index, (name, bound) in enumerate((("lowest", low), ("highest", high)), start=1):
        clip.replace_input_with(index, initializer(graph, f"{clip.name}/{name}", np.asarray(bound, dtype=np.float32)))
    clip.outputs[0].dtype = ir.DataType.FLOAT


def _is_within(value: ir.Value, low: np.float32, high: np.float32) -> bool:
    clamp = producer(value, "Clip")
    if clamp is None:
        return False
    lowest, highest = bounds(clamp)
    return bool(np.float32(lowest) >= low and np.float32(highest) <= high)


def _fold(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Write a weight as the float constant that it is."""
    codes, scale = stored_codes(dequantize).astype(np.int32), constant(dequantize.inputs[1])
    zero = constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    assert scale is not None
    channels = [1] * codes.ndim
    channels[dequantize.attributes.get_int("axis", 1) if codes.ndim > 1 else 0] = -1
    if zero is not None:
        codes = codes - zero.astype(np.int32).reshape(channels)
    weight = codes.astype(np.float32) * scale.astype(np.float32).reshape(channels)
    output = dequantize.outputs[0]
    replace(dequantize, initializer(graph, f"{output.name}/constant", weight))


def _as_trained(graph: ir.Graph, quantize: ir.Node) -> tuple[ir.Value, ir.Value]:
    """What a quantizer, with the Clip of codes after it, makes of its input, computed once more beside it; and its scale."""
    scale = quantize.inputs[1]
    assert scale is not None
    again = ir.node("QuantizeLinear", list(quantize.inputs), name=f"{quantize.name}/again")
    again.attributes.update(quantize.attributes)
    again.outputs[0].name, again.outputs[0].type = f"{again.name}:out", quantize.outputs[0].type
    graph.append(again)
    codes, clip = again.outputs[0], only_consumer(quantize.outputs[0])
    if clip is not None and clip.op_type == "Clip":
        clipped = ir.node("Clip", [codes, *clip.inputs[1:]], name=f"{clip.name}/again")
        clipped.outputs[0].name, clipped.outputs[0].type = f"{clipped.name}:out", codes.type
        graph.append(clipped)
        codes = clipped.outputs[0]
    return _dequantized(graph, again, codes, scale), scale


def _dequantized(graph: ir.Graph, quantize: ir.Node, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """Codes as numbers; what nobody reads is removed again."""
    node = ir.node("DequantizeLinear", [codes, scale, *quantize.inputs[2:]], name=f"{quantize.name}/as_numbers")
    node.outputs[0].name, node.outputs[0].dtype = f"{node.name}:out", ir.DataType.FLOAT
    graph.append(node)
    return node.outputs[0]


def _witness(graph: ir.Graph, expected: ir.Value, value: ir.Value, scale: ir.Value) -> None:
    """Output the largest difference of two values in steps."""
    made = value
    for kind in ("Sub", "Abs", "ReduceMax", "Div"):
        others = {"Sub": [expected], "Div": [scale]}.get(kind, [])
        node = ir.node(kind, [made, *others], {"keepdims": 0} if kind == "ReduceMax" else {}, name=f"{expected.name}/{kind}")
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}:out", ir.DataType.FLOAT
        graph.append(node)
        made = node.outputs[0]
    made.shape = ir.Shape([])
    graph.outputs.append(made)
