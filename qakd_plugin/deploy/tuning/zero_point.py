"""The same weights with a zero point of -1: which convolutions can have it, and a file in which they do."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ..canonical.graph import cast, chain, constant, copied, dequantizer_before, initializer, is_stored, producer, stored_codes


def eligible_layers(model: ir.Model) -> tuple[str, ...]:
    """Names of the convolutions whose weights can get a zero point of -1: ungrouped, unsigned inputs, no code -128."""
    return tuple(node.name or "" for node in model.graph if node.name and node.op_type == "Conv" and _is_eligible(node))


def with_weight_zero_point(model: ir.Model, layers: Iterable[str]) -> ir.Model:
    """A copy in which weights of some convolutions have zero point -1 and codes lowered by one, which is done at load."""
    model = copied(model)
    graph, wanted, done = model.graph, set(layers), set()
    for conv in [node for node in graph if node.name in wanted]:
        dequantize = producer(conv.inputs[1], "DequantizeLinear")
        assert dequantize is not None
        if dequantize in done:
            continue
        done.add(dequantize)
        scale, value = constant(dequantize.inputs[1]), dequantize.inputs[0]
        assert scale is not None
        assert value is not None
        lower = initializer(graph, "code_minus_one", np.asarray(-1, dtype=np.int32))
        steps = (cast(ir.DataType.INT32), ir.node("Add", [None, lower]), cast(ir.DataType.INT8))
        value = chain(dequantize, value, steps, f"{dequantize.name}/tuned")
        dequantize.resize_inputs(3)
        dequantize.replace_input_with(0, value)
        name = f"{dequantize.name}/tuned.zero_point"  # of its own, as in targets.onnxruntime
        dequantize.replace_input_with(2, initializer(graph, name, np.full(scale.shape, -1, dtype=np.int8)))
    return model


def _is_eligible(conv: ir.Node) -> bool:
    if conv.attributes.get_int("group", 1) != 1:
        return False
    weight, before = producer(conv.inputs[1], "DequantizeLinear"), dequantizer_before(conv.inputs[0])
    if weight is None or not is_stored(weight) or before is None or len(before.inputs) < 3 or len(weight.inputs) < 3:
        return False
    unsigned, zero, scale = constant(before.inputs[2]), constant(weight.inputs[2]), constant(weight.inputs[1])
    if unsigned is None or unsigned.dtype != np.uint8 or zero is None or zero.dtype != np.int8 or zero.any() or scale is None:
        return False
    all_convolutions = all(use.node.op_type == "Conv" for use in weight.outputs[0].uses())
    return all_convolutions and int(stored_codes(weight).min(initial=0)) > -128
