"""Export form -> canonical ONNX: one path for every toolkit."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset20
from torch import Tensor, nn

from ..errors import ExportError
from . import ops as ops  # registers qakd::qdq and qakd::dq
from .passes import canonicalize

OPSET = 20
"""The newest opset before 21, where ONNX Runtime rejects int8 pairs with a zero point in front of MaxPool and Reshape
(onnxruntime#25526); every TensorRT from 10.3 on reads it."""


def export_canonical(form: nn.Module, example: Tensor) -> ir.Model:
    """Export an export form with a dynamic batch dimension and bring it into canonical form.

    Args:
        form: what an adapter's ``export_form`` returned.
        example: float32 (N, ...), any batch size.

    Returns:
        An onnx-ir model: input "input", outputs "logits" (or "output_0", ... when there are several).

    Raises:
        ExportError: torch.export cannot trace the model.
    """
    # With a batch of one the exporter would take the batch dimension for a constant.
    batch = example if example.shape[0] > 1 else torch.cat([example, example])
    with torch.no_grad():
        outputs = form(batch)
    count = 1 if isinstance(outputs, Tensor) else len(outputs)
    names = ["logits"] if count == 1 else [f"output_{index}" for index in range(count)]
    try:
        with _quiet():
            program = torch.onnx.export(
                form,
                (batch,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=names,
                custom_translation_table={
                    torch.ops.qakd.qdq.default: _translate_qdq,
                    torch.ops.qakd.dq.default: _translate_dq,
                },
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"torch.export cannot trace the model: {reason} Check that its forward takes one tensor and that the batch size "
            "does not steer its control flow."
        ) from error
    assert program is not None
    return canonicalize(program.model)


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize, and let ONNX's own checker look at the result."""
    proto: onnx.ModelProto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=False)
    return proto


def _translate_qdq(x: Any, scale: Any, zero_point: int, quant_min: int, quant_max: int) -> Any:
    """Clip where the grid is narrower than its container, then QuantizeLinear and DequantizeLinear."""
    unsigned = zero_point != 0 and quant_min >= 0
    container = (0, 255) if unsigned else (-128, 127)
    if (quant_min, quant_max) != container:
        low = opset20.Mul(scale, opset20.Constant(value_float=float(quant_min - zero_point)))
        high = opset20.Mul(scale, opset20.Constant(value_float=float(quant_max - zero_point)))
        x = opset20.Clip(x, low, high)
    kind = onnx.TensorProto.UINT8 if unsigned else onnx.TensorProto.INT8
    zero = opset20.Cast(opset20.Constant(value_int=zero_point), to=kind)
    return opset20.DequantizeLinear(opset20.QuantizeLinear(x, scale, zero), scale, zero)


def _translate_dq(codes: Any, scale: Any, axis: int, block: int) -> Any:
    assert block == 0, "blocked weights need opset 21"
    return opset20.DequantizeLinear(codes, scale, axis=axis)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout and logs every version conversion; its errors come as exceptions."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


