"""What TensorRT takes, checked before TensorRT sees it.

TensorRT rejects some graphs late and without naming the culprit, and computes others wrongly without a word: unsigned codes
are read as signed, and weights with several scales along the summed dimension are multiplied by the first one only when the
activations are quantized too (found in the programs that TensorRT-RTX 1.7.1 generates). All are refused here, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from ..._common.files import read_whole
from ...errors import EngineError
from ..canonical.graph import (
    batch_symbol,
    constant,
    external_location,
    is_stored,
    is_weight_only,
    parsed,
    producer,
    tensors,
    weight_dequantizers,
)
from ..file_record import PREFIX
from ..targets.tensorrt import ADVICE, CONVOLUTIONS, PRODUCTS, stored_weight, weight_problem
from .rtx_plan import Kind

_LARGEST_SIZE = 2**31 - 1
_CODES = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN}


Shape: TypeAlias = tuple[int | str | None, ...]
"""Sizes of an input; None for a dynamic batch, the name of any other dynamic dimension."""


@dataclass(frozen=True)
class WeightLayer:
    """A convolution or matrix product with stored weights: the node's name, and its kind."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class OnnxContents:
    """A file that TensorRT will take as it is meant.

    Attributes:
        data: the file.
        inputs: sizes of every input by name; None for a dynamic batch, the name of any other dynamic dimension.
        layers: convolutions and matrix products with stored weights, in execution order.
        float16: whether what is not quantized is stored in FP16.
        quantized: whether it holds any QuantizeLinear, or a linear layer whose weight alone is stored as integers.
        int4_weights: number of weights stored in 4 bits.
        metadata: what this package wrote of the file's history.
    """

    data: bytes
    inputs: dict[str, Shape]
    layers: tuple[WeightLayer, ...]
    float16: bool
    quantized: bool
    int4_weights: int
    metadata: dict[str, str]

    @property
    def dynamic(self) -> bool:
        return any(not isinstance(size, int) for shape in self.inputs.values() for size in shape)


def inspect_onnx(path: str | os.PathLike[str]) -> OnnxContents:
    """Read an ONNX file, and refuse what TensorRT cannot take or would misread.

    Args:
        path: of a canonical file, with its weights inside.

    Raises:
        EngineError: it is missing, damaged, or holds something that TensorRT must not be given; names the node.
    """
    data, model = _read(path)
    graph = model.graph
    batch = batch_symbol(graph)
    inputs = {value.name or "": _shape(value, batch) for value in graph.inputs if value.name not in graph.initializers}
    nodes = [*graph.all_nodes(), *(node for function in model.functions.values() for node in function)]
    for node in nodes:
        _check_node(node)
    weights = [constant(node.inputs[0]) for node in nodes if node.op_type == "DequantizeLinear"]
    return OnnxContents(
        data,
        inputs,
        tuple(_weight_layers(nodes)),
        any(value.dtype == ir.DataType.FLOAT16 for value in graph.initializers.values()),
        any(node.op_type == "QuantizeLinear" for node in nodes)
        or any(is_weight_only(node) for node in weight_dequantizers(graph)),
        sum(codes is not None and codes.dtype.name == "int4" for codes in weights),
        {key: text for key, text in model.metadata_props.items() if key.startswith(PREFIX)},
    )


def _read(file: str | os.PathLike[str]) -> tuple[bytes, ir.Model]:
    path = os.fspath(file)
    try:
        data = read_whole(path)
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}. Export it first with export_onnx(..., target='tensorrt')."
        ) from error
    try:
        proto = parsed(data)
        external = [tensor.name for tensor in tensors(proto) if external_location(tensor) is not None]
        if not external:
            onnx.checker.check_model(data)  # the bytes: a model would be written once more
            model = ir.serde.deserialize_model(proto)
    except Exception as error:  # protobuf, the checker and onnx-ir raise many kinds on foreign bytes; all mean the same here
        reason = " ".join(str(error).split())[:200]
        raise EngineError(f"{path} is not a valid ONNX file ({type(error).__name__}: {reason}). Export it again.") from error
    if external:
        raise EngineError(
            f"{path} keeps its weights in other files ({external[0]!r} and {len(external) - 1} more): an engine's manifest "
            "vouches for one file. Save it whole with onnx.save(onnx.load(path), path)."
        )
    if not model.graph.inputs or len(model.graph) == 0:
        raise EngineError(f"{path} is not a valid ONNX file: its graph has no input or no node. Export it again.")
    return data, model


def _shape(value: ir.Value, batch: str | None) -> Shape:
    if value.shape is None:
        raise EngineError(f"input {value.name!r} has no shape: export with a fixed image size.")
    sizes = tuple(_size(value.name, dimension, size, batch) for dimension, size in enumerate(value.shape))
    if any(isinstance(size, int) and not 0 < size <= _LARGEST_SIZE for size in sizes):
        raise EngineError(
            f"input {value.name!r} has the shape {list(value.shape)}: every size must lie between 1 and 2^31 - 1."
        )
    return sizes


def _size(name: str | None, dimension: int, size: int | ir.SymbolicDim, batch: str | None) -> int | str | None:
    if isinstance(size, int):
        return size
    if dimension == 0 and (batch is None or size.value in (None, batch)):
        return None
    if size.value is None:
        raise EngineError(
            f"input {name!r} has dynamic sizes beside the batch without a name: export with dynamic="
            f'{{"{name}": {{{dimension}: "length"}}}}, or with a fixed image size.'
        )
    return None if size.value == batch else size.value


def _numbers_problem(node: ir.Node) -> str | None:
    """What is wrong with the scale or the zero point of a quantizer or dequantizer."""
    scale = constant(node.inputs[1])
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None:
        return "its scale is computed by the graph; TensorRT takes constants."
    if not bool(np.all(np.isfinite(scale) & (scale > 0))):
        return f"its scale must be finite and positive, got {scale.min()}."
    if len(node.inputs) > 2 and node.inputs[2] is not None and zero_point is None:
        return "its zero point is computed by the graph; TensorRT takes 0 only."
    if zero_point is not None and bool(np.any(zero_point.astype(np.float32) != 0)):
        worst = zero_point.flatten()[np.argmax(np.abs(zero_point.astype(np.float32)))]
        return f"zero point {worst}; TensorRT takes 0 only."
    if scale.size > 1 and _on_activation(node):
        return "several scales for an activation; TensorRT takes one per tensor."
    return None


def _on_activation(node: ir.Node) -> bool:
    """Whether it works on an activation rather than a weight; a pair of both is judged at its QuantizeLinear."""
    paired = node.op_type == "DequantizeLinear" and producer(node.inputs[0], "QuantizeLinear") is not None
    return constant(node.inputs[0]) is None and not paired


def _quantized_type_problem(node: ir.Node) -> str | None:
    if len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].dtype is not None:
        return _type_problem(node.inputs[2].dtype)
    number = node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8
    if number not in set(ir.DataType):
        return f"codes of a type that ONNX does not have ({number})."
    return _type_problem(ir.DataType(number))


def _stored_type_problem(node: ir.Node) -> str | None:
    codes = constant(node.inputs[0])
    if codes is not None and codes.dtype == np.int32:
        return "a bias quantized to int32: TensorRT takes float biases."
    return None if node.inputs[0] is None or node.inputs[0].dtype is None else _type_problem(node.inputs[0].dtype)


def _type_problem(kind: ir.DataType) -> str | None:
    if kind in {ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.UINT16}:
        return f"unsigned codes ({kind.name}): TensorRT reads them as signed ones."
    return None if kind in _CODES else f"codes of type {kind.name}; TensorRT takes INT8, INT4 weights and FP8."


def _storage_problem(node: ir.Node) -> str | None:
    widened = constant(node.inputs[0]) is None and is_stored(node)
    return "weights stored in front of a Cast: TensorRT fails to build such a file." if widened else None


def _dynamic_range_problem(node: ir.Node) -> str | None:
    return "its range is measured at run time; TensorRT takes fixed scales."


_Problem = Callable[[ir.Node], str | None]

_CHECKS: dict[str, tuple[_Problem, ...]] = {
    "QuantizeLinear": (_numbers_problem, _quantized_type_problem),
    "DequantizeLinear": (_storage_problem, _numbers_problem, _stored_type_problem),
    "DynamicQuantizeLinear": (_dynamic_range_problem,),
}
"""What is looked for in quantizers of each kind, in this order."""


def _check_node(node: ir.Node) -> None:
    for find in _CHECKS.get(node.op_type, ()):
        problem = find(node)
        if problem is not None:
            raise EngineError(f"{node.name}: {problem} {ADVICE}")
    problem = weight_problem(node) if node.op_type in CONVOLUTIONS | PRODUCTS else None
    if problem is not None:
        raise EngineError(f"{node.name}: {problem}")


def _weight_layers(nodes: list[ir.Node]) -> Iterator[WeightLayer]:
    for node in nodes:
        if node.op_type in CONVOLUTIONS:
            yield WeightLayer(node.name or "", "convolution")
        elif node.op_type in PRODUCTS and (stored_weight(node.inputs[1]) or constant(node.inputs[1]) is not None):
            yield WeightLayer(node.name or "", "matmul")
