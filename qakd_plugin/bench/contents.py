"""What a file says of itself: the input it takes, and whether it is quantized. ONNX, engines, and OpenVINO's own format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..deploy.engine_file import read_manifest
from ..errors import EngineError, QakdError
from .census import engine_layers


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
        raise QakdError(f"{path}: the graph has no input.")
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


def has_quantizers(path: Path) -> bool:
    """Whether an ONNX file holds QuantizeLinear or stored codes, or an engine layers that compute in integers.

    Raises:
        QakdError: the file is damaged.
    """
    if path.suffix == ".engine":
        counted = engine_layers(path)
        return counted is not None and counted[0] > 0
    if path.suffix == ".xml":
        return bool(_layers(path, "FakeQuantize"))
    return any(node.op_type in {"QuantizeLinear", "DequantizeLinear"} for node in _load(path).graph.node)


def _layers(path: Path, kind: str) -> list[ElementTree.Element]:
    try:
        found = [layer for layer in ElementTree.parse(path).iter("layer") if layer.get("type") == kind]
    except ElementTree.ParseError as error:
        raise QakdError(f"{path}: cannot load it: it is no valid file of OpenVINO ({error}).") from error
    if kind == "Parameter" and not found:
        raise QakdError(f"{path}: the graph has no input.")
    return found


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise QakdError(f"{path}: cannot load it: it is no valid ONNX file.") from error
