"""Weights of linear layers whose activations stay in floating point: fast in ONNX Runtime, and exact in any session.

The runtime does not fold DequantizeLinear of stored integers: in front of a Gemm it would dequantize the weight in every call,
which is several times slower than a float weight. In front of a MatMul it may take both for MatMulNBits, but one that rounds
activations to 8 bits (accuracy level 4) unless the session says otherwise. So neither is left to it:

    Gemm(x, DequantizeLinear(codes, scale), bias)  or  MatMul(x, Transpose(DequantizeLinear(codes, scale)))
become, where codes are -8..7,
    MatMulNBits(x, packed codes, scales, bias), accuracy level 1: float32
and otherwise
    Gemm(x, Mul(Cast(codes), scale), bias)  or  MatMul(x, Transpose(Mul(Cast(codes), scale)))

whose weight is folded when the file is loaded: the speed is that of a float layer, the file as small. (MatMulNBits takes codes
of 8 bits as well, but computes them in float32 ten times slower than a float layer, those of 2 bits likewise.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ..canonical.graph import (
    WEIGHT_KEY,
    cast,
    chain,
    constant,
    initializer,
    is_weight_only,
    producer,
    replace,
    stored_codes,
    weight_dequantizers,
)

Codes = npt.NDArray[Any]
Scales = npt.NDArray[np.float32]

DOMAIN = "com.microsoft"
_EXACT = 1
"""Accuracy level of MatMulNBits: activations in float32."""

_BLOCKS = (256, 128, 64, 32, 16)
"""Columns that share a scale, which MatMulNBits takes. Fewer scales are a smaller file, and no slower."""


class WeightOnlyLayers(InPlacePass):
    """Rewrite what reads the weights of linear layers whose activations are in floating point. Exact."""

    def call(self, model: ir.Model) -> PassResult:
        chosen = [node for node in weight_dequantizers(model.graph) if is_weight_only(node)]
        for dequantize in chosen:
            readers = list(_readers(dequantize))
            packed = _packed(model.graph, dequantize) if readers and all(map(_is_linear, readers)) else None
            if packed is None:
                _fold(model.graph, dequantize)
                continue
            model.opset_imports[DOMAIN] = 1
            for reader in readers:
                _multiply_packed(model.graph, reader, dequantize, *packed)
        common.RemoveUnusedNodesPass()(model)  # dequantizers, transposes, and codes that were packed
        return PassResult(model, modified=bool(chosen))


def weight_only_codes(graph: ir.Graph) -> Iterator[tuple[ir.Node, Codes, Scales]]:
    """What :class:`WeightOnlyLayers` wrote: nodes, with the codes that they compute with and the scale of each of these."""
    for node in graph:
        if node.op_type == "MatMulNBits" and node.domain == DOMAIN:
            packed, scales = constant(node.inputs[1]), constant(node.inputs[2])
            assert packed is not None
            assert scales is not None
            columns, block = node.attributes.get_int("K", 0), node.attributes.get_int("block_size", 0)
            codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int8) - np.int8(8)
            yield node, codes[:, :columns], np.repeat(scales, block, axis=1)[:, :columns]
        elif node.op_type == "Mul" and WEIGHT_KEY in node.metadata_props:
            blocks, scales = producer(node.inputs[0], "Reshape"), constant(node.inputs[1])
            widened = producer(node.inputs[0] if blocks is None else blocks.inputs[0], "Cast")
            codes = None if widened is None else constant(widened.inputs[0])
            shape = None if blocks is None else constant(blocks.inputs[1])
            assert codes is not None
            assert scales is not None
            yield node, codes, np.broadcast_to(scales, codes.shape if shape is None else shape).reshape(codes.shape)


def _readers(dequantize: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read a weight, also through a transpose, and at which input."""
    for use in dequantize.outputs[0].uses():
        if use.node.op_type == "Transpose" and not use.node.outputs[0].is_graph_output():
            yield from ((inner.node, inner.idx) for inner in use.node.outputs[0].uses())
        else:
            yield use.node, use.idx


def _is_linear(reader: tuple[ir.Node, int]) -> bool:
    """Whether a node multiplies by the transpose of a stored weight (N, K), as ``nn.Linear`` does, and adds a bias (N,)."""
    node, index = reader
    if index != 1:
        return False
    transposed = producer(node.inputs[1], "Transpose") is not None
    if node.op_type == "MatMul":
        return transposed
    numbers = (node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0))
    flags = (node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0))
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    plain_bias = len(node.inputs) < 3 or node.inputs[2] is None or (bias is not None and bias.ndim == 1)
    return node.op_type == "Gemm" and numbers == (1, 1) and flags == (0, int(not transposed)) and plain_bias


def _packed(graph: ir.Graph, dequantize: ir.Node) -> tuple[ir.Value, ir.Value, int, int] | None:
    """Codes and scales as MatMulNBits has them, the columns of a row, and of a block; None where it does not take them."""
    codes, scale, name = stored_codes(dequantize), constant(dequantize.inputs[1]), dequantize.name
    assert scale is not None
    if codes.ndim != 2 or codes.min(initial=0) < -8 or codes.max(initial=0) > 7:
        return None
    rows, columns = codes.shape
    axis, block = dequantize.attributes.get_int("axis", 1), dequantize.attributes.get_int("block_size", 0)
    if (scale.ndim == 1 and axis != 0) or (scale.ndim == 2 and axis != 1):
        return None
    span = block if scale.ndim == 2 and block < columns else columns  # columns that share a scale
    whole = span == columns
    size = next((size for size in _BLOCKS if span % size == 0), 32 if whole else None)
    if size is None:
        return None
    blocks = -(-columns // size)
    each = np.broadcast_to(scale.reshape(-1, 1) if scale.ndim < 2 else scale, (rows, 1 if whole else scale.shape[1]))
    scales = np.repeat(each, blocks if whole else span // size, axis=1)[:, :blocks]
    filled = np.pad(codes.astype(np.int8), ((0, 0), (0, blocks * size - columns)))
    shifted = (filled.astype(np.int16) + 8).astype(np.uint8).reshape(rows, blocks, size // 2, 2)
    packed = shifted[..., 0] | shifted[..., 1] << 4
    return (
        initializer(graph, f"{name}/packed", packed),
        initializer(graph, f"{name}/scales", np.ascontiguousarray(scales, dtype=np.float32)),
        columns,
        size,
    )


def _multiply_packed(
    graph: ir.Graph,
    reader: tuple[ir.Node, int],
    dequantize: ir.Node,
    packed: ir.Value,
    scales: ir.Value,
    columns: int,
    block: int,
) -> None:
    """Put MatMulNBits in the place of one layer."""
    node, _ = reader
    assert packed.shape is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    attributes = {
        "K": columns,
        "N": int(packed.shape[0]),
        "bits": 4,
        "block_size": block,
        "accuracy_level": _EXACT,
    }
    inputs = [node.inputs[0], packed, scales] + ([] if bias is None else [None, None, bias])
    product = ir.node(
        "MatMulNBits", inputs, attributes, domain=DOMAIN, name=(node.name or "").replace(node.op_type, "MatMulNBits")
    )
    product.metadata_props[WEIGHT_KEY] = dequantize.metadata_props.get(WEIGHT_KEY, "")
    old, made = node.outputs[0], product.outputs[0]
    made.type, made.shape = old.type, old.shape
    made.name, old.name = old.name, f"{product.name}:replaced"
    graph.insert_before(node, product)
    replace(node, made)


def _fold(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Dequantize a weight by operators that the runtime folds when it loads the file."""
    codes, scale = stored_codes(dequantize), constant(dequantize.inputs[1])
    assert scale is not None
    axis, block = dequantize.attributes.get_int("axis", 1), dequantize.attributes.get_int("block_size", 0)
    shape = codes.shape
    if scale.ndim == 1:
        scale = scale.reshape([-1 if dim == axis % codes.ndim else 1 for dim in range(codes.ndim)])
    elif scale.ndim > 1 and shape[axis] == scale.shape[axis] * block:
        scale, shape = np.expand_dims(scale, axis + 1), (*shape[:axis], scale.shape[axis], block, *shape[axis + 1 :])
    elif scale.ndim > 1:
        scale = np.repeat(scale, block, axis=axis).take(range(shape[axis]), axis=axis)
    fits = codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7
    value = initializer(graph, f"{dequantize.name}/codes", codes.astype(ml_dtypes.int4 if fits else np.int8))
    multiply = ir.node("Mul", [None, initializer(graph, f"{dequantize.name}/scale", scale)])
    multiply.metadata_props[WEIGHT_KEY] = dequantize.metadata_props.get(WEIGHT_KEY, "")
    steps = [cast(ir.DataType.FLOAT), multiply]
    if shape != codes.shape:
        there, back = (
            ir.node("Reshape", [None, initializer(graph, f"{dequantize.name}/shape", np.asarray(sizes))])
            for sizes in (shape, codes.shape)
        )
        steps = [steps[0], there, multiply, back]
    replace(dequantize, chain(dequantize, value, steps, f"{dequantize.name}/"))
