"""Canonical graph -> the form OpenVINO's CPU kernels are fastest with. Exact: the same codes, the same numbers.

Its integer kernels are made for unsigned activations. What cannot be negative gets unsigned codes, of which it fills the lower
half; the clamps in front become one, which also ends where the signed codes did:

    Conv -> [Relu | Clip(0, c)]* -> Q(s8, s) -> DQ
becomes
    Conv -> Clip(0, q_max * s) -> Q(u8, zero point 0, s) -> DQ

The runtime fuses that clamp into the convolution. Tensors of both signs stay as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from .graph import activation_quantizers, initializer, scalar
from .ort_form import absorbed_clamps, has_signed_codes, make_unsigned, non_negative_values
from .storage import WeightStorage, store_weights


def to_openvino_form(model: ir.Model, storage: WeightStorage = "int4") -> ir.Model:
    """A copy of a canonical model in OpenVINO's form, weights stored as :func:`.storage.store_weights` does."""
    model = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    graph = model.graph
    positive = non_negative_values(graph)
    for quantize in list(activation_quantizers(graph)):
        if quantize.inputs[0] in positive and has_signed_codes(quantize):
            _clamp_once(graph, quantize)
            make_unsigned(graph, quantize, 0)
    common.RemoveUnusedNodesPass()(model)  # the clamps that were merged
    store_weights(model, storage)
    return model


def _clamp_once(graph: ir.Graph, quantize: ir.Node) -> None:
    """One Clip for all clamps in front of a quantizer, and for the range of its codes."""
    scale = np.float32(scalar(quantize.inputs[1], 0.0))
    source, low, high = absorbed_clamps(quantize, scale)
    bounds = [
        initializer(graph, f"{quantize.name}/{name}", np.asarray(code * scale, dtype=np.float32))
        for name, code in (("low", max(low, 0)), ("high", high))
    ]
    clip = ir.node("Clip", [source, *bounds], name=f"{quantize.name}/Clip")
    clip.outputs[0].name, clip.outputs[0].dtype = f"{clip.name}:out", ir.DataType.FLOAT
    graph.insert_before(quantize, clip)
    quantize.replace_input_with(0, clip.outputs[0])
