"""FP16 for what is not quantized, in the file itself: a strongly typed engine computes in the types that it is given.

ONNX Runtime's converter (``onnxruntime.transformers.float16``) is not used, because it cuts values that FP16 cannot hold off
without a word; here such a file is refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ...errors import ExportError
from ..canonical.graph import constant, copied, weight_dequantizers

_LARGEST, _SMALLEST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_subnormal)


def to_float16(model: ir.Model) -> ir.Model:
    """A copy in which everything in float32 is float16, but inputs and outputs; scales get the type of what they scale.

    Raises:
        ExportError: a value is too large for FP16, or an activation's scale too small; names it.
    """
    model = copied(model)
    _halve_initializers(model.graph)
    _halve_attributes(model.graph)
    for node in model.graph:
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = ir.DataType.FLOAT16
    _cast_ends(model.graph)
    _check(model)
    return model


def _halve_initializers(graph: ir.Graph) -> None:
    keep = {node.inputs[2] for node in graph if node.op_type == "Resize" and len(node.inputs) > 2}  # float32 by the standard
    weight_scales = {node.inputs[1] for node in weight_dequantizers(graph)}
    scales = {node.inputs[1] for node in graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}}
    for name, value in graph.initializers.items():
        if value.dtype != ir.DataType.FLOAT or value in keep:
            continue
        array = constant(value)
        assert array is not None
        if value in scales - weight_scales and float(array.min()) < _SMALLEST:
            raise ExportError(f"{name}: a scale of {array.min():.3g} is too small for FP16. Export without float16.")
        value.const_value = ir.tensor(_halved(array, name, _SMALLEST if value in scales else 0.0), name=name)
        value.dtype = ir.DataType.FLOAT16


def _halve_attributes(graph: ir.Graph) -> None:
    """Constants of nodes, and what they cast to."""
    for node in graph:
        for key, attribute in list(node.attributes.items()):
            if key == "to" and node.op_type == "Cast" and attribute.as_int() == ir.DataType.FLOAT:
                node.attributes[key] = ir.AttrInt64(key, ir.DataType.FLOAT16.value)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT:
                array = _halved(attribute.as_tensor().numpy(), node.name or node.op_type, 0.0)
                node.attributes[key] = ir.AttrTensor(key, ir.tensor(array))


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


def _check(model: ir.Model) -> None:
    try:
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the model cannot be written in FP16: {reason}. Export without float16.") from error
