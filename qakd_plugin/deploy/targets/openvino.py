"""Canonical graph -> the form OpenVINO's CPU kernels are fastest with. Exact: the same codes, the same numbers.

Its integer kernels are made for unsigned activations. What cannot be negative gets unsigned codes, of which it fills the lower
half; the clamps in front become one, which also ends where the signed codes did:

    Conv -> [Relu | Clip(0, c)]* -> Q(s8, s) -> DQ
becomes
    Conv -> Clip(0, q_max * s) -> Q(u8, zero point 0, s) -> DQ

The runtime fuses that clamp into the convolution. Tensors of both signs stay as they are.

A 1x1 convolution with a stride, as in the shortcut of a residual block, reads one position in every few. The runtime picks
those positions further up, and where no other layer reads the codes it does so between quantizing and dequantizing, after
which it no longer sees an integer convolution. Picking them after the dequantizer is the same, and it does:

    Q -> DQ -> Conv(1x1, stride n)
becomes
    Q -> DQ -> MaxPool(1x1, stride n) -> Conv(1x1)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.clamps import absorbed_clamps, has_signed_codes
from ..canonical.graph import (
    activation_quantizers,
    copied,
    initializer,
    kernel_shape,
    only_consumer,
    producer,
    scalar,
)
from ..canonical.quantizers import make_unsigned
from ..canonical.sign_analysis import non_negative_values
from .weight_packing import WeightStorage, store_weights


def to_openvino_form(model: ir.Model, storage: WeightStorage = "int4") -> ir.Model:
    """A copy of a canonical model in OpenVINO's form, weights stored as :func:`.weight_packing.store_weights` does."""
    model = copied(model)
    graph = model.graph
    non_negative = non_negative_values(graph)
    for quantize in list(activation_quantizers(graph)):
        if quantize.inputs[0] in non_negative and has_signed_codes(quantize):
            _clamp_once(graph, quantize)
            make_unsigned(graph, quantize, 0)
    for node in list(graph):
        if _picks_positions(node):
            _pick_before(graph, node)
    common.RemoveUnusedNodesPass()(model)  # the clamps that were merged
    store_weights(model, storage)
    return model


def _clamp_once(graph: ir.Graph, quantize: ir.Node) -> None:
    """One Clip for all clamps in front of a quantizer, and for the range of its codes."""
    scale = np.float32(scalar(quantize.inputs[1], 0.0))
    source, low, high = absorbed_clamps(quantize)
    bounds = [
        initializer(graph, f"{quantize.name}/{name}", np.asarray(code * scale, dtype=np.float32))
        for name, code in (("low", max(low, 0)), ("high", high))
    ]
    clip = ir.node("Clip", [source, *bounds], name=f"{quantize.name}/Clip")
    clip.outputs[0].name, clip.outputs[0].dtype = f"{clip.name}:out", ir.DataType.FLOAT
    graph.insert_before(quantize, clip)
    quantize.replace_input_with(0, clip.outputs[0])


def _picks_positions(conv: ir.Node) -> bool:
    """Whether a node is a convolution of single positions, not of all, of codes that nobody else reads."""
    if conv.op_type != "Conv":
        return False
    pads = conv.attributes.get_ints("pads", [])
    strides = conv.attributes.get_ints("strides", [])
    dequantize = producer(conv.inputs[0], "DequantizeLinear")
    return (
        set(kernel_shape(conv)) == {1}
        and max(strides, default=1) > 1
        and not any(pads)
        and dequantize is not None
        and only_consumer(dequantize.outputs[0]) is conv
        and dequantize.inputs[0] is not None
        and only_consumer(dequantize.inputs[0]) is dequantize
    )


def _pick_before(graph: ir.Graph, conv: ir.Node) -> None:
    """Let a MaxPool pick the positions that a 1x1 convolution with a stride reads."""
    strides = conv.attributes.get_ints("strides")
    ones = [1] * len(strides)
    pool = ir.node("MaxPool", [conv.inputs[0]], {"kernel_shape": ones, "strides": strides}, name=f"{conv.name}/pick")
    pool.outputs[0].name, pool.outputs[0].dtype = f"{pool.name}:out", ir.DataType.FLOAT
    graph.insert_before(conv, pool)
    conv.replace_input_with(0, pool.outputs[0])
    conv.attributes.add(ir.AttrInt64s("strides", ones))
