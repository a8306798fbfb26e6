"""Small questions asked of an onnx-ir graph by several passes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from ..._common.files import read_whole
from ...errors import ExportError, QakdError

_TORCHS = re.compile(r"s\d+")
_LARGEST_SIZE = 2**31 - 1

DOMAIN = "qakd"
"""Domain of the operators that carry quantizers through the exporter."""

QUANTIZER_KEY = "qakd.quantizer"
"""Node metadata: the calls of quantizers of the trained model that this node carries out, see :mod:`.labels`."""

WEIGHT_KEY = "qakd.weight"
"""Node metadata of a weight's DequantizeLinear: the dotted name of its layer in the trained model."""

COARSE_KEY = "qakd.coarse"
"""Node metadata of a weight's DequantizeLinear: "channel:bits, ..." where codes lost their lowest bits, see
:mod:`qakd_plugin.deploy.targets.onnxruntime_bias`."""


def parsed(data: bytes) -> onnx.ModelProto:
    """A file's bytes as a model that can be handed to a runtime: some of them never return from what this looks for.

    Raises:
        ValueError: it is for an opset that ``onnx`` does not know, the sizes of an input are absurd, or a stored tensor has
            another length than its shape says.
        Exception: protobuf and onnx-ir raise many more kinds on foreign bytes.
    """
    proto = onnx.ModelProto.FromString(data)
    newest = onnx.defs.onnx_opset_version()
    for imported in proto.opset_import:
        standard = imported.domain in ("", "ai.onnx")
        if not 0 < imported.version <= (newest if standard else _LARGEST_SIZE):
            known = f"onnx {onnx.__version__} knows 1 to {newest}" if standard else f"of {imported.domain!r}"
            raise ValueError(f"it is for opset {imported.version}; {known}")
    for value in proto.graph.input:
        sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        if min(sizes, default=0) < 0 or math.prod(max(size, 1) for size in sizes) > _LARGEST_SIZE:
            raise ValueError(f"its input {value.name!r} has the sizes {sizes}; all together may be 2^31 - 1")
    for tensor in tensors(proto):
        if external_location(tensor) is None:
            ir.serde.deserialize_tensor(tensor).numpy()
    return proto


def read_onnx(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file, and into it the weights that it keeps in other files of its folder.

    Raises:
        ExportError: it, or a file with its weights, is missing, or it is no valid ONNX.
    """
    try:
        proto = parsed(read_whole(path))
        require_weights(path, proto)
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, Path(path).absolute().parent)
        ir.external_data.load_to_model(model)
    except ExportError:
        raise
    except OSError as error:
        missing = "" if error.filename in (None, str(path)) else f" {error.filename}:"
        raise ExportError(f"{path} cannot be read:{missing} {error.strerror}. Check the path.") from error
    except Exception as error:  # protobuf and onnx-ir raise many kinds on foreign bytes; all mean the same here
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path} is not a valid ONNX file ({type(error).__name__}: {reason}). Export it again.") from error
    if len(model.graph) == 0:
        raise ExportError(f"{path} is not a valid ONNX file: its graph has no node. Export it again.")
    return model


def require_weights(path: str | os.PathLike[str], proto: onnx.ModelProto) -> None:
    """Look at where a model keeps its weights: runtimes read what they find there, and wait where it is a pipe.

    Raises:
        ExportError: it is outside of the file's folder, or no file.
    """
    folder = Path(path).absolute().parent.resolve()
    for location in {location for tensor in tensors(proto) if (location := external_location(tensor)) is not None}:
        found = (folder / location).resolve()
        if not found.is_relative_to(folder):
            raise ExportError(
                f"{path} keeps weights in {location[:200]!r}, which leads outside the base directory, the folder of the "
                "file: it is not read. Put both into one folder, or save the file whole."
            )
        if found.exists() and not found.is_file():
            raise ExportError(f"{path} keeps weights in {location[:200]!r}, which is no file. Export it again.")


@contextmanager
def understood(path: str | os.PathLike[str], done: str) -> Iterator[None]:
    """Within the block a graph is reasoned about, which may be any: also one of a damaged file that runtimes take.

    Args:
        path: of the file, for the message.
        done: what is not done then: "diagnosed", "tuned".

    Raises:
        ExportError: it is nothing that can be reasoned about.
    """
    try:
        yield
    except QakdError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{path} cannot be {done} ({type(error).__name__}: {reason}). It is damaged if ONNX Runtime does not load it "
            "either: export it again."
        ) from error


def tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, also those in attributes, subgraphs, functions and sparse tensors."""
    for field, found in message.ListFields():
        if field.message_type is None:
            continue
        for part in [found] if isinstance(found, Message) else found:
            if isinstance(part, onnx.TensorProto):
                yield part
            else:
                yield from tensors(part)


def external_location(tensor: onnx.TensorProto) -> str | None:
    """The file that a tensor's data is kept in, relative to the folder of the model; None where it is in the model."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return next((str(entry.value) for entry in tensor.external_data if entry.key == "location"), "")


def copied(model: ir.Model) -> ir.Model:
    """A copy that shares nothing with the model.

    ``Model.clone`` leaves both with the same type objects, which setting a value's dtype changes, and wants sorted nodes.
    """
    return ir.serde.deserialize_model(ir.serde.serialize_model(model))


def dynamic_sizes(graph: ir.Graph) -> list[dict[int, str]]:
    """Names of the dynamic dimensions of each input."""
    return [
        {
            dimension: size.value or f"{value.name}.{dimension}"
            for dimension, size in enumerate(value.shape or ())
            if isinstance(size, ir.SymbolicDim)
        }
        for value in graph.inputs
        if value.name not in graph.initializers
    ]


def batch_symbol(graph: ir.Graph) -> str | None:
    """The name of the batch: "batch", or torch's own for the only dynamic dimension of a file; None where it is not dynamic."""
    firsts = [of[0] for of in dynamic_sizes(graph) if 0 in of]
    return "batch" if "batch" in firsts else next((name for name in firsts if _TORCHS.fullmatch(name)), None)


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of an initializer or Constant node, or None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def scalar(value: ir.Value | None, default: float) -> float:
    """The number of a constant scalar input, ``default`` where the input is absent or not constant."""
    array = constant(value)
    return default if array is None else float(array.reshape(()))


def identity(value: ir.Value | None) -> object:
    """Constants are the same when their numbers are, other values when they are one."""
    array = constant(value)
    return value if array is None else _bits(array)


def _bits(array: npt.NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer ``name``, registered on first use; ``name#1`` and so on where others have that name already."""
    unique, count = name, 0
    while (known := graph.initializers.get(unique)) is not None:
        if identity(known) == _bits(array):
            return known
        count += 1
        unique = f"{name}#{count}"
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def cast(kind: ir.DataType) -> ir.Node:
    """A Cast whose input :func:`chain` fills in."""
    return ir.node("Cast", [None], {"to": kind.value})


def chain(before: ir.Node, value: ir.Value, steps: Sequence[ir.Node], name: str) -> ir.Value:
    """Insert operators on integers in front of ``before``, each reading first what the last one made; returns the result."""
    graph = before.graph
    assert graph is not None
    for index, node in enumerate(steps):
        node.replace_input_with(0, value)
        node.name = f"{name}{index}"
        result = node.outputs[0]
        result.name = f"{node.name}:out"
        to = node.attributes.get_int("to", 0)
        if to:
            result.dtype = ir.DataType(to)
        elif value.dtype is not None:
            result.dtype = value.dtype
        value = result
        graph.insert_before(before, node)
    return value


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The single node that reads ``value``, if there is exactly one and it is no graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value``, if it is one of ``op_types``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def activation_quantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every QuantizeLinear, in execution order."""
    return (node for node in graph if node.op_type == "QuantizeLinear")


def weight_dequantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every DequantizeLinear of stored integers, in execution order."""
    return (node for node in graph if node.op_type == "DequantizeLinear" and is_stored(node))


def is_stored(dequantize: ir.Node) -> bool:
    """Whether a DequantizeLinear reads stored integers, straight or through what
    :mod:`qakd_plugin.deploy.targets.weight_packing` puts between."""
    value = dequantize.inputs[0]
    while (node := producer(value, *_STORAGE)) is not None:
        value = node.inputs[0]
    return value is not None and (value.const_value is not None or producer(value, "Constant") is not None)


def stored_codes(dequantize: ir.Node) -> npt.NDArray[Any]:
    """The integers that a DequantizeLinear of stored integers reads, as the runtime will see them."""
    return _evaluate(dequantize.inputs[0])


def kernel_shape(conv: ir.Node) -> list[int]:
    """Of a convolution: its attribute, which exporters may leave out, or else its weight's spatial dimensions."""
    if "kernel_shape" in conv.attributes:
        return list(conv.attributes.get_ints("kernel_shape"))
    weight = conv.inputs[1]
    dequantize = producer(weight, "DequantizeLinear")
    stored = constant(weight) if dequantize is None else stored_codes(dequantize)
    assert stored is not None
    return list(stored.shape[2:])


_STORAGE = ("Cast", "Mul", "Add")


def _evaluate(value: ir.Value | None) -> npt.NDArray[Any]:
    node = producer(value, *_STORAGE)
    if node is None:
        array = constant(value)
        assert array is not None
        return array
    operands = [_evaluate(operand) for operand in node.inputs]
    if node.op_type == "Cast":
        return operands[0].astype(ir.DataType(node.attributes.get_int("to", 0)).numpy())
    return np.asarray((np.multiply if node.op_type == "Mul" else np.add)(*operands))


def dequantizer_before(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that an activation comes straight from, if it comes from a quantizer; of a concatenation, whose
    parts all have to, the first part's."""
    node = producer(value, "DequantizeLinear", "Concat", *_NEW_PLACES)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return None if is_stored(node) else node
    found = [dequantizer_before(source) for source in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    return None if None in found else found[0]


_NEW_PLACES = ("Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""What gives the numbers of one tensor new places: codes pass through it."""


def is_quantized(value: ir.Value | None) -> bool:
    """Whether an activation comes straight from a quantizer."""
    return dequantizer_before(value) is not None


def weight_readers(dequantize: ir.Node) -> list[ir.Node]:
    """The layers that read stored integers, directly or through a transpose."""
    readers: list[ir.Node] = []
    for use in dequantize.outputs[0].uses():
        readers += [inner.node for inner in use.node.outputs[0].uses()] if use.node.op_type == "Transpose" else [use.node]
    return readers


def is_linear_weight(dequantize: ir.Node) -> bool:
    """Whether stored integers are the weight of linear layers alone."""
    readers = weight_readers(dequantize)
    return bool(readers) and all(node.op_type in {"Gemm", "MatMul"} for node in readers)


def is_weight_only(dequantize: ir.Node) -> bool:
    """Whether stored integers are the weight of linear layers alone whose activations stay in floating point."""
    return is_linear_weight(dequantize) and not any(is_quantized(node.inputs[0]) for node in weight_readers(dequantize))


def is_table(dequantize: ir.Node) -> bool:
    """Whether stored integers are the weight of embeddings alone: rows that are looked up."""
    uses = list(dequantize.outputs[0].uses())
    return bool(uses) and all(
        use.node.op_type == "Gather" and use.idx == 0 and use.node.attributes.get_int("axis", 0) == 0 for use in uses
    )


def is_quantized_alone(dequantize: ir.Node) -> bool:
    """Whether stored integers are a weight beside which nothing is quantized: of linear layers, or of embeddings."""
    return is_weight_only(dequantize) or is_table(dequantize)


def replace(old: ir.Node, new: ir.Value) -> None:
    """Let every reader of ``old``'s output read ``new``, and remove ``old``."""
    output, graph = old.outputs[0], old.graph
    assert graph is not None
    ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
    graph.remove(old, safe=True)
