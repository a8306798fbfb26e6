"""ONNX Runtime on the CPU: proofs, measurements and tuning start it with the same options.

On x86 processors without VNNI, ``session.x64quantprecision`` is one of them: the kernels for unsigned activations and signed
weights add pairs of products in 16 bits there, which saturate, and with it ONNX Runtime makes the weights unsigned, whose
kernels do not. It takes effect with VNNI too, where it only costs time.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._common.cpu_features import adds_products_in_16_bits
from ..errors import QakdError
from .base import DYNAMIC_INT8, EXPORT_AGAIN, OTHER_INPUTS, Array, Input, LayerTime, fitted
from .onnxruntime_profile import read_profile

_log = logging.getLogger(__name__)

_PRECISION = "session.x64quantprecision"
_TYPES = {"float": "float32", "double": "float64"}
"""ONNX Runtime's names of types that NumPy calls otherwise."""


def session_options(threads: int = 0, *, fusions: bool = True, profile: Path | None = None) -> Any:
    """Options of a session on the CPU.

    Args:
        threads: for one operator, operators run one after the other; 0 lets the runtime choose.
        fusions: let the runtime optimize the graph.
        profile: beginning of the path where each node's time is recorded, which slows it down; None to record nothing.

    Returns:
        ``onnxruntime.SessionOptions``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # errors are raised; its logger writes them once more, with names as the file has them
    # Threads would go on spinning after a call, while another session is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if adds_products_in_16_bits():
        options.add_session_config_entry(_PRECISION, "1")
    if not fusions:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return options


def start_session(model: bytes | str | os.PathLike[str], options: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: its bytes, or the path of its file.
        options: from :func:`session_options`.

    Raises:
        Exception: ONNX Runtime cannot load it; its own exception types share no other base class.
    """
    import onnxruntime

    source = model if isinstance(model, bytes) else os.fspath(model)
    # Without a fallback, which would be the same once more, with lines on stdout.
    start = partial(onnxruntime.InferenceSession, source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    try:
        return start()
    except Exception as error:
        # ONNX Runtime makes a weight unsigned once for each layer that reads it, and fails the second time.
        if "replace the existing tensor" not in str(error) or not adds_products_in_16_bits():
            raise
        _log.warning(
            "layers share a weight, which ONNX Runtime's %s does not take: on this processor, which has no VNNI, sums of "
            "products saturate in 16 bits.",
            _PRECISION,
        )
        options.add_session_config_entry(_PRECISION, "0")
        return start()


class OnnxRuntimeRunner:
    """A file in ONNX Runtime. Fits :class:`.base.Runner`.

    Args:
        path: ONNX file.
        threads: for one operator; operators run one after the other.
        precision: of what is not quantized in the file, which this runtime follows; "dynamic int8" lets products of
            activations with weights of few bits (MatMulNBits) round the activations, whatever the file says.
        profile: folder where each node's time is recorded, which slows it down; None to record nothing.

    Raises:
        QakdError: ONNX Runtime cannot load the file.
    """

    runtime = "onnxruntime"

    def __init__(
        self, path: str | os.PathLike[str], threads: int, precision: str = "float32", *, profile: Path | None = None
    ) -> None:
        options = session_options(threads, profile=None if profile is None else profile / "onnxruntime")
        started = time.perf_counter()
        try:
            self._session = start_session(_rounding(path) if precision == DYNAMIC_INT8 else path, options)
        except Exception as error:  # the runtime's own exception types share no base class but Exception
            raise QakdError(f"{path}: ONNX Runtime cannot load it: {str(error)[:300]}. {EXPORT_AGAIN}") from error
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.precision, self._path = precision, path
        self.inputs = {entry.name: _input(path, entry) for entry in self._session.get_inputs()}
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def fit(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """By the file's names and in its types."""
        return fitted(self.inputs, inputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call."""
        fed = self.fit(inputs)
        try:
            found = self._session.run(None, fed)
        except Exception as error:  # the runtime's own exception types share no base class but Exception
            raise QakdError(f"{self._path}: ONNX Runtime cannot compute it: {str(error)[:300]}. {OTHER_INPUTS}") from error
        return dict(zip(self.outputs, map(np.asarray, found), strict=True))

    def close(self) -> None:
        """Let go of the session."""
        del self._session

    def end_profiling(self) -> Path:
        """The file of what was recorded; the session records nothing any more."""
        return Path(self._session.end_profiling())


def _rounding(path: str | os.PathLike[str]) -> bytes:
    """A file with the accuracy level 4 of MatMulNBits, at which ONNX Runtime rounds activations to 8 bits."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 4)])
    return bytes(model.SerializeToString())


def _input(path: str | os.PathLike[str], entry: Any) -> Input:
    """Of a session's input: its open sizes have names, or none."""
    kind = entry.type.removeprefix("tensor(").removesuffix(")")
    try:
        dtype = np.dtype(_TYPES.get(kind, kind))
    except TypeError as error:
        raise QakdError(
            f"{path}: its input {entry.name!r} is {entry.type}, which NumPy's arrays cannot hold. Export it with another."
        ) from error
    return Input(tuple(size if isinstance(size, int) and size > 0 else None for size in entry.shape), dtype)


def node_times(
    path: str | os.PathLike[str], threads: int, precision: str, inputs: Mapping[str, Array], *, warm_up: int, calls: int
) -> list[LayerTime]:
    """Median time of each node that ONNX Runtime runs, in a session of its own that records them.

    Args:
        path: ONNX file.
        threads: of the runtime.
        precision: of what is not quantized.
        inputs: one batch, by name.
        warm_up: calls that do not count.
        calls: that do.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = OnnxRuntimeRunner(path, threads, precision, profile=Path(folder))
        for _ in range(warm_up + calls):
            runner.run(inputs)
        nodes = read_profile(runner.end_profiling())
    return [LayerTime(node.name, node.operator, node.precision, node.median_ms(warm_up)) for node in nodes]
