"""Which layers ONNX Runtime computes in integers, counted in the graph it really runs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..deploy.engine.manifest import read_manifest
from ..errors import QakdError
from ..runtimes.onnxruntime import session_options, start_session

_INTEGER = {
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "NhwcQLinearConv",
}  # fmt: skip
_FLOAT = {
    "Conv", "FusedConv", "NhwcFusedConv", "NchwcConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
    "MatMulNBits",
}  # fmt: skip


@dataclass(frozen=True)
class Census:
    """Convolutions and matrix products of an optimized graph: ``float_layers`` names those left in floating point."""

    integer: int
    total: int
    float_layers: tuple[str, ...]


def census(path: str | os.PathLike[str]) -> Census:
    """Let ONNX Runtime optimize a file as it would to run it, and count.

    Args:
        path: an ONNX file.
    """
    nodes = optimized_nodes(path)
    integer = [node for node in nodes if node.op_type in _INTEGER]
    floating = [
        node for node in nodes if node.op_type in _FLOAT or (node.domain == "com.microsoft.nchwc" and node.op_type == "Conv")
    ]
    return Census(len(integer), len(integer) + len(floating), tuple(node.name or node.op_type for node in floating))


def optimized_nodes(path: str | os.PathLike[str]) -> list[onnx.NodeProto]:
    """What ONNX Runtime really runs on this processor.

    Args:
        path: an ONNX file.

    Raises:
        QakdError: ONNX Runtime cannot load it, or cannot write what it made of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = session_options()
        options.optimized_model_filepath = str(optimized)
        try:
            start_session(path, options)
        except Exception as error:  # the runtime's own exception types share no base class but Exception
            raise QakdError(f"{path}: ONNX Runtime cannot optimize it: {str(error)[:300]}. Export it again.") from error
        return list(onnx.load(optimized, load_external_data=False).graph.node)


def engine_layers(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Layers of an engine that compute in integers, and all, as its plan was read when it was built.

    Args:
        path: of the engine.

    Returns:
        Convolutions and matrix products, of TensorRT-RTX also those of two activations; None where the plan could not be read.

    Raises:
        EngineError: the manifest is missing or damaged.
    """
    manifest = read_manifest(path)
    counts: list[Any] = [manifest.get(kind) for kind in ("convolutions", "matmuls")]
    if not all(isinstance(count, dict) and {"int8", "total"} <= set(count) for count in counts):
        return None
    return sum(count["int8"] for count in counts), sum(count["total"] for count in counts)
