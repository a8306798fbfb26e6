"""Runtimes behind one small protocol: load a file, run a batch."""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .._optional import require
from ..deploy.engine_runner import EngineRunner
from ..errors import QakdError

Array = npt.NDArray[Any]


class Runner(Protocol):
    """A loaded file. ``run`` takes float32 (N, ...) and returns the first output."""

    runtime: str
    precision: str
    load_ms: float

    def run(self, images: Array) -> Array:
        """One call."""


class OnnxRuntimeRunner:
    """ONNX Runtime on the CPU.

    Args:
        path: ONNX file.
        threads: for one operator; operators run one after the other.
    """

    runtime = "onnxruntime"

    def __init__(self, path: str | os.PathLike[str], threads: int) -> None:
        onnxruntime = require("onnxruntime", extra="all", purpose="measure in ONNX Runtime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        started = time.perf_counter()
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exception types share no base class but Exception
            raise QakdError(f"{path}: ONNX Runtime cannot load it: {str(error)[:300]}") from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self._input = self._session.get_inputs()[0]
        self.precision = "float32"

    def run(self, images: Array) -> Array:
        _check_shape(self._input.name, self._input.shape, images)
        return np.asarray(self._session.run(None, {self._input.name: images})[0])


class OpenVINORunner:
    """OpenVINO on the CPU.

    Args:
        path: ONNX file; the canonical form.
        threads: inference threads.
        precision: "float32" pins it; "bfloat16" lets float layers use it where the processor can.
    """

    runtime = "openvino"

    def __init__(self, path: str | os.PathLike[str], threads: int, precision: str = "float32") -> None:
        openvino = require("openvino", extra="openvino", purpose="measure in OpenVINO")
        started = time.perf_counter()
        core = openvino.Core()
        try:
            model = core.read_model(os.fspath(path))
            self._compiled = core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": threads,
                    "INFERENCE_PRECISION_HINT": "f32" if precision == "float32" else "bf16",
                    "PERFORMANCE_HINT": "LATENCY",
                },
            )
        except RuntimeError as error:
            raise QakdError(f"{path}: OpenVINO cannot load it: {str(error)[:300]}") from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.precision = precision
        self._request = self._compiled.create_infer_request()
        tensor = self._compiled.inputs[0]
        self._name = tensor.get_any_name()
        self._shape = [dimension.get_length() if dimension.is_static else None for dimension in tensor.get_partial_shape()]

    def run(self, images: Array) -> Array:
        _check_shape(self._name, self._shape, images)
        return np.asarray(next(iter(self._request.infer([images]).values())))


def make_runner(path: str | os.PathLike[str], runtime: str, threads: int) -> Runner:
    """The runner for a file.

    Raises:
        QakdError: the runtime is unknown.
        EngineError: an engine does not match its manifest, or there is no GPU to run it.
        MissingPackageError: the runtime is not installed.
    """
    if runtime == "tensorrt":
        return EngineRunner(path)
    if runtime == "onnxruntime":
        return OnnxRuntimeRunner(path, threads)
    if runtime == "openvino":
        return OpenVINORunner(path, threads)
    raise QakdError(f"runtimes: {runtime!r} is unknown: use 'onnxruntime', 'openvino' or 'tensorrt'.")


def _check_shape(name: str, expected: list[Any], images: Array) -> None:
    fixed = [size if isinstance(size, int) and size > 0 else None for size in expected]
    fits = len(fixed) == images.ndim and all(want in (None, got) for want, got in zip(fixed, images.shape, strict=True))
    if not fits:
        raise QakdError(f"loader: the file's input {name!r} takes shape {expected}, a batch has {list(images.shape)}.")
