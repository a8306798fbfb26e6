"""What a file says of itself: the input it takes, and what is quantized in it. ONNX, engines, and OpenVINO's own format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from .._common.files import read_whole
from ..deploy.canonical.graph import WEIGHT_KEY, parsed, require_weights
from ..deploy.engine.manifest import read_manifest
from ..deploy.file_record import FileRecord, read_record
from ..errors import EngineError, QakdError
from .census import engine_layers

_NARROW = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
"""By name, since older versions of onnx do not know all of them."""


@dataclass(frozen=True)
class BatchLimits:
    """Smallest and largest batch; ``largest`` is None without a limit."""

    smallest: int
    largest: int | None

    def takes(self, batch: int) -> bool:
        """Whether a batch fits."""
        return batch >= self.smallest and (self.largest is None or batch <= self.largest)

    def nearest(self, batch: int) -> int:
        """The allowed size next to one that is wanted."""
        return max(self.smallest, batch if self.largest is None else min(batch, self.largest))

    def __str__(self) -> str:
        if self.largest is None:
            return f"{self.smallest} or more"
        return str(self.smallest) if self.smallest == self.largest else f"{self.smallest} to {self.largest}"


def input_sizes(path: Path) -> list[int | None]:
    """Sizes of the first input; None where the file leaves them open.

    Raises:
        QakdError: the file is damaged, or has no input.
    """
    if path.suffix == ".engine":
        inputs = read_manifest(path).get("inputs")
        if not isinstance(inputs, dict) or not inputs or not all(isinstance(sizes, list) for sizes in inputs.values()):
            raise EngineError(f"{path}: its manifest names no input. Build the engine again.")
        return list(next(iter(inputs.values())))
    if path.suffix == ".xml":
        data = _layers(path, "Parameter")[0].find("data")
        sizes = "" if data is None else data.get("shape", "")
        return [int(size) if size.isdecimal() else None for size in sizes.split(",")]
    graph = _load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if not inputs:
        raise QakdError(f"{path}: the graph has no input. Export it again.")
    return [dimension.dim_value or None for dimension in inputs[0].type.tensor_type.shape.dim]


def batch_limits(path: Path) -> BatchLimits:
    """Batches that a file takes.

    Raises:
        QakdError: the file is damaged, or has no input.
    """
    sizes = input_sizes(path)
    if sizes and sizes[0] is not None:
        return BatchLimits(sizes[0], sizes[0])
    profile = read_manifest(path).get("profile") if path.suffix == ".engine" else None
    if isinstance(profile, dict) and all(isinstance(profile.get(key), int) for key in ("min", "max")):
        return BatchLimits(profile["min"], profile["max"])
    return BatchLimits(1, None)


def quantized_bits(path: Path) -> tuple[int, int]:
    """Bits of weights and of activations, as far as a file says them; 32 in floating point.

    Where activations are quantized both count as 8, since codes of fewer bits are computed in 8 as well. Weights that are
    quantized alone have the bits that they are stored in.

    Raises:
        QakdError: the file is damaged, or an engine's manifest does not say whether it is quantized.
    """
    of_kind = {".engine": _bits_of_engine, ".xml": _bits_of_openvino}
    return of_kind.get(path.suffix, _bits_of_onnx)(path)


def float_type(path: Path) -> str:
    """Type of what an ONNX file holds in floating point: "float16", "bfloat16" or "float32".

    Raises:
        QakdError: the file is damaged.
    """
    stored = _stored_types(_load(path).graph)
    return next((name.lower() for name in ("FLOAT16", "BFLOAT16") if name in stored), "float32")


def accuracy_levels(path: Path) -> set[int]:
    """Of an ONNX file's products with weights of few bits (MatMulNBits): 4 rounds activations to 8 bits, others do not.

    Raises:
        QakdError: the file is damaged.
    """
    return {level for level, _ in _products_of_few_bits(_load(path).graph)}


def require_valid(path: Path) -> None:
    """Let ONNX's own checker look at a file: OpenVINO crashes on some that are not valid.

    Raises:
        QakdError: it is not valid; says what the checker says.
    """
    _load(path)
    try:
        onnx.checker.check_model(os.fspath(path))
    except Exception as error:  # the checker's exceptions and protobuf's share no other base class
        raise QakdError(f"{path}: cannot load it: it is no valid ONNX file ({str(error)[:200]}). Export it again.") from error


def record_of(path: Path) -> FileRecord | None:
    """What a file says of its history; None where it does not.

    Raises:
        QakdError: the file is damaged.
    """
    if path.suffix == ".xml":
        # Where OpenVINO keeps the metadata of the ONNX file that it converted.
        metadata = {entry.tag: entry.get("value", "") for entry in _root(path).iterfind("rt_info/framework/*")}
    elif path.suffix == ".engine":
        metadata = read_manifest(path).get("metadata") or {}
    else:
        metadata = {entry.key: entry.value for entry in _load(path).metadata_props}
    return read_record(metadata, path.name)


def _bits_of_engine(path: Path) -> tuple[int, int]:
    """What its layers compute in need not be known: the classic TensorRT shows it on a GPU alone, and not for all."""
    manifest = read_manifest(path)
    quantized, int4_weights = manifest.get("quantized"), manifest.get("int4_weights")
    if not isinstance(quantized, bool):
        raise EngineError(
            f"{path}: its manifest does not say whether it is quantized, so it can neither be compared with floating point nor "
            "stand for it. Build the engine again."
        )
    counted = engine_layers(path)
    integer = counted is None or counted[0] > 0
    return _bits(quantized and integer, quantized, 4 if isinstance(int4_weights, int) and int4_weights > 0 else 8)


def _bits_of_openvino(path: Path) -> tuple[int, int]:
    quantized = bool(_layers(path, "FakeQuantize"))
    return _bits(quantized, quantized, 8)


def _bits_of_onnx(path: Path) -> tuple[int, int]:
    graph = _load(path).graph
    kinds = {node.op_type for node in graph.node}
    packed = [bits for _, bits in _products_of_few_bits(graph)]
    narrowest = min([*packed, *(_NARROW[name] for name in _stored_types(graph) if name in _NARROW)], default=8)
    folded = any(entry.key == WEIGHT_KEY for node in graph.node for entry in node.metadata_props)
    weights = bool(packed) or folded or "DequantizeLinear" in kinds
    return _bits(bool(kinds & {"QuantizeLinear", "DynamicQuantizeLinear"}), weights, narrowest)


def _products_of_few_bits(graph: onnx.GraphProto) -> list[tuple[int, int]]:
    """Accuracy level and bits of each MatMulNBits."""
    found = [
        {attribute.name: attribute.i for attribute in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"
    ]
    return [(numbers.get("accuracy_level", 0), numbers.get("bits", 4)) for numbers in found]


def _bits(activations: bool, weights: bool, stored: int) -> tuple[int, int]:
    if activations:
        return 8, 8
    return (stored, 32) if weights else (32, 32)


def _stored_types(graph: onnx.GraphProto) -> set[str]:
    return {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}


def _root(path: Path) -> ElementTree.Element:
    weights = path.with_suffix(".bin")
    if weights.exists() and not weights.is_file():
        raise QakdError(f"{path} keeps its weights in {weights.name}, which is no file. Put it there.")
    try:
        return ElementTree.fromstring(read_whole(path))
    except OSError as error:
        raise QakdError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:  # LookupError: an unknown encoding
        raise QakdError(
            f"{path}: cannot load it: it is no valid file of OpenVINO ({str(error)[:200]}). Convert it again."
        ) from error


def _layers(path: Path, kind: str) -> list[ElementTree.Element]:
    found = [layer for layer in _root(path).iter("layer") if layer.get("type") == kind]
    if kind == "Parameter" and not found:
        raise QakdError(f"{path}: the graph has no input. Export it again.")
    return found


@lru_cache(maxsize=1)
def _parsed(path: Path, modified_ns: int, size: int) -> onnx.ModelProto:
    """Each file is asked several things, one after the other."""
    proto = parsed(read_whole(path))
    require_weights(path, proto)
    return proto


def _load(path: Path) -> onnx.ModelProto:
    try:
        facts = path.stat()
        return _parsed(path, facts.st_mtime_ns, facts.st_size)
    except QakdError:
        raise
    except OSError as error:
        raise QakdError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except Exception as error:  # protobuf and onnx-ir raise many kinds on foreign bytes; all mean the same here
        reason = "" if isinstance(error, DecodeError) else f" ({str(error)[:200]})"
        raise QakdError(f"{path}: cannot load it: it is no valid ONNX file{reason}. Export it again.") from error
