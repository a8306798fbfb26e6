"""Why INT8 may not be faster than a float model, said in words with the layers' names.

All of it is read from the graph of an ONNX file; nothing is run. What the runtime really did with the graph is known to the
census (:mod:`qakd_plugin.bench.census`): pass it, and layers that it left in floating point for no reason seen here are named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from .canonical.graph import WEIGHT_KEY, constant, dequantizer_before, is_quantized, producer, read_onnx, scalar, understood
from .finding import Finding as Finding

NARROW = 16
"""Convolutions with fewer input or output channels are no faster in ONNX Runtime's integer kernels than in floating point
(``benchmarks/narrow_layers.py``)."""

_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_PRODUCTS = {"Gemm", "MatMul", "MatMulNBits"}
_BETWEEN = {"Relu", "Clip"}
"""Operators that a runtime takes into the convolution before them."""


def diagnose(path: str | os.PathLike[str], float_layers: Iterable[str] = (), runtime: str = "onnxruntime") -> list[Finding]:
    """Look for everything that is known to keep an INT8 model from being fast.

    Args:
        path: an ONNX file of any target, quantized or not.
        float_layers: names of nodes that the runtime left in floating point, as ``census(path).float_layers`` has them.
        runtime: that is to run the file: "onnxruntime" or "openvino". What keeps one from being fast need not keep the other.

    Returns:
        Findings, the ones that cost most first; none where nothing is known to be wrong.

    Raises:
        ExportError: the file is missing, damaged or no valid ONNX.
    """
    graph = read_onnx(path).graph
    with understood(path, "diagnosed"):
        return _findings(graph, float_layers, runtime)


def left_in_float(model: ir.Model) -> tuple[tuple[str, ...], int]:
    """Convolutions that ONNX Runtime will compute in floating point although weights and inputs are quantized.

    Args:
        model: in the form for ONNX Runtime.

    Returns:
        Those whose output the network itself reads without a quantizer, by name; what it returns is left out, since nothing is
        to be done there. And how many convolutions have quantized weights and inputs.
    """
    graph = model.graph
    names = [_name(node) for node, end in _without_quantizer(graph) if not end.is_graph_output()]
    return tuple(dict.fromkeys(names)), sum(1 for _ in _quantized_convolutions(graph))


def with_separate_biases(model: ir.Model) -> tuple[str, ...]:
    """Convolutions of a model in ONNX Runtime's form whose bias is added after them, so that they run in floating point."""
    return tuple(dict.fromkeys(_separate_biases(model.graph)))


def transposed(model: ir.Model) -> tuple[str, ...]:
    """Transposed convolutions with quantized weights, which ONNX Runtime computes in floating point."""
    return tuple(dict.fromkeys(_transposed(model.graph)))


def _findings(graph: ir.Graph, float_layers: Iterable[str], runtime: str) -> list[Finding]:
    if not any(node.op_type in {"QuantizeLinear", "DequantizeLinear"} or WEIGHT_KEY in node.metadata_props for node in graph):
        return [Finding("not quantized", (), "The file has no quantizers. Prepare the model, train it, and export it again.")]
    findings = [
        Finding(kind, layers, advice)
        for kind, find, advice in _CHECKS
        if not (runtime == "openvino" and kind in _OF_ONNXRUNTIME)
        if (layers := tuple(dict.fromkeys(name for name in find(graph))))
    ]
    named = {layer for finding in findings if finding.kind not in _HARMLESS_KINDS for layer in finding.layers}
    rest = tuple(name for name in _left_in_float(graph, float_layers) if name not in named)
    if rest:
        advice = "The runtime computes them in floating point, for no reason that this diagnosis knows."
        findings.insert(0, Finding("float in the runtime", rest, advice))
    return findings


def _float_weights(graph: ir.Graph) -> Iterator[str]:
    for node in _layers(graph):
        if constant(node.inputs[1]) is not None and not _is_stored(node):
            yield _name(node)


def _float_inputs(graph: ir.Graph) -> Iterator[str]:
    """Layers with stored weights whose input is in floating point."""
    return (_name(node) for node in _layers(graph) if _is_stored(node) and not is_quantized(node.inputs[0]))


def _signed_codes(graph: ir.Graph) -> Iterator[str]:
    for node in _layers(graph):
        before = dequantizer_before(node.inputs[0]) if _is_stored(node) else None
        quantize = None if before is None else producer(before.inputs[0], "QuantizeLinear", "Clip")
        while quantize is not None and quantize.op_type == "Clip":
            quantize = producer(quantize.inputs[0], "QuantizeLinear", "Clip")
        if quantize is not None and not _is_unsigned(quantize):
            yield _name(node)


def _products_of_activations(graph: ir.Graph) -> Iterator[str]:
    for node in _layers(graph):
        dynamic = constant(node.inputs[1]) is None and not _is_stored(node)
        if dynamic and not (is_quantized(node.inputs[0]) and is_quantized(node.inputs[1])):
            yield _name(node)


def _packed_weights(graph: ir.Graph) -> Iterator[str]:
    """Weights stored below 8 bits that no Cast widens in front of DequantizeLinear, beside quantized activations."""
    for node in _layers(graph):
        weight = _weight(node)
        codes = None if weight is None else weight.inputs[0]
        narrow = codes is not None and codes.dtype in {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2}
        if narrow and (node.op_type in _CONVOLUTIONS or is_quantized(node.inputs[0])):
            yield _name(node)


def _outputs_not_quantized(graph: ir.Graph) -> Iterator[str]:
    return (_name(node) for node, _ in _without_quantizer(graph))


def _without_quantizer(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Convolutions and what is read of each, if something reads it that is no quantizer."""
    for node in _quantized_convolutions(graph):
        end = _after_clamps(node.outputs[0])
        if (end.is_graph_output() or any(use.node.op_type != "QuantizeLinear" for use in end.uses())) and not _is_bias(end):
            yield node, end


def _separate_biases(graph: ir.Graph) -> Iterator[str]:
    return (_name(node) for node in _quantized_convolutions(graph) if _is_bias(_after_clamps(node.outputs[0])))


def _clamps_before_quantizers(graph: ir.Graph) -> Iterator[str]:
    """Convolutions with a Clip in front of the unsigned codes of their output."""
    for node in _quantized_convolutions(graph):
        clips = any(clamp.op_type == "Clip" for clamp in _clamps(node.outputs[0]))
        readers = [use.node for use in _after_clamps(node.outputs[0]).uses()]
        if clips and any(reader.op_type == "QuantizeLinear" and _is_unsigned(reader) for reader in readers):
            yield _name(node)


def _untied_pools(graph: ir.Graph) -> Iterator[str]:
    """Pools that only choose among codes, but whose output is quantized with another scale or zero point than their input."""
    for node in graph:
        before = producer(node.inputs[0], "DequantizeLinear") if node.op_type == "MaxPool" else None
        if before is None or constant(before.inputs[0]) is not None:
            continue
        for use in node.outputs[0].uses():
            if use.node.op_type == "QuantizeLinear" and not _same_grid(before, use.node):
                yield _name(node)


def _unquantized_adds(graph: ir.Graph) -> Iterator[str]:
    """Adds and concatenations of which one input is quantized and another is not."""
    for node in graph:
        if node.op_type in {"Add", "Concat"} and len(node.inputs) > 1:
            data = [value for value in node.inputs if value is not None and constant(value) is None]
            quantized = [is_quantized(value) for value in data]
            if any(quantized) and not all(quantized):
                yield _name(node)


def _transposed(graph: ir.Graph) -> Iterator[str]:
    return (_name(node) for node in graph if node.op_type == "ConvTranspose" and _is_stored(node))


def _narrow(graph: ir.Graph) -> Iterator[str]:
    for node in _quantized_convolutions(graph):
        outputs, inputs = _channels(node)
        if not _is_depthwise(node) and min(outputs, inputs) < NARROW:
            yield _name(node)


def _depthwise(graph: ir.Graph) -> Iterator[str]:
    return (_name(node) for node in _quantized_convolutions(graph) if _is_depthwise(node))


_CHECKS: tuple[tuple[str, Callable[[ir.Graph], Iterator[str]], str], ...] = (
    (
        "signed codes",
        _signed_codes,
        "Their inputs have signed codes, as TensorRT needs them and OpenVINO takes them; ONNX Runtime leaves such layers in "
        "floating point or is slow with them. Export with target='onnxruntime' for it.",
    ),
    (
        "clamp before quantizer",
        _clamps_before_quantizers,
        "ONNX Runtime leaves these convolutions in floating point: it takes a ReLU in front of unsigned codes into them, but "
        "no Clip. Export with target='onnxruntime', which clips the codes instead.",
    ),
    (
        "output not quantized",
        _outputs_not_quantized,
        "ONNX Runtime leaves these convolutions in floating point, since nothing quantizes their output: an add, a "
        "concatenation, a pooling or the network's end reads it as it is. Put a quantizer after them (qakd_plugin.prepare "
        "does) and train with it.",
    ),
    (
        "float weights",
        _float_weights,
        "Their weights are not quantized. Take them out of keep=..., or have the toolkit quantize them.",
    ),
    (
        "float input",
        _float_inputs,
        "Their weights are quantized, their inputs are not: the product is computed in floating point. That saves memory, and "
        "time only where reading weights is what takes long. Quantize their inputs as well.",
    ),
    (
        "packed weights",
        _packed_weights,
        "Weights stored in 4 or 2 bits go straight into DequantizeLinear: ONNX Runtime and OpenVINO then compute in floating "
        "point. Export again: a Cast to int8 between them is folded when the file is loaded.",
    ),
    (
        "add with one float input",
        _unquantized_adds,
        "One input is quantized and another is not, so they are added in floating point, and the quantized one is converted "
        "first. Quantize the other branch as well.",
    ),
    (
        "untied pool",
        _untied_pools,
        "The scale after MaxPool is another than before it, so codes are converted to float and back, though pooling only "
        "chooses among them. Give both quantizers one scale.",
    ),
    (
        "separate bias",
        _separate_biases,
        "The bias is added in floating point after the convolution, because rounding it to the grid of the integer kernel "
        "would change codes: input or weight scales are large beside the output's. More bits for this layer's input help.",
    ),
    (
        "transposed convolution",
        _transposed,
        "ONNX Runtime has no integer kernel for transposed convolutions. Upsampling followed by a convolution has one.",
    ),
    (
        "products of activations",
        _products_of_activations,
        "Products of two activations (attention) whose operands are not quantized stay in floating point. "
        "prepare(..., quantize_attention=True) quantizes them.",
    ),
    (
        "narrow",
        _narrow,
        f"They have fewer than {NARROW} input or output channels, where integer kernels are no faster than float ones: "
        "converting and padding take the gain. Nothing to fix, unless the network may be wider there.",
    ),
    (
        "depthwise",
        _depthwise,
        "Depthwise convolutions do little arithmetic per byte: integer kernels are no faster, often slower. What INT8 gains "
        "comes from the other layers.",
    ),
)
_OF_ONNXRUNTIME = {
    "signed codes", "clamp before quantizer", "output not quantized", "untied pool", "separate bias", "transposed convolution",
    "narrow", "depthwise",
}  # fmt: skip
"""Findings of how ONNX Runtime fuses and computes. OpenVINO, for one, computes a convolution in integers whatever reads it."""

_HARMLESS_KINDS = {"narrow", "depthwise", "untied pool", "add with one float input"}
"""Findings that do not explain why a layer runs in floating point."""


def _left_in_float(graph: ir.Graph, float_layers: Iterable[str]) -> Iterator[str]:
    """Names, as in the trained model, of layers with stored weights that a runtime lists as computed in floating point."""
    listed = tuple(float_layers)
    for node in _layers(graph):
        # The runtime adds to the names of nodes that it fuses or moves.
        if node.name and _is_stored(node) and any(name == node.name or name.startswith(f"{node.name}_") for name in listed):
            yield _name(node)


def _layers(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in _CONVOLUTIONS | _PRODUCTS)


def _quantized_convolutions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Convolutions with stored weights and quantized inputs."""
    return (node for node in graph if node.op_type == "Conv" and _is_stored(node) and is_quantized(node.inputs[0]))


def _weight(node: ir.Node) -> ir.Node | None:
    """The node that dequantizes a layer's weight, also before a Transpose: the layer itself where it is MatMulNBits."""
    if node.op_type == "MatMulNBits":
        return node
    value = node.inputs[1]
    while (moved := producer(value, "Transpose", "Reshape")) is not None:
        value = moved.inputs[0]
    folded = producer(value, "Mul")
    return folded if folded is not None and WEIGHT_KEY in folded.metadata_props else producer(value, "DequantizeLinear")


def _is_stored(node: ir.Node) -> bool:
    weight = _weight(node)
    return weight is not None and _codes(weight) is not None


def _codes(dequantize: ir.Node) -> ir.Value | None:
    """The initializer that a weight's codes come from, also through what is folded at load; None for an activation."""
    value = dequantize.inputs[1 if dequantize.op_type == "MatMulNBits" else 0]
    while (between := producer(value, "Cast", "Reshape", "Mul", "Add", "Clip", "QuantizeLinear")) is not None:
        value = between.inputs[0]
    return value if constant(value) is not None else None


def _name(node: ir.Node) -> str:
    """The layer's name in the trained model, or else the node's without its operator."""
    weight = _weight(node) if node.op_type in _CONVOLUTIONS | _PRODUCTS else None
    label = "" if weight is None else weight.metadata_props.get(WEIGHT_KEY, "")
    name = label.removesuffix(".weight") or (node.name or "").removesuffix(f"/{node.op_type}")
    return name or node.outputs[0].name or node.op_type


def _clamps(value: ir.Value) -> Iterator[ir.Node]:
    """The ReLUs and Clips after a value, as long as they alone read it."""
    while (
        not value.is_graph_output()
        and len(readers := [use.node for use in value.uses()]) == 1
        and readers[0].op_type in _BETWEEN
        and readers[0].inputs[0] is value
    ):
        yield readers[0]
        value = readers[0].outputs[0]


def _after_clamps(value: ir.Value) -> ir.Value:
    clamps = list(_clamps(value))
    return clamps[-1].outputs[0] if clamps else value


def _is_bias(value: ir.Value) -> bool:
    """Whether all that reads a value adds a constant to it."""
    readers = [use.node for use in value.uses()]
    return bool(readers) and all(
        node.op_type == "Add" and any(constant(other) is not None for other in node.inputs) for node in readers
    )


def _is_unsigned(quantize: ir.Node) -> bool:
    zero_point = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if zero_point is None:
        return quantize.attributes.get_int("output_dtype", 0) in {0, ir.DataType.UINT8}
    return bool(zero_point.dtype == np.uint8)


def _same_grid(dequantize: ir.Node, quantize: ir.Node) -> bool:
    """Whether scale and zero point are the same; an absent zero point is 0."""
    zero_points = [scalar(node.inputs[2] if len(node.inputs) > 2 else None, 0.0) for node in (dequantize, quantize)]
    scales = [scalar(node.inputs[1], 0.0) for node in (dequantize, quantize)]
    return scales[0] == scales[1] and zero_points[0] == zero_points[1]


def _channels(conv: ir.Node) -> tuple[int, int]:
    """Output channels, and input channels of one group."""
    weight = _weight(conv)
    codes = constant(None if weight is None else _codes(weight))
    assert codes is not None
    return codes.shape[0], codes.shape[1]


def _is_depthwise(conv: ir.Node) -> bool:
    return conv.attributes.get_int("group", 1) > 1 and _channels(conv)[1] == 1
