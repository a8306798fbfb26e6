"""Variants of one file in ONNX Runtime, timed side by side."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ExportError
from ...runtimes.base import Array
from ...runtimes.interleaving import turns
from ...runtimes.onnxruntime import session_options, start_session
from ...runtimes.onnxruntime_profile import read_profile

Inputs = Mapping[str, Array]
"""One batch, by the names of the file's inputs."""

WARM_UP_CALLS = 5
PROFILED_CALLS = 15


@dataclass(frozen=True)
class Variants:
    """How variants of a file are run.

    Attributes:
        path: of the file that they are made from, for error messages.
        threads: of the runtime.
    """

    path: Path
    threads: int

    def session(self, data: bytes, *, fusions: bool = True, profile: Path | None = None) -> Any:
        """An ``onnxruntime.InferenceSession`` of a variant's bytes.

        Raises:
            ExportError: the runtime cannot load them.
        """
        with self._in_one_line("load"):
            return start_session(data, session_options(self.threads, fusions=fusions, profile=profile))

    def run(self, session: Any, inputs: Inputs) -> list[Array]:
        """All outputs for one batch.

        Raises:
            ExportError: the runtime cannot compute it.
        """
        with self._in_one_line("run"):
            return [np.asarray(output) for output in session.run(None, dict(inputs))]

    def layer_times(self, variants: Sequence[bytes], inputs: Inputs) -> list[dict[str, float]]:
        """Median time of each node in each variant, milliseconds, by its name, from profiles of interleaved calls."""
        with tempfile.TemporaryDirectory() as folder:
            sessions = [self.session(data, profile=Path(folder) / f"{index}") for index, data in enumerate(variants)]
            for _ in range(WARM_UP_CALLS + PROFILED_CALLS):
                for session in sessions:
                    self.run(session, inputs)
            profiles = [read_profile(session.end_profiling()) for session in sessions]
        return [{node.name: node.median_ms(WARM_UP_CALLS) for node in nodes} for nodes in profiles]

    def interleaved(self, variants: Sequence[bytes], batches: Sequence[Inputs], calls: int) -> list[float]:
        """Median processor time of a call of each variant, milliseconds: in turns."""
        sessions = [self.session(data) for data in variants]
        times: list[list[float]] = [[] for _ in sessions]
        for session in sessions * WARM_UP_CALLS:
            self.run(session, batches[0])
        for turn in turns(calls):
            for session, taken in zip(sessions, times, strict=True):
                self.run(session, batches[turn[0] % len(batches)])
                for index in turn:
                    start = time.process_time()
                    self.run(session, batches[index % len(batches)])
                    taken.append(time.process_time() - start)
        return [statistics.median(taken) * 1e3 for taken in times]

    @contextmanager
    def _in_one_line(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the runtime's own exception types share no other base class
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"{self.path}: ONNX Runtime cannot {doing} it: {reason}") from error
