"""What TensorRT takes, checked before TensorRT sees it.

TensorRT rejects some graphs late and without naming the culprit, and computes others wrongly without a word: unsigned codes
are read as signed, and weights with several scales along the summed dimension are multiplied by the first one only when the
activations are quantized too (found in the programs that TensorRT-RTX 1.7.1 generates). All are refused here, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from ...errors import EngineError
from ..canonical.graph import constant, is_stored, is_weight_only, producer, weight_dequantizers
from ..targets.tensorrt import ADVICE, CONVOLUTIONS, PRODUCTS, stored_weight, weight_problem
from .rtx_plan import Kind

_LARGEST_SIZE = 2**31 - 1
_CODES = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN}


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
        inputs: sizes of every input by name; None for a dynamic batch.
        layers: convolutions and matrix products with stored weights, in execution order.
        float16: whether what is not quantized is stored in FP16.
        quantized: whether it holds any QuantizeLinear, or a linear layer whose weight alone is stored as integers.
        int4_weights: number of weights stored in 4 bits.
    """

    data: bytes
    inputs: dict[str, tuple[int | None, ...]]
    layers: tuple[WeightLayer, ...]
    float16: bool
    quantized: bool
    int4_weights: int

    @property
    def dynamic_batch(self) -> bool:
        return any(None in shape for shape in self.inputs.values())

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Sizes of every input by name, with ``batch`` in the place of a dynamic one."""
        return {name: tuple(batch if size is None else size for size in shape) for name, shape in self.inputs.items()}


def inspect_onnx(path: str | os.PathLike[str]) -> OnnxContents:
    """Read an ONNX file, and refuse what TensorRT cannot take or would misread.

    Args:
        path: of a canonical file, with its weights inside.

    Raises:
        EngineError: it is missing, damaged, or holds something that TensorRT must not be given; names the node.
    """
    data, model = _read(path)
    graph = model.graph
    inputs = {value.name or "": _sizes(value) for value in graph.inputs if value.name not in graph.initializers}
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
    )


def _read(path: str | os.PathLike[str]) -> tuple[bytes, ir.Model]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}. Export it first with export_onnx(..., target='tensorrt')."
        ) from error
    try:
        proto = onnx.ModelProto.FromString(data)
        tensors = list(_tensors(proto))
        external = [tensor.name for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
        if not external:
            onnx.checker.check_model(data)  # the bytes: a model would be written once more
            model = ir.serde.deserialize_model(proto)
            for tensor in tensors:  # each has as much data as its shape says, or this raises; the checker does not look
                ir.serde.deserialize_tensor(tensor).numpy()
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


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, also those in attributes, subgraphs, functions and sparse tensors."""
    for field, found in message.ListFields():
        if field.message_type is None:
            continue
        for part in [found] if isinstance(found, Message) else found:
            if isinstance(part, onnx.TensorProto):
                yield part
            else:
                yield from _tensors(part)


def _sizes(value: ir.Value) -> tuple[int | None, ...]:
    if value.shape is None:
        raise EngineError(f"input {value.name!r} has no shape: export with a fixed image size.")
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
    if None in sizes[1:]:
        raise EngineError(
            f"input {value.name!r} has dynamic sizes beside the batch, {list(value.shape)}: export with a fixed image size."
        )
    if any(size is not None and not 0 < size <= _LARGEST_SIZE for size in sizes):
        raise EngineError(
            f"input {value.name!r} has the shape {list(value.shape)}: every size must lie between 1 and 2^31 - 1."
        )
    return sizes


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
    return "weights stored behind a Cast: TensorRT fails to build such a file." if widened else None


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
