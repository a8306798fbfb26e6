"""BatchNorm after a quantized convolution goes into its scales and its bias, and never into its integer codes."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph import WEIGHT_KEY, constant, initializer, only_consumer, producer, replace

_log = logging.getLogger(__name__)

Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float64]


class FoldBatchNorm(InPlacePass):
    """``DQ(q, s) -> Conv -> BatchNorm`` becomes ``DQ(sign(a) q, s |a|) -> Conv`` with a float bias, a = gamma / sigma.

    Integer codes stay as trained, up to the sign of a channel. A channel with gamma = 0 outputs its beta: its codes become 0.
    Convolutions that share a weight get one DequantizeLinear each. Where a BatchNorm has to stay, a warning names the layer.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            fold = _foldable(node)
            if fold is not None:
                fold.apply(model.graph)
                modified = True
        return PassResult(model, modified)


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that goes into the convolution before it: the three nodes, and their numbers for O output channels.

    Attributes:
        codes: int8 (O, ...), the stored weight.
        scale: float32, () or (O,).
        bias: float64 (O,), of the convolution; zeros where it has none.
        factor: float64 (O,), gamma / sqrt(variance + epsilon).
        shift: float64 (O,), what BatchNorm makes of zero: beta - mean * factor.
    """

    batch_norm: ir.Node
    conv: ir.Node
    dequantize: ir.Node
    codes: Codes
    scale: npt.NDArray[np.float32]
    bias: Floats
    factor: Floats
    shift: Floats

    @property
    def keeps_codes(self) -> bool:
        """Whether all codes fit after the sign of channels has changed: -128 has no opposite."""
        return not bool((self.codes[self.factor < 0] == -128).any())

    def folded(self) -> tuple[Codes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Codes, scale (O,) and bias (O,) with which the convolution alone computes what both compute."""
        sign = np.sign(self.factor).astype(np.int8).reshape(-1, *[1] * (self.codes.ndim - 1))
        scale = np.where(self.factor == 0, 1.0, np.abs(self.factor)) * self.scale.astype(np.float64).reshape(-1)
        bias = self.shift + self.bias * self.factor
        return self.codes * sign, scale.astype(np.float32), bias.astype(np.float32)

    def apply(self, graph: ir.Graph) -> None:
        """Change the graph."""
        dequantize = self.dequantize
        if only_consumer(dequantize.outputs[0]) is not self.conv:
            dequantize = _copied(dequantize, f"{self.conv.name}/DequantizeLinear")
            graph.insert_before(self.conv, dequantize)
            self.conv.replace_input_with(1, dequantize.outputs[0])
        layer = dequantize.metadata_props.get(WEIGHT_KEY, self.conv.name or "conv")
        codes, scale, bias = self.folded()
        dequantize.replace_input_with(0, initializer(graph, f"{layer}.folded_codes", codes))
        dequantize.replace_input_with(1, initializer(graph, f"{layer}.folded_scale", scale))
        dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)
        self.conv.resize_inputs(3)
        self.conv.replace_input_with(2, initializer(graph, f"{layer}.folded_bias", bias))
        replace(self.batch_norm, self.conv.outputs[0])


def _foldable(node: ir.Node) -> Fold | None:
    """What can be folded at a node, if it is a BatchNorm after a convolution with stored integers."""
    if node.op_type != "BatchNormalization" or any(output.uses() for output in node.outputs[1:]):
        return None
    conv = producer(node.inputs[0], "Conv")
    dequantize = None if conv is None else producer(conv.inputs[1], "DequantizeLinear")
    numbers = [constant(value) for value in node.inputs[1:5]]
    if conv is None or dequantize is None or any(number is None for number in numbers):
        return None
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    if codes is None or scale is None:
        return None
    if only_consumer(conv.outputs[0]) is not node:
        _log.warning("%s: BatchNorm stays in the graph: something else reads the convolution's output too.", conv.name)
        return None
    gamma, beta, mean, variance = (np.asarray(number, dtype=np.float64) for number in numbers)
    factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    bias = np.zeros_like(factor) if bias is None else bias.astype(np.float64)
    fold = Fold(node, conv, dequantize, codes, scale, bias, factor, beta - mean * factor)
    if not fold.keeps_codes:
        _log.warning(
            "%s: BatchNorm stays in the graph: a weight code of -128 would have to change its sign. "
            "Train with a narrow range (-127..127) to have it folded.",
            conv.name,
        )
        return None
    return fold


def _copied(dequantize: ir.Node, name: str) -> ir.Node:
    """A second DequantizeLinear of the same stored integers."""
    copy = ir.node(dequantize.op_type, dequantize.inputs, dequantize.attributes, name=name)
    copy.metadata_props.update(dequantize.metadata_props)
    output, source = copy.outputs[0], dequantize.outputs[0]
    output.name, output.type, output.shape = f"{name}:out", deepcopy(source.type), source.shape
    return copy
