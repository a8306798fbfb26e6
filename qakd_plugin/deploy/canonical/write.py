"""Export form -> canonical ONNX: one path for every toolkit."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch import Tensor, nn

from ..._common.files import write_atomic
from ..._common.module_mode import eval_mode
from ...errors import ExportError
from ...export_form import ops as ops  # registers qakd::qdq and qakd::dq
from ...export_form.tracing import first_line, quiet, trace
from ..targets.float16 import to_float16
from .passes import DOMAIN, canonicalize

OPSET = 20
"""The newest opset before 21, where ONNX Runtime rejects int8 pairs with a zero point in front of MaxPool and Reshape
(onnxruntime#25526); every TensorRT from 10.3 on reads it. Weights in blocks or in 4 bits raise it to 21, in a form without
zero points; see :func:`qakd_plugin.deploy.canonical.passes.raise_opset`."""


@functools.cache
def _operators() -> Opset:
    """Our two operators cross the exporter as they are; :func:`canonicalize` turns them into ONNX's own."""
    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    integer, text = schema.AttrType.INT, schema.AttrType.STRING
    for name, codes, integers in (
        ("QDQ", "tensor(float)", ("zero_point", "quant_min", "quant_max")),
        ("DQ", "tensor(int8)", ("axis", "block")),
    ):
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(
                schema(
                    name,
                    DOMAIN,
                    1,
                    inputs=[parameter("x", codes), parameter("scale", "tensor(float)")],
                    outputs=[parameter("y", "tensor(float)")],
                    attributes=[schema.Attribute(key, integer) for key in integers] + [schema.Attribute("name", text)],
                )
            )
    return Opset(DOMAIN, 1)


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
    return canonicalize(_export(form, example))


def export_float(model: nn.Module, example: Tensor, path: str | os.PathLike[str], *, float16: bool = False) -> Path:
    """Write a float model to ONNX with a dynamic batch dimension: the row every quantized one is compared with.

    Args:
        model: any float network; exported in eval mode, its own mode is put back.
        example: float32 (N, ...), any batch size.
        path: of the file.
        float16: compute in FP16; inputs and outputs stay float32.

    Raises:
        ExportError: torch.export cannot trace the model, a weight is beyond FP16, or the path cannot be written.
    """
    with eval_mode(model):
        exported = canonicalize(_export(model, example))
    if float16:
        to_float16(exported)
    return write_atomic(path, to_proto(exported).SerializeToString(), ExportError)


def _export(model: nn.Module, example: Tensor) -> ir.Model:
    traced = trace(model, example)
    count = len(traced.graph_signature.user_outputs)
    try:
        with quiet():
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["logits"] if count == 1 else [f"output_{index}" for index in range(count)],
                custom_translation_table={
                    torch.ops.qakd.qdq.default: _translate_qdq,
                    torch.ops.qakd.dq.default: _translate_dq,
                },
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the model cannot be written as ONNX: {first_line(error.__cause__ or error)}") from error
    assert program is not None
    return program.model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize, and let ONNX's own checker look at the result."""
    proto: onnx.ModelProto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=False)
    return proto


def _translate_qdq(x: Any, scale: Any, zero_point: int, quant_min: int, quant_max: int, name: str) -> Any:
    return _operators().QDQ(x, scale, zero_point=zero_point, quant_min=quant_min, quant_max=quant_max, name=name)


def _translate_dq(codes: Any, scale: Any, axis: int, block: int, name: str) -> Any:
    return _operators().DQ(codes, scale, axis=axis, block=block, name=name)
