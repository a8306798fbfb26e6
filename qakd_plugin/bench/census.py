"""Which layers ONNX Runtime computes in integers, counted in the graph it really runs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

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
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimized)
        onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        nodes = list(onnx.load(optimized, load_external_data=False).graph.node)
    integer = [node for node in nodes if node.op_type in _INTEGER]
    floating = [
        node for node in nodes if node.op_type in _FLOAT or (node.domain == "com.microsoft.nchwc" and node.op_type == "Conv")
    ]
    return Census(len(integer), len(integer) + len(floating), tuple(node.name or node.op_type for node in floating))
