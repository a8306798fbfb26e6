"""What is changed of a file that is proven already, so that OpenVINO's CPU kernels compute what it says.

The parity gate asks for the codes of every quantizer, and these passes take some away. Each leaves the numbers as they are,
bit for bit, and the gate looks at that in ONNX Runtime.

torch.ao FX repeats a quantizer after every operator that only moves numbers, and all toolkits do after some. Quantizing what
lies on the grid already changes nothing, but the runtime would do it each time, or clamp where the range ends before the codes.

A quantizer after a reshape is a node of its own for the runtime, which reads floating point. Before the reshape, what computes
the numbers quantizes them, and codes are reshaped.

Tensors of different grids that are concatenated and then quantized are brought onto one coarser grid by the runtime, which
changes the numbers. Quantizing each of them is the same as quantizing all. Where a shuffle or a split stands between the two,
what is concatenated is rounded by operators instead, and no grid is seen.

A sum is computed by the convolution before it, and where the convolution's output has a quantizer, the runtime (2026.4) then
leaves out that it rounds, if the quantizer is the first of what it fuses into that convolution. After anything else it rounds,
by the same kernel. A leaky ReLU whose slope is 1 is something else, and changes nothing; a clamp it would merge with the
quantizer.

A factor per channel (layer scale) goes into the scales of quantizers before and after it, and the runtime takes none below
zero: where a channel's factor is negative, the same leaky ReLU keeps them apart.

Of what a normalization reads, the runtime takes the scale out, since dividing by the deviation undoes it, and leaves the
epsilon of the normalization as it is, which should have become smaller, too: where the variance is not large beside epsilon,
everything comes out too small. A maximum with the lowest number keeps the scale in its place.

What else it computes wrongly, each by as much as 0 to 25 dB:
  - signed codes that are concatenated in front of a convolution: it rounds them to whole numbers. Codes with a zero point are
    read as they are, in the same time;
  - in files with dynamic sizes, a convolution without bias that several nodes read: its scale is applied to what one of them
    reads, and again to what another does. With a clamp that clamps nothing, which it fuses, a single node reads it;
  - where such a file reads a size, as expanding a token or a mask to the batch does, the runtime asks the first convolution
    with a bias for it, before its bias. So that cannot take the bias in, which goes into the ranges of the quantizer after it,
    where all channels get that of the first. A bias that is written as a sum is fused as it should be.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, Sequential, common

from ..canonical.clamps import absorbed_clamps, has_signed_codes
from ..canonical.graph import (
    activation_quantizers,
    chain,
    constant,
    copied,
    dynamic_sizes,
    identity,
    initializer,
    kernel_shape,
    only_consumer,
    producer,
    replace,
)
from ..canonical.quantizers import make_unsigned

_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_RESHAPES = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Those that leave the numbers in their order."""

_PASS_ON = (*_MOVES, "Clip", "DequantizeLinear", "MaxPool", "Resize")
"""What the runtime may look through, between a quantizer and a Concat."""


def settled_for_kernels(model: ir.Model) -> ir.Model:
    """A copy of what :func:`.openvino.to_openvino_form` returned and the gate has proven, after all passes."""
    return Sequential(*PASSES)(copied(model)).model


class DropRepeatedQuantizers(InPlacePass):
    """Remove quantizers whose input lies on their own grid and within their range. Exact.

    What reads them reads the quantizer before, by operators that codes pass through: :func:`.graph.is_quantized` sees it.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for quantize in list(activation_quantizers(model.graph)):
            source, grid, low, high = _range(quantize)
            found = _moved_range(source)
            repeats = found is not None and found[0] == grid and low <= found[1] and found[2] <= high
            for dequantize in [use.node for use in quantize.outputs[0].uses()] if repeats else ():
                replace(dequantize, source)
                modified = True
        common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


class QuantizeBeforeReshape(InPlacePass):
    """Quantize numbers where they are computed, not after a reshape of them, where nobody else reads either.

        Reshape -> [Clip ->] Q -> DQ
    becomes
        [Clip ->] Q -> DQ -> Reshape
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for quantize in list(activation_quantizers(model.graph)):
            reshapes, steps = _after_reshapes(quantize)
            if reshapes:
                _reshape_after(reshapes, steps)
                modified = True
        return PassResult(model, modified)


def _after_reshapes(quantize: ir.Node) -> tuple[list[ir.Node], list[ir.Node]]:
    """Reshapes, and the clamp after them, a quantizer and its dequantizer, where nobody else reads what is between; or none."""
    dequantize, scale = only_consumer(quantize.outputs[0]), constant(quantize.inputs[1])
    clip = producer(quantize.inputs[0], "Clip")
    steps = [*([] if clip is None else [clip]), quantize]
    reshapes: list[ir.Node] = []
    while (before := producer([*reshapes, *steps][0].inputs[0], *_RESHAPES)) is not None:
        reshapes.insert(0, before)
    if not reshapes or dequantize is None or dequantize.outputs[0].is_graph_output() or scale is None or scale.size > 1:
        return [], []
    steps.append(dequantize)
    source = reshapes[0].inputs[0]
    made = None if source is None else source.producer()
    if source is None or made is None or made.op_type in _MOVES or only_consumer(source) is not reshapes[0]:
        return [], []  # a transpose is fused with a quantizer after it, and not with one before it
    alone = all(only_consumer(one.outputs[0]) is other for one, other in pairwise([*reshapes, *steps]))
    return (reshapes, steps) if alone else ([], [])


def _reshape_after(reshapes: list[ir.Node], steps: list[ir.Node]) -> None:
    """Let steps read what reshapes do, and reshapes what the last step makes."""
    graph, source, made = steps[0].graph, reshapes[0].inputs[0], steps[-1].outputs[0]
    assert graph is not None
    assert source is not None
    ir.convenience.replace_all_uses_with(made, reshapes[-1].outputs[0])
    steps[0].replace_input_with(0, source)
    reshapes[0].replace_input_with(0, made)
    for step in steps:
        step.outputs[0].shape = source.shape
    graph.remove(reshapes)
    graph.insert_after(steps[-1], reshapes)


class QuantizeBeforeConcat(InPlacePass):
    """Quantize what is concatenated one by one, where its parts come from different grids.

        Concat -> [Clip ->] Q -> DQ
    becomes
        [Clip ->] Q -> DQ -> Concat
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for quantize in list(activation_quantizers(model.graph)):
            steps = _from_concat(quantize)
            if steps and _differ_in_grid(steps[0]):
                _quantize_parts(model.graph, steps)
                modified = True
        return PassResult(model, modified)


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


class RoundBeforeConcat(InPlacePass):
    """Round by operators what is concatenated and still of different grids.

        Q -> DQ -> Concat
    becomes
        Div -> Round -> Clip -> Mul -> Concat
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for concat in [node for node in model.graph if node.op_type == "Concat"]:
            for dequantize in map(_own_dequantizer, concat.inputs) if _differ_in_grid(concat) else ():
                if dequantize is not None:
                    _round(model.graph, dequantize)
                    modified = True
        common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _own_dequantizer(value: ir.Value | None) -> ir.Node | None:
    """What a value comes straight from, where it has a quantizer and a single node reads each of the two."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None or only_consumer(dequantize.outputs[0]) is None:
        return None
    quantize = producer(dequantize.inputs[0], "QuantizeLinear")
    return dequantize if quantize is not None and only_consumer(quantize.outputs[0]) is dequantize else None


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


def _range(quantize: ir.Node) -> tuple[ir.Value, object, int, int]:
    """What a quantizer reads in front of its clamps, its grid, and its lowest and highest code."""
    source, low, high = absorbed_clamps(quantize)
    return source, tuple(identity(value) for value in quantize.inputs[1:]), low, high


def _moved_range(value: ir.Value | None) -> tuple[object, int, int] | None:
    """Grid, lowest and highest code of a value that comes from quantizers with one grid by operators that only move numbers,
    or choose among them."""
    node = producer(value, "DequantizeLinear", "MaxPool", *_MOVES)
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


class KeepRoundingBeforeSums(InPlacePass):
    """Let the quantizers of convolutions that are summed not be the first thing after them.

        Conv -> [Clip ->] Q -> DQ -> Add
    becomes
        Conv -> [Clip ->] LeakyRelu(1) -> Q -> DQ -> Add
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            found = [_quantized_conv(value) for value in node.inputs] if node.op_type == "Add" else []
            if len(found) == 2 and not any(_is_plain_conv(value) for value in node.inputs):
                for quantize in [one for one in found if one is not None]:
                    _keep_apart(quantize, 0)
                    modified = True
        return PassResult(model, modified)


class KeepSignsOfFactors(InPlacePass):
    """Keep a factor per channel that is negative somewhere apart from what is before and after it.

        DQ -> Mul(factors)
    becomes
        DQ -> LeakyRelu(1) -> Mul(factors) -> LeakyRelu(1)
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            for index, value in enumerate(node.inputs) if node.op_type == "Mul" else ():
                factor = constant(node.inputs[1 - index])
                if factor is None or not (factor < 0).any():
                    continue
                if producer(value, "DequantizeLinear", *_MOVES) is not None:
                    _keep_apart(node, index)
                    _insert_after(node, ir.node("LeakyRelu", [None], {"alpha": 1.0}, name=f"{node.name}/after"))
                    modified = True
        return PassResult(model, modified)


class KeepEpsilons(InPlacePass):
    """Keep normalizations apart from the scales of what they read.

        DQ -> LayerNormalization
    becomes
        DQ -> Max(lowest float32) -> LayerNormalization

    and the same where a normalization is written as operators, which the runtime puts together again: those that take the mean
    and subtract it.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph, modified = model.graph, False
        for readers in [found for node in graph if (found := _normalizes(node))]:
            maximum = ir.node("Max", [readers[0].inputs[0], _lowest(graph)], name=f"{readers[0].name}/apart")
            maximum.outputs[0].name, maximum.outputs[0].dtype = f"{maximum.name}:out", ir.DataType.FLOAT
            graph.insert_before(readers[0], maximum)
            for reader in readers:
                reader.replace_input_with(0, maximum.outputs[0])
            modified = True
        return PassResult(model, modified)


def _normalizes(node: ir.Node) -> list[ir.Node]:
    """The nodes, in their order, that read what a normalization normalizes, where one begins with this node."""
    if node.op_type in {"GroupNormalization", "InstanceNormalization", "LayerNormalization"}:
        return [node]
    mean = producer(node.inputs[1], "ReduceMean") if node.op_type == "Sub" else None
    return [mean, node] if mean is not None and mean.inputs[0] is node.inputs[0] else []


def _keep_apart(node: ir.Node, index: int) -> None:
    """Put an operator that changes nothing, and that the runtime fuses with nothing, in front of an input."""
    identity_op = ir.node("LeakyRelu", [node.inputs[index]], {"alpha": 1.0}, name=f"{node.name}/identity")
    identity_op.outputs[0].name, identity_op.outputs[0].dtype = f"{identity_op.name}:out", ir.DataType.FLOAT
    assert node.graph is not None
    node.graph.insert_before(node, identity_op)
    node.replace_input_with(index, identity_op.outputs[0])


def _quantized_conv(value: ir.Value | None) -> ir.Node | None:
    """The quantizer of a convolution's output, where a sum alone reads it and nobody what is between."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None or only_consumer(dequantize.outputs[0]) is None:
        return None
    quantize = producer(dequantize.inputs[0], "QuantizeLinear")
    reader, node = dequantize, quantize
    while node is not None and only_consumer(node.outputs[0]) is reader:
        if node.op_type == "Conv":
            return quantize
        reader, node = node, producer(node.inputs[0], "Relu", "Clip", "Conv")
    return None


def _is_plain_conv(value: ir.Value | None) -> bool:
    """Whether a convolution's output is summed as it is, so that the runtime prefers this one."""
    conv = producer(value, "Conv")
    return conv is not None and only_consumer(conv.outputs[0]) is not None


def _round(graph: ir.Graph, dequantize: ir.Node) -> None:
    quantize = producer(dequantize.inputs[0], "QuantizeLinear")
    assert quantize is not None
    source, low, high = absorbed_clamps(quantize)
    step, lowest, highest = (
        initializer(graph, f"{quantize.name}/{name}", np.asarray(number, np.float32))
        for name, number in (("step", constant(quantize.inputs[1])), ("lowest", low), ("highest", high))
    )
    nodes = [
        ir.node("Div", [None, step]),
        ir.node("Round", [None]),
        ir.node("Clip", [None, lowest, highest]),
        ir.node("Mul", [None, step]),
    ]
    replace(dequantize, chain(dequantize, source, nodes, f"{quantize.name}/rounded_"))


class OffsetConcatenatedCodes(InPlacePass):
    """Give signed codes zero point 128 where they are concatenated, before or after, and a convolution reads them.

    Not for matrix products, which compute them rightly and do not take parts with zero points of their own.
    """

    def call(self, model: ir.Model) -> PassResult:
        nodes, modified = list(model.graph), False
        to_convolution = _leading_to([node for node in nodes if node.op_type in {"Conv", "ConvTranspose"}], "QuantizeLinear")
        concats = [node for node in nodes if node.op_type == "Concat" and node.outputs[0] in to_convolution]
        to_concat = _leading_to(concats)
        from_concat: set[ir.Value | None] = set()
        for node in nodes:
            if node in concats or (node.op_type in _PASS_ON and node.inputs[0] in from_concat):
                from_concat.update(node.outputs)
        for quantize in list(activation_quantizers(model.graph)):
            if has_signed_codes(quantize) and (quantize.inputs[0] in from_concat or quantize.outputs[0] in to_concat):
                make_unsigned(model.graph, quantize, 128)
                modified = True
        return PassResult(model, modified)


def _leading_to(nodes: Iterable[ir.Node], *also: str) -> set[ir.Value]:
    """Values that nodes read as they are, or through operators that pass codes on and ``also`` these."""
    found: set[ir.Value] = set()
    waiting = [value for node in nodes for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    while waiting:
        value = waiting.pop()
        if value is None or value in found:
            continue
        found.add(value)
        before = producer(value, *_PASS_ON, *also)
        if before is not None:
            waiting += before.inputs if before.op_type == "Concat" else before.inputs[:1]
    return found


class ClampSharedConvolutions(InPlacePass):
    """Let a single node read each convolution without bias, where a size is dynamic; other files stay as they are.

        Conv(x, weight) -> several nodes
    becomes
        Conv(x, weight) -> Clip(lowest float32) -> several nodes
    """

    def call(self, model: ir.Model) -> PassResult:
        graph, modified = model.graph, False
        for conv in list(graph) if any(dynamic_sizes(graph)) else ():
            if conv.op_type in {"Conv", "ConvTranspose"} and _has_no_bias(conv) and only_consumer(conv.outputs[0]) is None:
                _insert_after(conv, ir.node("Clip", [None, _lowest(graph)], name=f"{conv.name}/shared"))
                modified = True
        return PassResult(model, modified)


def _has_no_bias(conv: ir.Node) -> bool:
    """A bias of zeros is none: the runtime drops it."""
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    return not (len(conv.inputs) > 2 and (bias is None or bias.any()))


class BiasAsSum(InPlacePass):
    """Write the biases of convolutions beside them, where the file reads a dynamic size; other files stay as they are.

        Conv(x, weight, bias)
    becomes
        Conv(x, weight) -> Add(bias)
    """

    def call(self, model: ir.Model) -> PassResult:
        graph, modified = model.graph, False
        reads_sizes = any(node.op_type == "Shape" for node in graph)
        for conv in [node for node in graph if node.op_type == "Conv" and len(node.inputs) > 2] if reads_sizes else ():
            bias = constant(conv.inputs[2])
            if bias is not None:
                channels = initializer(graph, f"{conv.name}/bias", bias.reshape(-1, *[1] * len(kernel_shape(conv))))
                conv.resize_inputs(2)
                _insert_after(conv, ir.node("Add", [None, channels], name=f"{conv.name}/Add"))
                modified = True
        common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


def _lowest(graph: ir.Graph) -> ir.Value:
    """The lowest float32, which clamps nothing."""
    return initializer(graph, "lowest_float32", np.asarray(np.finfo(np.float32).min, dtype=np.float32))


def _insert_after(node: ir.Node, new: ir.Node) -> None:
    """Let all that read a node's output read what another one makes of it."""
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    made = new.outputs[0]
    made.type, made.shape = output.type, output.shape
    made.name, output.name = output.name, f"{new.name}:in"
    graph.insert_after(node, new)
    ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    new.replace_input_with(0, output)


PASSES: tuple[InPlacePass, ...] = (
    DropRepeatedQuantizers(),
    QuantizeBeforeReshape(),
    QuantizeBeforeConcat(),
    RoundBeforeConcat(),  # what is still of different grids
    KeepRoundingBeforeSums(),
    KeepSignsOfFactors(),
    KeepEpsilons(),
    OffsetConcatenatedCodes(),  # of quantizers that are left
    ClampSharedConvolutions(),
    BiasAsSum(),
)
"""From what the gate has proven to what is written, in this order."""
