"""Runtimes behind one small protocol: load a file, run a batch."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .._common.optional import require
from ..deploy.engine.runner import EngineRunner
from ..errors import QakdError
from .onnxruntime import session_options, start_session

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]
FILE_RUNTIMES = ("onnxruntime", "openvino")
MODULE_RUNTIMES = ("torch", "torch.compile")
RUNTIMES = (*FILE_RUNTIMES, "tensorrt", *MODULE_RUNTIMES)
_OPENVINO_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_OPENVINO_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}


class Runner(Protocol):
    """A loaded file. ``run`` takes float32 (N, ...) and returns the first output."""

    @property
    def runtime(self) -> str:
        """Its name."""

    @property
    def precision(self) -> str:
        """Of what is not quantized: "float32", "float16", "bfloat16"."""

    @property
    def load_ms(self) -> float | None:
        """Of the file; None where there is none."""

    def run(self, images: Array) -> Array:
        """One call."""

    def close(self) -> None:
        """Let go of what it holds."""


class OnnxRuntimeRunner:
    """ONNX Runtime on the CPU.

    Args:
        path: ONNX file.
        threads: for one operator; operators run one after the other.
        precision: of what is not quantized in the file, which this runtime follows; it is not read here.
        profile: folder where each node's time is recorded, which slows it down; None to record nothing.
    """

    runtime = "onnxruntime"

    def __init__(
        self, path: str | os.PathLike[str], threads: int, precision: str = "float32", *, profile: Path | None = None
    ) -> None:
        options = session_options(threads, profile=None if profile is None else profile / "onnxruntime")
        started = time.perf_counter()
        try:
            self._session = start_session(path, options)
        except Exception as error:  # the runtime's own exception types share no base class but Exception
            raise QakdError(f"{path}: ONNX Runtime cannot load it: {str(error)[:300]}") from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.precision = precision
        self._input = self._session.get_inputs()[0]

    def run(self, images: Array) -> Array:
        _check_shape(self._input.name, self._input.shape, images)
        return np.asarray(self._session.run(None, {self._input.name: images})[0])

    def close(self) -> None:
        del self._session

    def events(self) -> list[dict[str, Any]]:
        """What was recorded, one entry per node and call; the session records nothing any more."""
        recorded: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text())
        return [event for event in recorded if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


class OpenVINORunner:
    """OpenVINO on the CPU.

    Args:
        path: ONNX file; the canonical form.
        threads: inference threads.
        precision: "float32" pins it; "bfloat16" lets float layers use it where the processor can.
        profile: record each node's time, which slows it down.
    """

    runtime = "openvino"

    def __init__(
        self, path: str | os.PathLike[str], threads: int, precision: str = "float32", *, profile: bool = False
    ) -> None:
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
                    "INFERENCE_PRECISION_HINT": _OPENVINO_PRECISIONS[precision],
                    "PERFORMANCE_HINT": "LATENCY",
                    "PERF_COUNT": profile,
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

    def close(self) -> None:
        del self._request, self._compiled

    def count_layers(self) -> tuple[int, int]:
        """Convolutions and matrix products of the compiled graph: those it computes in integers, and all."""
        kinds = [
            (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
            for info in (node.get_rt_info() for node in self._compiled.get_runtime_model().get_ordered_ops())
        ]
        found = [precision for kind, precision in kinds if kind in _OPENVINO_LAYERS]
        return sum(precision in {"i8", "u8"} for precision in found), len(found)

    def events(self) -> list[Any]:
        """What was recorded of the last call: nodes that were executed."""
        return [entry for entry in self._request.get_profiling_info() if str(entry.status).endswith(".EXECUTED")]


def make_runner(path: str | os.PathLike[str] | nn.Module, runtime: str, threads: int, precision: str = "float32") -> Runner:
    """The runner for a file, or for a torch module.

    Raises:
        QakdError: the runtime is unknown, or cannot take what was given.
        EngineError: an engine does not match its manifest, or there is no GPU to run it.
        MissingPackageError: the runtime is not installed.
    """
    if runtime in MODULE_RUNTIMES:
        from .pytorch import TorchRunner

        return TorchRunner(path, threads, precision, compiled=runtime == "torch.compile")  # type: ignore[arg-type]
    file: str | os.PathLike[str] = path  # type: ignore[assignment]
    if runtime == "tensorrt":
        return EngineRunner(file)
    if runtime == "onnxruntime":
        return OnnxRuntimeRunner(file, threads, precision)
    if runtime == "openvino":
        return OpenVINORunner(file, threads, precision)
    raise QakdError(f"runtimes: {runtime!r} is unknown: use one of {', '.join(map(repr, RUNTIMES))}.")


def node_times(
    path: str | os.PathLike[str], runtime: str, threads: int, precision: str, images: Array, *, warm_up: int, calls: int
) -> list[tuple[str, str, str, float]]:
    """Name, operator, precision and median milliseconds of each node that ONNX Runtime or OpenVINO runs.

    Args:
        path: ONNX file.
        runtime: "onnxruntime" or "openvino".
        threads: of the runtime.
        precision: of what is not quantized.
        images: (N, ...), one batch.
        warm_up: calls that do not count.
        calls: that do.
    """
    if runtime == "openvino":
        return _openvino_times(OpenVINORunner(path, threads, precision, profile=True), images, warm_up, calls)
    with tempfile.TemporaryDirectory() as folder:
        runner = OnnxRuntimeRunner(path, threads, precision, profile=Path(folder))
        for _ in range(warm_up + calls):
            runner.run(images)
        return _onnxruntime_times(runner.events(), warm_up)


def _onnxruntime_times(events: list[dict[str, Any]], warm_up: int) -> list[tuple[str, str, str, float]]:
    nodes: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        nodes.setdefault(event["args"]["node_index"], []).append(event)
    found = []
    for node in nodes.values():
        name = re.sub(r"(_token_\d+)?_kernel_time$", "", node[0]["name"])
        arguments = node[0]["args"]
        types = [kind for value in arguments.get("input_type_shape", []) for kind in value] or ["unknown"]
        precision = {"float": "float32", "double": "float64"}.get(types[0], types[0])
        found.append((name, arguments["op_name"], precision, _median_ms([event["dur"] / 1e3 for event in node[warm_up:]])))
    return found


def _openvino_times(runner: OpenVINORunner, images: Array, warm_up: int, calls: int) -> list[tuple[str, str, str, float]]:
    kinds: dict[str, tuple[str, str]] = {}
    times: dict[str, list[float]] = {}
    names = {"i8": "int8", "u8": "uint8", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "fp32": "float32"}
    for index in range(warm_up + calls):
        runner.run(images)
        for entry in runner.events() if index >= warm_up else ():
            kind = entry.exec_type.rpartition("_")[2].lower()  # "brgconv_avx512_amx_I8"
            kinds[entry.node_name] = entry.node_type, names.get(kind, kind)
            times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
    return [(name, *kinds[name], _median_ms(found)) for name, found in times.items()]


def _median_ms(times: list[float]) -> float:
    """Not the mean: one interruption by the system lasts longer than most layers."""
    return float(np.median(times)) if times else 0.0


def _check_shape(name: str, expected: list[Any], images: Array) -> None:
    fixed = [size if isinstance(size, int) and size > 0 else None for size in expected]
    fits = len(fixed) == images.ndim and all(want in (None, got) for want, got in zip(fixed, images.shape, strict=True))
    if not fits:
        raise QakdError(f"loader: the file's input {name!r} takes shape {expected}, a batch has {list(images.shape)}.")
