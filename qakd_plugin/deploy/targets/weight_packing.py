"""Weights of few bits take few bits in the file, and reach the runtime as the int8 codes that its kernels read.

``INT4 -> Cast(int8) -> DequantizeLinear``: ONNX Runtime and OpenVINO fold the Cast when they load the file, so outputs and
speed are those of int8 codes. Without the Cast both compute in floating point. Codes that :mod:`.onnxruntime_bias` stored
times a power of two are divided by it here and multiplied again after the Cast, in int32: ``INT4 -> Cast(int32) -> Mul ->
Cast(int8) -> DequantizeLinear``. Grids without a zero (DoReFa's codes are odd) get an Add as well.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from ...placement.targets import WeightStorage as WeightStorage
from ..canonical.graph import cast, chain, constant, initializer, weight_dequantizers
from ..canonical.opset import declare_opset

Codes = npt.NDArray[np.int8]
Factors = npt.NDArray[np.int32]

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
            grid = _grid(codes, axis, low, high)
            if grid is not None:
                _pack(model.graph, dequantize, kind, codes, *grid)
                opset = max(opset, needed)
                break
    if opset:
        declare_opset(model, opset)
        common.RemoveUnusedNodesPass()(model)  # the wide codes


def _grid(codes: Codes, axis: int | None, low: int, high: int) -> tuple[Factors, Factors] | None:
    """Powers of two p and offsets o so that (codes - o) / p are integers in low..high: one for all, or per channel; or None."""
    every = tuple(range(codes.ndim))
    per_channel = None if axis is None else tuple(dim for dim in every if dim != axis % codes.ndim)
    for dims in (every, per_channel):
        if dims is None:
            continue
        # Few numbers of many codes; all that follows is done with these.
        used, common_bits = (
            find.reduce(codes, axis=dims, keepdims=True).astype(np.int32) for find in (np.bitwise_or, np.bitwise_and)
        )
        least = codes.min(axis=dims, keepdims=True, initial=127).astype(np.int32)
        most = codes.max(axis=dims, keepdims=True, initial=-128).astype(np.int32)
        power = np.where(used == 0, 1, used & -used)  # the lowest bit that any code uses
        without_zero = common_bits & power != 0  # all codes are odd multiples of it
        for factor, offset in ((power, 0 * power), (np.where(without_zero, 2, 1) * power, np.where(without_zero, power, 0))):
            if ((least - offset) // factor).min(initial=0) >= low and ((most - offset) // factor).max(initial=0) <= high:
                shape = () if dims == every else factor.shape
                return factor.astype(np.int32).reshape(shape), offset.astype(np.int32).reshape(shape)
    return None


def _pack(graph: ir.Graph, dequantize: ir.Node, kind: type, codes: Codes, factor: Factors, offset: Factors) -> None:
    wide = dequantize.inputs[0]
    assert wide is not None
    small: npt.NDArray[Any] = ((codes - offset) // factor).astype(kind)
    value = initializer(graph, f"{wide.name}.{small.dtype.name}", small)
    steps = [cast(ir.DataType.INT8)]
    if offset.any():
        steps.insert(0, ir.node("Add", [None, initializer(graph, f"{wide.name}.offset", offset)]))
    if (factor != 1).any():
        steps.insert(0, ir.node("Mul", [None, initializer(graph, f"{wide.name}.power", factor)]))
    if len(steps) > 1:
        steps.insert(0, cast(ir.DataType.INT32))
    dequantize.replace_input_with(0, chain(dequantize, value, steps, f"{dequantize.name}/storage"))
