"""Weights that alone are quantized, of linear layers and embeddings: fast in ONNX Runtime, and exact in any session.

The runtime does not fold DequantizeLinear of stored integers: it would dequantize the whole weight in every call, which takes
several times as long as a layer with a float weight. In front of a MatMul it may take both for MatMulNBits, but one that rounds
activations to 8 bits (accuracy level 4) unless the session says otherwise. So neither is left to it. Where codes are -8..7,

    Gemm(x, DequantizeLinear(codes, scale), bias)  or  MatMul(x, Transpose(DequantizeLinear(codes, scale)))
become
    MatMulNBits(x, packed codes, scales, bias), accuracy level 1: float32

and embeddings, which are Gather(DequantizeLinear(codes, scale), ids), become

    GatherBlockQuantized(packed codes, ids, scales)

In all other cases DequantizeLinear(codes, scale) becomes Mul(Cast(codes), scale), which is folded when the file is loaded: the
speed is that of a float weight, the file as small. (MatMulNBits takes codes of 8 and of 2 bits as well, but multiplies by them
in float32 ten times slower than by a float weight.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    is_table,
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
"""Columns that share a scale, which the runtime takes. Fewer scales are a smaller file, and no slower."""


class WeightOnlyLayers(InPlacePass):
    """Rewrite layers whose weights alone are quantized. Exact."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        layers = [node for node in weight_dequantizers(graph) if is_weight_only(node)]
        tables = [node for node in weight_dequantizers(graph) if is_table(node)]
        for dequantize in layers:
            readers = list(_readers(dequantize))
            packed = _packed(graph, dequantize) if all(map(_is_linear, readers)) else None
            if packed is None:
                _fold(graph, dequantize)
                continue
            for node, _ in readers:
                _take_over(node, _product(graph, node, packed), dequantize)
        for dequantize in tables:  # after layers, whose codes they may share
            packed = _packed(graph, dequantize)
            if packed is None or packed.is_filled:
                _fold(graph, dequantize)
                continue
            rows = _rows(graph, dequantize, packed)
            for use in list(dequantize.outputs[0].uses()):
                _take_over(use.node, _lookup(use.node, rows, packed), dequantize)
        common.RemoveUnusedNodesPass()(model)  # dequantizers, transposes, and codes that were packed
        if any(node.domain == DOMAIN for node in graph):
            model.opset_imports[DOMAIN] = 1
        return PassResult(model, modified=bool(layers or tables))


def weight_only_codes(graph: ir.Graph) -> Iterator[tuple[ir.Node, Codes, Scales]]:
    """What :class:`WeightOnlyLayers` wrote: nodes, with the codes that they compute with and the scale of each of these."""
    for node in graph:
        if node.domain == DOMAIN and node.op_type in {"MatMulNBits", "GatherBlockQuantized"}:
            stored = node.inputs[1 if node.op_type == "MatMulNBits" else 0]
            reshape = producer(stored, "Reshape")
            packed, scales = constant(stored if reshape is None else reshape.inputs[0]), constant(node.inputs[2])
            assert packed is not None
            assert scales is not None
            codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int8) - np.int8(8)
            columns = node.attributes.get_int("K", codes.shape[1])
            yield node, codes[:, :columns], np.repeat(scales, node.attributes.get_int("block_size", 0), axis=1)[:, :columns]
        elif node.op_type == "Mul" and WEIGHT_KEY in node.metadata_props:
            blocks, factors = producer(node.inputs[0], "Reshape"), constant(node.inputs[1])
            widened = producer(node.inputs[0] if blocks is None else blocks.inputs[0], "Cast")
            whole = None if widened is None else constant(widened.inputs[0])
            shape = None if blocks is None else constant(blocks.inputs[1])
            assert whole is not None
            assert factors is not None
            yield node, whole, np.broadcast_to(factors, whole.shape if shape is None else shape).reshape(whole.shape)


@dataclass(frozen=True)
class _Packed:
    """A weight (N, K) as the runtime takes it: two codes, plus 8 each, in a byte, the first one in the lower half.

    Attributes:
        codes: uint8 (N, blocks, block / 2); columns that fill the last block are 0.
        scales: float32 (N, blocks).
        columns: K.
        block: columns that share a scale.
        name: of the initializer.
    """

    codes: npt.NDArray[np.uint8]
    scales: ir.Value
    columns: int
    block: int
    name: str

    @property
    def is_filled(self) -> bool:
        """Whether the last block has more columns than the weight."""
        return self.columns < int(self.codes.shape[1]) * self.block


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
    bias = constant(_bias(node))
    return (
        numbers == (1, 1)
        and flags == (0, int(not transposed))
        and (_bias(node) is None or (bias is not None and bias.ndim == 1))
    )


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _packed(graph: ir.Graph, dequantize: ir.Node) -> _Packed | None:
    """None where codes do not fit, or blocks are others than the runtime takes."""
    codes, scale, value = stored_codes(dequantize), constant(dequantize.inputs[1]), dequantize.inputs[0]
    assert scale is not None
    assert value is not None
    assert dequantize.inputs[1] is not None
    axis, block = dequantize.attributes.get_int("axis", 1), dequantize.attributes.get_int("block_size", 0)
    along_columns = axis == 1 if scale.ndim == 2 else axis == 0 or scale.ndim == 0
    if codes.ndim != 2 or not _fits_int4(codes) or not along_columns:
        return None
    rows, columns = codes.shape
    is_whole = scale.ndim < 2 or block >= columns  # one scale for a row
    shared = columns if is_whole else block
    size = next((size for size in _BLOCKS if shared % size == 0), 32 if is_whole else 0)
    if size == 0:
        return None
    blocks = -(-columns // size)
    given = np.broadcast_to(scale.reshape(-1, 1), (rows, 1)) if scale.ndim < 2 else scale
    scales = np.repeat(given, blocks if is_whole else block // size, axis=1)[:, :blocks]
    filled = np.pad(codes.astype(np.int16) + 8, ((0, 0), (0, blocks * size - columns)), constant_values=8)
    pairs = filled.astype(np.uint8).reshape(rows, blocks, size // 2, 2)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8, copy=False)
    name = f"{dequantize.inputs[1].name}.blocks{size}"
    held = initializer(graph, name, np.ascontiguousarray(scales, dtype=np.float32))
    return _Packed(packed, held, columns, size, f"{value.name}.packed{size}")


def _fits_int4(codes: Codes) -> bool:
    return bool(codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7)


def _product(graph: ir.Graph, node: ir.Node, packed: _Packed) -> ir.Node:
    bias = _bias(node)
    attributes = {
        "K": packed.columns,
        "N": packed.codes.shape[0],
        "bits": 4,
        "block_size": packed.block,
        "accuracy_level": _EXACT,
    }
    inputs = [node.inputs[0], initializer(graph, packed.name, packed.codes), packed.scales]
    return ir.node("MatMulNBits", inputs if bias is None else [*inputs, None, None, bias], attributes, domain=DOMAIN)


def _rows(graph: ir.Graph, dequantize: ir.Node, packed: _Packed) -> ir.Value:
    """The rows of an embedding; where a linear layer shares its weight, those that this one stores."""
    rows = packed.codes.reshape(len(packed.codes), -1)
    if packed.name not in graph.initializers:
        return initializer(graph, packed.name, rows)
    stored, sizes = (
        initializer(graph, packed.name, packed.codes),
        initializer(graph, f"{packed.name}.rows", np.asarray(rows.shape)),
    )
    return chain(dequantize, stored, [ir.node("Reshape", [None, sizes])], f"{packed.name}/rows")


def _lookup(node: ir.Node, data: ir.Value, packed: _Packed) -> ir.Node:
    attributes = {"bits": 4, "block_size": packed.block, "gather_axis": 0, "quantize_axis": 1}
    return ir.node("GatherBlockQuantized", [data, node.inputs[1], packed.scales], attributes, domain=DOMAIN)


def _take_over(node: ir.Node, new: ir.Node, dequantize: ir.Node) -> None:
    """Put a node in the place of a layer."""
    graph, old, made = node.graph, node.outputs[0], new.outputs[0]
    assert graph is not None
    new.name = (node.name or "").replace(node.op_type, new.op_type)
    new.metadata_props[WEIGHT_KEY] = dequantize.metadata_props.get(WEIGHT_KEY, "")
    made.type, made.shape = old.type, old.shape
    made.name, old.name = old.name, f"{new.name}:replaced"
    graph.insert_before(node, new)
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
    kept = codes.astype(ml_dtypes.int4 if _fits_int4(codes) else np.int8)
    multiply = ir.node("Mul", [None, initializer(graph, f"{dequantize.name}/scale", scale)])
    multiply.metadata_props[WEIGHT_KEY] = dequantize.metadata_props.get(WEIGHT_KEY, "")
    steps = [cast(ir.DataType.FLOAT), multiply]
    if shape != codes.shape:
        sizes = [initializer(graph, f"{dequantize.name}/shape", np.asarray(one)) for one in (shape, codes.shape)]
        there, back = (ir.node("Reshape", [None, one]) for one in sizes)
        steps = [steps[0], there, multiply, back]
    stored = dequantize.inputs[0]
    assert stored is not None
    replace(dequantize, chain(dequantize, initializer(graph, f"{stored.name}", kept), steps, f"{dequantize.name}/"))
