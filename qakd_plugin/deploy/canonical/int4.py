"""Weights of few bits in ONNX's own 4-bit type, for layers that every target reads so."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph import constant, identity, initializer, is_table, weight_dequantizers


class PackInt4(InPlacePass):
    """Store codes -8..7 in 4 bits, where a weight has several scales.

    Args:
        taken: whether a target takes the weight of a DequantizeLinear in 4 bits. All take those of linear layers whose
            activations are in floating point and of embeddings, :func:`.graph.is_quantized_alone`; other weights of few bits
            stay in INT8 in a canonical model, because ONNX Runtime's integer kernels read INT8 only.
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


class ShareTiedCodes(InPlacePass):
    """Store the codes of an embedding once, where a linear layer has the same: a language model's output layer, as a rule."""

    def call(self, model: ir.Model) -> PassResult:
        weights = list(weight_dequantizers(model.graph))
        known = {identity(node.inputs[0]): node.inputs[0] for node in weights if is_table(node)}
        modified = False
        for node in weights if known else ():
            shared = known.get(identity(node.inputs[0]), node.inputs[0])
            if shared is not node.inputs[0]:
                node.replace_input_with(0, shared)
                modified = True
        return PassResult(model, modified)
