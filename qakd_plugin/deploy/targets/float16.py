"""FP16 for what is not quantized, in the file itself: a strongly typed engine computes in the types that it is given.

ONNX Runtime's converter (``onnxruntime.transformers.float16``) is not used, because it cuts values that FP16 cannot hold off
without a word; here such a file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...errors import ExportError, ParityError
from ..canonical.graph import constant, weight_dequantizers
from ..canonical.passes import quantizers_behind_relu
from ..parity.imposed_codes import imposed_codes
from ..parity.recorded_codes import run_recorded
from ..parity.report import arrays, largest_deviation, least_agreement

TIE_TOLERANCE = 0.45
"""How far from a tie, in steps, FP16 may round an activation the other way. A value and its scale are each off by up to 2^-11,
which is 0.12 steps at code 127; sums whose terms cancel add several times that (0.36 steps were seen in a network that was
hardly trained). At 0.5 a file that truncates in the place of rounding would pass."""

LOGIT_TOLERANCE = 1e-2
"""Largest deviation of logits, relative to their range, once ties are settled."""

_LARGEST, _SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Float16Parity:
    """How the FP16 file compares with the float32 one, in ONNX Runtime without fusions.

    Attributes:
        codes: integer activation codes compared.
        ties: activations within :data:`TIE_TOLERANCE` of a tie that FP16 rounds the other way.
        deviation: of the logits, over their range, with all ties settled alike; the largest of all outputs.
        top1: share of samples with the same arg max, ties left as they fall; the smallest of all outputs.
    """

    codes: int
    ties: int
    deviation: float
    top1: float


def to_float16(model: ir.Model) -> ir.Model:
    """Everything in float32 becomes float16, but inputs and outputs; scales get the type of what they scale; in place.

    Raises:
        ExportError: a value is too large for FP16, or an activation's scale too small; names it.
    """
    graph = model.graph
    keep = {node.inputs[2] for node in graph if node.op_type == "Resize" and len(node.inputs) > 2}  # float32 by the standard
    weight_scales = {node.inputs[1] for node in weight_dequantizers(graph)}
    scales = {node.inputs[1] for node in graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}}
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and value not in keep:
            array = constant(value)
            assert array is not None
            least = _SMALLEST if value in scales else 0.0
            if value in scales - weight_scales and float(array.min()) < _SMALLEST:
                raise ExportError(f"{name}: a scale of {array.min():.3g} is too small for FP16. Export without float16.")
            value.const_value = ir.tensor(_halved(array, name, least), name=name)
            value.dtype = ir.DataType.FLOAT16
    for node in graph:
        for key, attribute in list(node.attributes.items()):
            if key == "to" and node.op_type == "Cast" and attribute.as_int() == ir.DataType.FLOAT:
                node.attributes[key] = ir.AttrInt64(key, ir.DataType.FLOAT16.value)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
                array = _halved(attribute.as_tensor().numpy(), node.name or node.op_type, 0.0)
                node.attributes[key] = ir.AttrTensor(key, ir.tensor(array))
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = ir.DataType.FLOAT16
    _cast_ends(graph)
    try:
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the model cannot be written in FP16: {reason}. Export without float16.") from error
    return model


def check_float16(file: ir.Model, form: nn.Module, samples: Tensor) -> Float16Parity:
    """Run an FP16 file without fusions, and compare it with the export form in float32.

    Args:
        file: from :func:`to_float16`.
        form: the export form it came from.
        samples: float32 (N, ...) inputs.

    Raises:
        ParityError: a quantizer's codes differ by more than FP16 explains, or the logits do; names the first.
    """
    program = "the FP16 file in ONNX Runtime"
    logits, codes = run_recorded(file, samples, optimize=False)
    with imposed_codes(form, codes, TIE_TOLERANCE, quantizers_behind_relu(file.graph)) as outcome, torch.no_grad():
        settled = arrays(form(samples))
    outcome.raise_first(program, "its export form in float32")
    deviation = largest_deviation(logits, settled)
    if not deviation <= LOGIT_TOLERANCE:
        raise ParityError(
            f"logits: {program} and its export form in float32 differ by {deviation:.2g} of the logit range although all "
            f"activation codes agree; allowed are {LOGIT_TOLERANCE:g}. Export without float16.",
            "logits",
        )
    with torch.no_grad():
        expected = arrays(form(samples))
    return Float16Parity(outcome.compared, outcome.ties, deviation, least_agreement(expected, logits).top1)


def _halved(array: npt.NDArray[np.float32], name: str, least: float) -> npt.NDArray[np.float16]:
    finite = array[np.isfinite(array)]
    if finite.size and float(np.abs(finite).max()) > _LARGEST:
        raise ExportError(
            f"{name}: {finite[np.abs(finite).argmax()]:.3g} is beyond FP16's largest number, {_LARGEST:g}. Export without "
            "float16."
        )
    # A scale that vanishes is not positive any more. What it scales is below anything that FP16 can tell from zero.
    return np.asarray(np.maximum(array, least) if least else array, dtype=np.float16)


def _cast_ends(graph: ir.Graph) -> None:
    """Inputs and outputs stay float32."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            cast = _cast(value, ir.DataType.FLOAT16, f"{value.name}/Cast")
            for use in list(value.uses()):
                use.node.replace_input_with(use.idx, cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            name = value.name
            value.name = f"{name}:float16"
            cast = _cast(value, ir.DataType.FLOAT, f"{name}/Cast")
            cast.outputs[0].name, cast.outputs[0].shape = name, value.shape
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": kind.value}, name=name)
    node.outputs[0].name, node.outputs[0].dtype = f"{name}:out", kind
    return node
