"""The runtimes by their names: which class loads a file or takes a module, and which times its nodes.

A runtime's library is imported when something is loaded into it, and no other one is: the process that measures peak memory
holds what it measures alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import QakdError
from ..runtimes.base import MODULE_RUNTIMES, RUNTIMES, Array, LayerTime, Runner

if TYPE_CHECKING:
    from torch import nn


def make_runner(path: str | os.PathLike[str] | nn.Module, runtime: str, threads: int, precision: str = "float32") -> Runner:
    """The runner for a file, or for a torch module.

    Args:
        path: ONNX file, OpenVINO's .xml, engine, or float torch module.
        runtime: "onnxruntime", "openvino", "tensorrt", "torch", "torch.compile".
        threads: of the runtime.
        precision: of what is not quantized, where the runtime lets it be chosen.

    Raises:
        QakdError: the runtime is unknown, or cannot take what was given.
        EngineError: an engine does not match its manifest, or there is no GPU to run it.
        MissingPackageError: the runtime is not installed.
    """
    if runtime in MODULE_RUNTIMES:
        from ..runtimes.pytorch import TorchRunner

        return TorchRunner(path, threads, precision, compiled=runtime == "torch.compile")  # type: ignore[arg-type]
    file: str | os.PathLike[str] = path  # type: ignore[assignment]
    if runtime == "tensorrt":
        from ..deploy.engine.runner import EngineRunner

        return EngineRunner(file)
    if runtime == "onnxruntime":
        from ..runtimes.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(file, threads, precision)
    if runtime == "openvino":
        from ..runtimes.openvino import OpenVINORunner

        return OpenVINORunner(file, threads, precision)
    raise QakdError(f"runtimes: {runtime!r} is unknown: use one of {', '.join(map(repr, RUNTIMES))}.")


def node_times(
    path: str | os.PathLike[str],
    runtime: str,
    threads: int,
    precision: str,
    inputs: Mapping[str, Array],
    *,
    warm_up: int,
    calls: int,
) -> list[LayerTime]:
    """Median time of each node that ONNX Runtime or OpenVINO runs.

    Args:
        path: ONNX file.
        runtime: "onnxruntime" or "openvino".
        threads: of the runtime.
        precision: of what is not quantized.
        inputs: one batch, by name.
        warm_up: calls that do not count.
        calls: that do.
    """
    if runtime == "openvino":
        from ..runtimes import openvino

        return openvino.node_times(path, threads, precision, inputs, warm_up=warm_up, calls=calls)
    from ..runtimes import onnxruntime

    return onnxruntime.node_times(path, threads, precision, inputs, warm_up=warm_up, calls=calls)
