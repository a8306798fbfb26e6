"""BatchNorm after a quantized layer goes into its scales and its bias, and never into its integer codes."""

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

    Likewise for transposed convolutions without groups, and for linear layers (Gemm). Integer codes stay as trained, up to the
    sign of a channel. A channel with gamma = 0 outputs its beta: its codes become 0. Layers that share a weight get one
    DequantizeLinear each. Where a BatchNorm has to stay, a warning names the layer.
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
    """A BatchNorm that goes into the layer before it: the three nodes, and their numbers for O output channels.

    Attributes:
        axis: of the output channels in the weight.
        codes: int8, the stored weight, with O entries along ``axis``.
        scale: float32, () or (O,).
        bias: float64 (O,), of the layer; zeros where it has none.
        factor: float64 (O,), gamma / sqrt(variance + epsilon).
        shift: float64 (O,), what BatchNorm makes of zero: beta - mean * factor.
    """

    batch_norm: ir.Node
    layer: ir.Node
    dequantize: ir.Node
    axis: int
    codes: Codes
    scale: npt.NDArray[np.float32]
    bias: Floats
    factor: Floats
    shift: Floats

    @property
    def keeps_codes(self) -> bool:
        """Whether all codes fit after the sign of channels has changed: -128 has no opposite."""
        return not bool((np.moveaxis(self.codes, self.axis, 0)[self.factor < 0] == -128).any())

    def folded(self) -> tuple[Codes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Codes, scale (O,) and bias (O,) with which the layer alone computes what both compute."""
        sign = np.sign(self.factor).astype(np.int8).reshape([-1 if dim == self.axis else 1 for dim in range(self.codes.ndim)])
        scale = np.where(self.factor == 0, 1.0, np.abs(self.factor)) * self.scale.astype(np.float64).reshape(-1)
        bias = self.shift + self.bias * self.factor
        return self.codes * sign, scale.astype(np.float32), bias.astype(np.float32)

    def apply(self, graph: ir.Graph) -> None:
        """Change the graph."""
        dequantize = self.dequantize
        if only_consumer(dequantize.outputs[0]) is not self.layer:
            dequantize = _copied(dequantize, f"{self.layer.name}/DequantizeLinear")
            graph.insert_before(self.layer, dequantize)
            self.layer.replace_input_with(1, dequantize.outputs[0])
        name = dequantize.metadata_props.get(WEIGHT_KEY, self.layer.name or "conv")
        codes, scale, bias = self.folded()
        dequantize.replace_input_with(0, initializer(graph, f"{name}.folded_codes", codes))
        dequantize.replace_input_with(1, initializer(graph, f"{name}.folded_scale", scale))
        dequantize.attributes["axis"] = ir.AttrInt64("axis", self.axis)
        self.layer.resize_inputs(3)
        self.layer.replace_input_with(2, initializer(graph, f"{name}.folded_bias", bias))
        replace(self.batch_norm, self.layer.outputs[0])


def _foldable(node: ir.Node) -> Fold | None:
    """What can be folded at a node, if it is a BatchNorm after a layer with stored integers."""
    if node.op_type != "BatchNormalization" or any(output.uses() for output in node.outputs[1:]):
        return None
    layer = next(filter(None, (producer(node.inputs[0], kind) for kind in ("Conv", "ConvTranspose", "Gemm"))), None)
    dequantize = None if layer is None else producer(layer.inputs[1], "DequantizeLinear")
    numbers = [constant(value) for value in node.inputs[1:5]]
    if layer is None or dequantize is None or any(number is None for number in numbers):
        return None
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    if codes is None or scale is None:
        return None
    if only_consumer(layer.outputs[0]) is not node:
        _log.warning("%s: BatchNorm stays in the graph: something else reads the layer's output too.", layer.name)
        return None
    axis = _output_axis(layer)
    scaled_along = dequantize.attributes.get_int("axis", 1)
    if axis is None or "block_size" in dequantize.attributes or (scale.size > 1 and scaled_along != axis):
        _log.warning(
            "%s: BatchNorm stays in the graph: its factors are one per output channel, and the scales of this weight are not. "
            "Quantize it per tensor or per output channel (axis 1 of a transposed convolution without groups).",
            layer.name,
        )
        return None
    gamma, beta, mean, variance = (np.asarray(number, dtype=np.float64) for number in numbers)
    factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 and layer.inputs[2] is not None else np.zeros(1)
    if bias is None:  # computed: nothing to add to
        return None
    bias = np.broadcast_to(bias.astype(np.float64).reshape(-1), factor.shape)
    fold = Fold(node, layer, dequantize, axis, codes, scale, bias, factor, beta - mean * factor)
    if not fold.keeps_codes:
        _log.warning(
            "%s: BatchNorm stays in the graph: a weight code of -128 would have to change its sign. "
            "Train with a narrow range (-127..127) to have it folded.",
            layer.name,
        )
        return None
    return fold


def _output_axis(layer: ir.Node) -> int | None:
    """Dimension of the weight that counts output channels; None where no single one does."""
    attributes = layer.attributes
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose":
        return 1 if attributes.get_int("group", 1) == 1 else None
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1 and not attributes.get_int("transA", 0)
    return (0 if attributes.get_int("transB", 0) else 1) if plain else None


def _copied(dequantize: ir.Node, name: str) -> ir.Node:
    """A second DequantizeLinear of the same stored integers."""
    copy = ir.node(dequantize.op_type, dequantize.inputs, dequantize.attributes, name=name)
    copy.metadata_props.update(dequantize.metadata_props)
    output, source = copy.outputs[0], dequantize.outputs[0]
    output.name, output.type, output.shape = f"{name}:out", deepcopy(source.type), source.shape
    return copy
