"""OpenVINO on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._common.optional import require
from ..errors import QakdError
from .base import DYNAMIC_INT8, EXPORT_AGAIN, OTHER_INPUTS, Array, Input, LayerTime, fitted, median_ms

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", DYNAMIC_INT8: "f32"}
_DYNAMIC_GROUP = 32
"""Activations that share a scale where OpenVINO quantizes them by itself: its own default."""

_LAYERS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
_NAMES = {"i8": "int8", "u8": "uint8", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "fp32": "float32"}


class OpenVINORunner:
    """A file in OpenVINO. Fits :class:`.base.Runner`.

    Args:
        path: canonical ONNX file, or OpenVINO's own .xml.
        threads: inference threads.
        precision: "float32" pins it; "bfloat16" lets float layers use it where the processor can; "dynamic int8" lets layers
            whose weights alone are quantized round their activations, which OpenVINO does by default.
        profile: record each node's time, which slows it down.

    Raises:
        QakdError: OpenVINO cannot load the file.
        MissingPackageError: OpenVINO is not installed.
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
                    "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
                    "DYNAMIC_QUANTIZATION_GROUP_SIZE": _DYNAMIC_GROUP if precision == DYNAMIC_INT8 else 0,
                    "PERFORMANCE_HINT": "LATENCY",
                    "PERF_COUNT": profile,
                },
            )
            self.load_ms = (time.perf_counter() - started) * 1e3
            self.precision, self._path = precision, path
            self._request = self._compiled.create_infer_request()
            self.inputs = {_name(port): _input(port) for port in self._compiled.inputs}
            self.outputs = tuple(map(_name, self._compiled.outputs))
        except Exception as error:  # on foreign files it raises more than its RuntimeError
            raise QakdError(f"{path}: OpenVINO cannot load it: {str(error)[:300]}. {EXPORT_AGAIN}") from error

    def fit(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """By the file's names and in its types."""
        return fitted(self.inputs, inputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call."""
        fed = list(self.fit(inputs).values())
        try:
            found = self._request.infer(fed)
        except Exception as error:  # on foreign files it raises more than its RuntimeError
            raise QakdError(f"{self._path}: OpenVINO cannot compute it: {str(error)[:300]}. {OTHER_INPUTS}") from error
        return dict(zip(self.outputs, map(np.asarray, found.values()), strict=True))

    def close(self) -> None:
        """Let go of the compiled graph."""
        del self._request, self._compiled

    def count_layers(self) -> tuple[int, int]:
        """Convolutions and matrix products of the compiled graph: those it computes in integers, and all."""
        infos = [node.get_rt_info() for node in self._compiled.get_runtime_model().get_ordered_ops()]
        layers = [info for info in infos if info["layerType"].astype(str) in _LAYERS]
        return sum(map(_computes_in_integers, layers)), len(layers)

    def events(self) -> list[Any]:
        """What was recorded of the last call: nodes that were executed."""
        return [entry for entry in self._request.get_profiling_info() if str(entry.status).endswith(".EXECUTED")]


def _computes_in_integers(info: Any) -> bool:
    """Of a node: where weights alone are quantized, its precision is theirs, and its kernel ("brgemm_avx512_f32") tells."""
    kernel = info["primitiveType"].astype(str).rpartition("_")[2].lower()
    return info["runtimePrecision"].astype(str) in {"i8", "u8"} and kernel not in {"f32", "bf16", "f16"}


def _name(port: Any) -> str:
    """A port's name in the file: a tensor may have several, those of the nodes that were folded into it as well."""
    names: set[str] = set(port.get_names())
    own = str(port.get_node().get_friendly_name()).partition("/sink_port_")[0]
    return own if own in names or not names else min(names)


def _input(port: Any) -> Input:
    sizes = (dimension.get_length() if dimension.is_static else None for dimension in port.get_partial_shape())
    return Input(tuple(sizes), np.dtype(port.get_element_type().to_dtype()))


def node_times(
    path: str | os.PathLike[str], threads: int, precision: str, inputs: Mapping[str, Array], *, warm_up: int, calls: int
) -> list[LayerTime]:
    """Median time of each node that OpenVINO runs, in a runner of its own that records them.

    Args:
        path: canonical ONNX file, or OpenVINO's own .xml.
        threads: of the runtime.
        precision: of what is not quantized.
        inputs: one batch, by name.
        warm_up: calls that do not count.
        calls: that do.
    """
    runner = OpenVINORunner(path, threads, precision, profile=True)
    kinds: dict[str, tuple[str, str]] = {}
    times: dict[str, list[float]] = {}
    for _ in range(warm_up):
        runner.run(inputs)
    for _ in range(calls):
        runner.run(inputs)
        for entry in runner.events():
            kind = entry.exec_type.rpartition("_")[2].lower()  # "brgconv_avx512_amx_I8"
            kinds[entry.node_name] = entry.node_type, _NAMES.get(kind, kind)
            times.setdefault(entry.node_name, []).append(entry.real_time.total_seconds() * 1e3)
    return [LayerTime(name, *kinds[name], median_ms(found)) for name, found in times.items()]
