"""Export form -> canonical ONNX: int8, zero point 0, BatchNorm folded, nothing local left in the file; for every toolkit.

The passes are exact: they change how the numbers are computed, never which numbers come out (float rounding aside).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass, PassError, Sequential
from onnxscript.values import Opset
from torch import nn

from ...errors import KEEP_FLOAT, ExportError
from ...export_form import ops as ops  # registers qakd::qdq and qakd::dq
from ...export_form.tracing import Traced, first_line, trace, unwrapped
from ...tasks.inputs import Inputs
from .batch_norm import FoldBatchNorm
from .clamps import MergeClips, QuantizeAfterRelu
from .cleanup import Clean
from .graph import DOMAIN, is_quantized_alone
from .int4 import PackInt4, ShareTiedCodes
from .lowering import LowerQuantizers, NameNodes
from .opset import OPSET, RaiseOpset
from .quantizers import CarryThroughMaxPool, MergeEqualQuantizers

_REWRITE = "Write that operation with others in forward, or leave it out of what is exported."

PASSES: tuple[InPlacePass, ...] = (
    NameNodes(),  # first, so that all that follow can name what they make
    LowerQuantizers(),  # from here on the graph is ONNX's own
    FoldBatchNorm(),  # before clamps and quantizers are looked at, which follow the BatchNorm
    QuantizeAfterRelu(),
    MergeClips(),  # after it: it brings a ReLU and a quantizer's Clip together
    CarryThroughMaxPool(),
    MergeEqualQuantizers(),  # after everything that moves or makes quantizers
    PackInt4(is_quantized_alone),
    ShareTiedCodes(),
    RaiseOpset(),  # after PackInt4, which may need it
    Clean(),
)
"""From what the exporter writes to a canonical model, in this order."""

FIXED_KEY = "qakd.fixed"
"""Metadata of a file: the dimensions that would be dynamic, had the model not fixed them, and why."""

_LARGEST_FILE = 2**31 - 1
"""Bytes that protobuf can write."""


def canonicalize(model: ir.Model, *, without: Collection[type[InPlacePass]] = ()) -> ir.Model:
    """Bring a freshly exported model into canonical form, in place.

    Args:
        model: as the exporter made it.
        without: passes to leave out, to find the one that a difference comes from; the first two are always needed.

    Raises:
        ExportError: a pass does not take the model; names the node where the pass does.
    """
    try:
        Sequential(*(one for one in PASSES if type(one) not in without))(model)
    except PassError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause).rstrip(".")
        raise ExportError(f"the model cannot be brought into canonical form: {reason}. {KEEP_FLOAT}") from error
    return model


def export_canonical(form: nn.Module, example: Inputs) -> ir.Model:
    """:func:`trace` a model with a dynamic batch dimension, and bring it into canonical form (:func:`to_canonical`)."""
    return to_canonical(trace(form, example))


def to_canonical(traced: Traced) -> ir.Model:
    """The canonical form of a traced model.

    Args:
        traced: what an adapter's ``export_form`` returned, or a float model, in eval mode.

    Returns:
        An onnx-ir model with the traced names of inputs, outputs and dynamic dimensions.

    Raises:
        ExportError: ONNX has no operator for a part of it, or it is larger than an ONNX file may be.
    """
    model = canonicalize(_export(traced))
    if traced.fixed:
        model.metadata_props[FIXED_KEY] = "; ".join(traced.fixed)
    _check_size(model)
    return model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize, and let ONNX's own checker look at the result.

    Raises:
        ExportError: it is not valid ONNX, or too large; names the node where the checker does.
    """
    try:
        proto: onnx.ModelProto = ir.serde.serialize_model(model)
        onnx.checker.check_model(proto, full_check=False)
    except Exception as error:  # the checker's exceptions and protobuf's share no other base class
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ExportError(f"the model cannot be written as ONNX: {reason}. {KEEP_FLOAT}") from error
    return proto


def _attention_in_parts(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """With attention as the products and the softmax that it is made of, where it has windows beside its heads.

    The exporter writes ``scaled_dot_product_attention`` for four dimensions alone.
    """
    attention = torch.ops.aten.scaled_dot_product_attention.default
    queries = [node.args[0] for node in program.graph.nodes if node.target is attention]
    if all(query.meta["val"].ndim == 4 for query in queries):
        return program
    decomposed: torch.export.ExportedProgram = program.run_decompositions({attention: _in_parts})
    return decomposed


def _in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


def _export(traced: Traced) -> ir.Model:
    try:
        program = torch.onnx.export(
            _attention_in_parts(traced.program),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            custom_translation_table={
                torch.ops.qakd.qdq.default: _translate_qdq,
                torch.ops.qakd.dq.default: _translate_dq,
            },
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error).rstrip(".")
        raise ExportError(f"the model cannot be written as ONNX: {reason}. {_REWRITE}") from error
    assert program is not None
    _store_constants(program.model.graph)
    _rename(program.model, traced)
    return program.model


def _store_constants(graph: ir.Graph) -> None:
    """Store what nodes read and nothing makes: bounds of two clamps, which the exporter made one of, are not in its file."""
    for value in [value for node in graph for value in node.inputs if value is not None and value.producer() is None]:
        if value.const_value is not None and not (value.is_initializer() or value.is_graph_input()):
            graph.register_initializer(value)


def _rename(model: ir.Model, traced: Traced) -> None:
    """Stored tensors are called as in the model, and dynamic sizes by their names."""
    for value in list(model.graph.initializers.values()):
        value.name = unwrapped(value.name or "")
    if not traced.symbols:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, traced.symbols))})\b")
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                pattern.sub(lambda found: traced.symbols[found[0]], str(size.value))
                if isinstance(size, ir.SymbolicDim) and size.value
                else size
                for size in value.shape
            )


def _check_size(model: ir.Model) -> None:
    sizes = {
        name: value.const_value.nbytes for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    if (total := sum(sizes.values())) > _LARGEST_FILE:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ExportError(
            f"the model takes {total / 2**30:.1f} GiB, and an ONNX file holds 2 GiB at most; its largest tensor is {largest} "
            f"with {sizes[largest] / 2**30:.1f} GiB. Quantize more of its layers, or export a smaller model."
        )


@functools.cache
def _operators() -> Opset:
    """Our two operators cross the exporter as they are; :class:`LowerQuantizers` turns them into ONNX's own."""
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


def _translate_qdq(x: Any, scale: Any, zero_point: int, quant_min: int, quant_max: int, name: str) -> Any:
    return _operators().QDQ(x, scale, zero_point=zero_point, quant_min=quant_min, quant_max=quant_max, name=name)


def _translate_dq(codes: Any, scale: Any, axis: int, block: int, name: str) -> Any:
    return _operators().DQ(codes, scale, axis=axis, block=block, name=name)
