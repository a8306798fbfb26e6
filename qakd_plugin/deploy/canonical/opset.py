"""Which version of ONNX's operators a file declares."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph import activation_quantizers, constant

OPSET = 20
"""The newest opset before 21, where ONNX Runtime rejects int8 pairs with a zero point in front of MaxPool and Reshape
(onnxruntime#25526); every TensorRT from 10.3 on reads it. Weights in blocks or in 4 bits raise it to 21, without such zero
points; see :class:`RaiseOpset`."""


class RaiseOpset(InPlacePass):
    """Declare opset 21 where blocks or 4-bit codes need it."""

    def call(self, model: ir.Model) -> PassResult:
        needed = any(
            node.attributes.get_int("block_size", 0) or _is_int4(node.inputs[0])
            for node in model.graph
            if node.op_type == "DequantizeLinear"
        )
        if needed:
            declare_opset(model, 21)
        return PassResult(model, modified=needed)


def declare_opset(model: ir.Model, version: int) -> None:
    """Declare an opset from 21 to 25, so that ONNX Runtime loads the file.

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
