"""Variants of one file, loaded and timed side by side in the runtime that they are for."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import ExportError
from ...runtimes import onnxruntime, openvino
from ...runtimes.base import Array, FileRuntime, Runner
from ...runtimes.interleaving import turns
from ...runtimes.onnxruntime import OnnxRuntimeRunner, session_options, start_session
from ...runtimes.openvino import OpenVINORunner

Inputs = Mapping[str, Array]
"""One batch, by the names of the file's inputs."""

WARM_UP_CALLS = 5
PROFILED_CALLS = 15
LEAST_SECONDS = 0.2
"""That variants are timed for, each: fractions of it are at the mercy of what else the host does."""


@dataclass(frozen=True)
class Variant:
    """A variant of a file.

    Attributes:
        data: its bytes.
        precision: of what is not quantized in it: "float32", in OpenVINO also "bfloat16".
    """

    data: bytes
    precision: str = "float32"


@dataclass(frozen=True)
class Variants:
    """How variants of a file are run.

    Attributes:
        path: of the file that they are made from, for error messages.
        runtime: "onnxruntime" or "openvino".
        threads: of the runtime.
    """

    path: Path
    runtime: FileRuntime
    threads: int

    def serialized(self, model: ir.Model) -> bytes:
        """A variant's bytes.

        Raises:
            ExportError: it cannot be written.
        """
        try:
            data: bytes = ir.serde.serialize_model(model).SerializeToString()
        except Exception as error:  # onnx-ir and protobuf raise many kinds on damaged tensors, and on more than 2 GiB
            reason = " ".join(str(error).split())[:200]
            raise ExportError(
                f"{self.path} cannot be written again ({type(error).__name__}: {reason}). Export it again."
            ) from error
        return data

    def check(self, data: bytes) -> None:
        """Let ONNX Runtime, which computes what proofs compare with, and the runtime load a variant.

        Raises:
            ExportError: it cannot.
        """
        self.as_it_says(data, (), fusions=True)
        if self.runtime != "onnxruntime":
            with self._loaded([Variant(data)]):
                pass

    def as_it_says(self, data: bytes, batches: Sequence[Inputs], *, fusions: bool = False) -> list[list[Array]]:
        """All outputs for each batch, computed by ONNX Runtime operator by operator, or with its ``fusions``.

        Raises:
            ExportError: it cannot load or run the variant.
        """
        with self._in_one_line("ONNX Runtime cannot load it"):
            session = start_session(data, session_options(self.threads, fusions=fusions))
        with self._in_one_line("ONNX Runtime cannot run it"):
            return [[np.asarray(output) for output in session.run(None, dict(batch))] for batch in batches]

    def deployed(self, variant: Variant, batches: Sequence[Inputs]) -> list[list[Array]]:
        """All outputs for each batch, as the runtime computes them.

        Raises:
            ExportError: it cannot load or run the variant.
        """
        with self._loaded([variant]) as (runner,):
            return [list(runner.run(batch).values()) for batch in batches]

    def layer_times(self, variant: Variant, inputs: Inputs) -> dict[str, float]:
        """Median time of each node that the runtime runs, milliseconds, by its name: mostly the layer's."""
        timed = {"onnxruntime": onnxruntime.node_times, "openvino": openvino.node_times}[self.runtime]
        with tempfile.TemporaryDirectory() as folder, self._in_one_line("it cannot be timed"):
            path = Path(folder) / "variant.onnx"
            path.write_bytes(variant.data)
            nodes = timed(path, self.threads, variant.precision, inputs, warm_up=WARM_UP_CALLS, calls=PROFILED_CALLS)
        return {node.name: node.time_ms for node in nodes}

    def interleaved(self, variants: Sequence[Variant], batches: Sequence[Inputs], calls: int) -> list[float]:
        """Median processor time of a call of each variant, milliseconds: in turns, of at least ``calls`` calls of each."""
        times: list[list[float]] = [[] for _ in variants]
        with self._loaded(variants) as runners:
            for runner in runners * WARM_UP_CALLS:
                start = time.perf_counter()
                runner.run(batches[0])
                seconds = time.perf_counter() - start
            for turn in turns(max(calls, int(LEAST_SECONDS / seconds))):
                for runner, taken in zip(runners, times, strict=True):
                    runner.run(batches[turn[0] % len(batches)])
                    for index in turn:
                        start = time.process_time()
                        runner.run(batches[index % len(batches)])
                        taken.append(time.process_time() - start)
        return [statistics.median(taken) * 1e3 for taken in times]

    @contextmanager
    def _loaded(self, variants: Sequence[Variant]) -> Iterator[list[Runner]]:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(self._in_one_line(f"{self.runtime} cannot take it"))
            runners = []
            for index, variant in enumerate(variants):
                path = Path(folder) / f"{index}.onnx"
                path.write_bytes(variant.data)
                runners.append(self._runner(path, variant.precision))
                stack.callback(runners[-1].close)
            yield runners

    def _runner(self, path: Path, precision: str) -> Runner:
        kind: Any = {"onnxruntime": OnnxRuntimeRunner, "openvino": OpenVINORunner}[self.runtime]
        return kind(path, self.threads, precision)  # type: ignore[no-any-return]

    @contextmanager
    def _in_one_line(self, problem: str) -> Iterator[None]:
        try:
            yield
        except ExportError:
            raise
        except Exception as error:  # the runtimes' own exception types share no other base class
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"{self.path}: {problem}. Export it again, or tune it for another runtime: {reason}") from error
