"""What a row holds beside scores: percentiles of its calls, peak memory, copies of an engine, layers and their times."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..deploy.engine.runner import EngineRunner, StageTimes
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES, Array, LayerTime, Runner
from ..runtimes.interleaving import WARM_UP_CALLS
from ..runtimes.openvino import OpenVINORunner
from .candidates import Candidate
from .census import census, engine_layers
from .jobs import Job
from .loading import node_times
from .peak_memory import peak_rss_mib

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

CALLS_FOR_P90 = 64
CALLS_FOR_P99 = 662
"""Samples that a 90th and a 99th percentile need (early-stopping bound of MLPerf Inference)."""

_PROFILED_CALLS = 20
_STAGED_CALLS = 64


def percentiles(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median, 90th and 99th percentile; the upper two only where there are enough samples for them."""
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    enough = len(samples)
    return float(p50), float(p90) if enough >= CALLS_FOR_P90 else None, float(p99) if enough >= CALLS_FOR_P99 else None


def latency(wall: Sequence[float], cpu: Sequence[float], batch: int) -> dict[str, Any]:
    p50, p90, p99 = percentiles(wall)
    return {
        "calls": len(wall),
        "p50_ms": p50 * 1e3,
        "p90_ms": None if p90 is None else p90 * 1e3,
        "p99_ms": None if p99 is None else p99 * 1e3,
        "cpu_ms": float(np.median(cpu)) * 1e3,
        "throughput": batch / p50,
    }


def _if_it_can(what: str, measured: Callable[[], _Found], otherwise: _Found) -> _Found:
    """What was timed already stands, whatever happens to what is measured besides."""
    try:
        return measured()
    except QakdError as error:
        _log.warning("%s not known: %s", what, error)
        return otherwise


def peak_memory(job: Job, threads: int, feed: Mapping[str, Array]) -> float | None:
    if job.runtime not in FILE_RUNTIMES:
        return None
    path = job.candidate.existing
    return _if_it_can("peak memory is", lambda: peak_rss_mib(path, job.runtime, job.precision, threads, feed), otherwise=None)


def layer_times(job: Job, threads: int, feed: Mapping[str, Array]) -> tuple[LayerTime, ...]:
    if job.runtime not in FILE_RUNTIMES:
        return ()
    path, calls = job.candidate.existing, {"warm_up": WARM_UP_CALLS, "calls": _PROFILED_CALLS}
    return _if_it_can(
        "times of layers are",
        lambda: tuple(node_times(path, job.runtime, threads, job.precision, feed, **calls)),
        otherwise=(),
    )


def stages(job: Job, runner: Runner, feed: Mapping[str, Array]) -> dict[str, Any]:
    """What an engine's copies and its computing take, apart, by events on the GPU; nothing elsewhere."""
    if not isinstance(runner, EngineRunner):
        return {}
    times: list[StageTimes] = _if_it_can(
        f"{job.candidate.label}: times of copies are",
        lambda: [runner.time(feed) for _ in range(_STAGED_CALLS)],
        otherwise=[],
    )
    names = ("upload_ms", "compute_ms", "download_ms") if times else ()
    return {name: float(np.median([getattr(each, name) for each in times])) for name in names}


def count_layers(candidate: Candidate, runner: Runner) -> tuple[int, int] | None:
    if isinstance(runner, OpenVINORunner):
        return runner.count_layers()
    if isinstance(runner, EngineRunner):
        return engine_layers(candidate.existing)
    if runner.runtime == "onnxruntime":
        counted = census(candidate.existing)
        return counted.integer, counted.total
    return None


def size(path: Path) -> int:
    """Of a file and its weights, where they lie beside it."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
