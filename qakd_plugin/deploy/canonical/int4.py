"""Weights of few bits in ONNX's own 4-bit type, for layers that every target reads so."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph import constant, initializer, weight_dequantizers


class PackInt4(InPlacePass):
    """Store codes -8..7 in 4 bits, where a weight has several scales.

    Args:
        taken: whether a target takes the weight of a DequantizeLinear in 4 bits. All take those of linear layers whose
            activations are in floating point, :func:`.graph.is_weight_only`; other weights of few bits stay in INT8 in a
            canonical model, because ONNX Runtime's integer kernels read INT8 only.
    """

    def __init__(self, taken: Callable[[ir.Node], bool]) -> None:
        self.taken = taken

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for dequantize in weight_dequantizers(model.graph):
            value = dequantize.inputs[0]
            codes, scale = constant(value), constant(dequantize.inputs[1])
            assert value is not None
            assert codes is not None
            assert scale is not None
            fits = codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
            if fits and scale.ndim > 0 and self.taken(dequantize):
                packed = initializer(model.graph, f"{value.name}.int4", codes.astype(ml_dtypes.int4))
                dequantize.replace_input_with(0, packed)
                modified = True
        return PassResult(model, modified)
