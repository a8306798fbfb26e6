"""Weights of few bits take few bits in the file, and reach the runtime as the int8 codes that its kernels read.

``INT4 -> Cast(int8) -> DequantizeLinear``: ONNX Runtime and OpenVINO fold the Cast when they load the file, so outputs and
speed are those of int8 codes. Without the Cast both compute in floating point. Codes that ``ort_form`` stored times a power of
two are divided by it here and multiplied again behind the Cast, in int32: ``INT4 -> Cast(int32) -> Mul -> Cast(int8) ->
DequantizeLinear``.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from .graph import cast, chain, constant, initializer, weight_dequantizers
from .passes import declare_opset

WeightStorage = Literal["int8", "int4", "int2"]
"""The narrowest type that weights are stored in."""

_NARROW: dict[WeightStorage, tuple[tuple[type, int, int, int], ...]] = {
    "int8": (),
    "int4": ((ml_dtypes.int4, -8, 7, 21),),
    "int2": ((ml_dtypes.int2, -2, 1, 25), (ml_dtypes.int4, -8, 7, 21)),
}
"""Types to try, narrowest first: lowest and highest code, and the opset that has them."""


def store_weights(model: ir.Model, storage: WeightStorage) -> None:
    """Store integer weights in the narrowest type that holds their codes, in place; those that need 8 bits stay as they are.

    Args:
        model: canonical, or in ONNX Runtime's form.
        storage: "int8" leaves everything as it is; "int4" for ONNX Runtime from 1.23 on and OpenVINO; "int2" for ONNX Runtime
            that knows opset 25.
    """
    opset = 0
    for dequantize in weight_dequantizers(model.graph):
        codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
        if codes is None or scale is None or codes.dtype != np.int8:
            continue
        axis = dequantize.attributes.get_int("axis", 1) if scale.ndim == 1 else None
        for kind, low, high, needed in _NARROW[storage]:
            factor = _common_factor(codes, axis, low, high)
            if factor is not None:
                _pack(model.graph, dequantize, (codes // factor).astype(kind), factor)
                opset = max(opset, needed)
                break
    if opset:
        declare_opset(model, opset)
        common.RemoveUnusedNodesPass()(model)  # the wide codes


def _common_factor(codes: npt.NDArray[np.int8], axis: int | None, low: int, high: int) -> npt.NDArray[np.int32] | None:
    """Powers of two that divide all codes so that quotients fit into low..high: one for all, or per channel; None if none."""
    every = tuple(range(codes.ndim))
    per_channel = None if axis is None else tuple(dim for dim in every if dim != axis % codes.ndim)
    for dims in (every, per_channel):
        if dims is None:
            continue
        used = np.bitwise_or.reduce(codes.astype(np.int32), axis=dims, keepdims=True)
        factor = np.where(used == 0, 1, used & -used)
        if dims == every:
            factor = factor.reshape(())
        quotients = codes // factor
        if quotients.min(initial=0) >= low and quotients.max(initial=0) <= high:
            return factor.astype(np.int32)
    return None


def _pack(graph: ir.Graph, dequantize: ir.Node, codes: npt.NDArray[Any], factor: npt.NDArray[np.int32]) -> None:
    wide = dequantize.inputs[0]
    assert wide is not None
    value = initializer(graph, f"{wide.name}.{codes.dtype.name}", codes)
    steps = [cast(ir.DataType.INT8)]
    if (factor != 1).any():
        power = initializer(graph, f"{wide.name}.power", factor)
        steps = [cast(ir.DataType.INT32), ir.node("Mul", [None, power]), *steps]
    dequantize.replace_input_with(0, chain(dequantize, value, steps, f"{dequantize.name}/storage"))
