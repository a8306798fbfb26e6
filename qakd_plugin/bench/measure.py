"""Latency and accuracy of deployed files, candidates interleaved so that a drift of the machine hits all alike."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from ..deploy.engine.runner import EngineRunner, StageTimes
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES, Array, LayerTime, Runner
from ..runtimes.host import Conditions, Watch
from ..runtimes.interleaving import WARM_UP_CALLS, turns
from ..runtimes.openvino import OpenVINORunner
from .accuracy import IMAGES_AT_ONCE, Tally, score_all
from .candidates import Candidate, candidate_from_path
from .census import census, engine_layers
from .file_facts import batch_limits, input_sizes
from .jobs import Job, jobs_of
from .loading import make_runner, node_times
from .peak_memory import peak_rss_mib
from .ratios import with_findings, with_speedups
from .rows import Row

if TYPE_CHECKING:
    import os

    from torch import nn

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

CALLS_FOR_P90 = 64
CALLS_FOR_P99 = 662
"""Samples that a 90th and a 99th percentile need (early-stopping bound of MLPerf Inference)."""

_PROFILED_CALLS = 20
_STAGED_CALLS = 64


def benchmark(
    models: Sequence[str | os.PathLike[str] | nn.Module | Candidate],
    loader: Iterable[Any] | None = None,
    runtimes: Sequence[str] = ("onnxruntime",),
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    calls: int = 200,
    reference: Array | None = None,
    profile_layers: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure files side by side in one run.

    Float files and modules are measured in float32 (in ONNX Runtime and engines in the type that the file holds) and, where
    the runtime can (OpenVINO, torch) and the processor has it, in bfloat16: rows of their own. The best integer row of a model
    that is not faster than its best float row carries findings that say why.

    Args:
        models: ONNX files, engines, OpenVINO's .xml files, float torch modules, or :class:`Candidate`. What is given without
            Candidate counts as one model. Engines run in "tensorrt", modules in "torch" and "torch.compile", files in
            "onnxruntime" and "openvino".
        loader: batches (images, labels) for accuracy through the runtime: float (N, ...) and integers (N,). It is read once,
            each batch is given to every file, and the first 64 images are the inputs for latency (more where a batch takes
            more); without it, random images of the shape that the first file takes.
        runtimes: "onnxruntime", "openvino", "tensorrt", "torch", "torch.compile".
        batch_sizes: images per call.
        threads: threads of the runtime.
        calls: timed calls of each candidate, after a warm-up.
        reference: float32 (N, C) logits of the trained model on ``loader``'s images, in its order, for agreement and SQNR.
        profile_layers: also record each layer's time and precision (ONNX Runtime, OpenVINO), in a pass of its own: recording
            slows a runtime down.
        progress: called with a line per stage.

    Returns:
        One row per file, runtime, precision, batch size and number of threads.

    Raises:
        QakdError: a file is missing or does not load, cannot take a batch size, or the loader's images do not fit; names it.
        MissingPackageError: a runtime is not installed; carries the pip line.
    """
    if not models:
        raise QakdError("models is empty: name at least one ONNX file.")
    say = progress or (lambda _: None)
    candidates = [model if isinstance(model, Candidate) else candidate_from_path(model) for model in models]
    jobs = jobs_of(candidates, runtimes, batch_sizes)
    scored = _Scored(_random_images(candidates), [{}] * len(jobs)) if loader is None else None
    layers: list[tuple[int | None, int | None]] = []
    rows: list[Row] = []
    for count in threads:
        with _Session(jobs, count) as session:
            layers = layers or session.count_layers()
            if scored is None and loader is not None:
                say(f"accuracy of {len(jobs)} candidates")
                scored = session.score(loader, reference, max([IMAGES_AT_ONCE, *batch_sizes]))
            assert scored is not None
            for batch in batch_sizes:
                say(f"latency of {len(jobs)} candidates, batch {batch}, {count} thread{'s' * (count > 1)}, interleaved")
                timed = session.time(_batches(scored.images, batch), calls)
                rows += session.rows(timed, scored.scores, layers, profile_layers)
    return with_findings(with_speedups(rows), [job.candidate for job in jobs] * (len(rows) // len(jobs)))


@dataclass(frozen=True)
class _Scored:
    """What one pass over a loader gives: the images that latency is measured with, and the fields of each job's rows."""

    images: Array
    scores: list[dict[str, Any]]


@dataclass(frozen=True)
class _Timed:
    """Wall and processor time of each call of each job, in seconds, and how quiet the machine was.

    ``batch`` is one of those that were computed, (N, ...).
    """

    wall: list[list[float]]
    cpu: list[list[float]]
    conditions: Conditions
    batch: Array


class _Session:
    """All jobs, loaded with one number of threads, until the context ends."""

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        self._jobs, self._threads = jobs, threads
        self._runners: list[Runner] = []
        self._loaded = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # closes those before the one that does not load
            for job in self._jobs:
                runner = make_runner(job.candidate.path, job.runtime, self._threads, job.precision)
                stack.callback(runner.close)
                self._runners.append(runner)
            self._loaded = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._loaded.close()

    def count_layers(self) -> list[tuple[int | None, int | None]]:
        """Convolutions and matrix products of each job: in integers, and all; None where that is not known."""
        pairs = zip(self._jobs, self._runners, strict=True)
        return [_count_layers(job.candidate, runner) or (None, None) for job, runner in pairs]

    def score(self, loader: Iterable[Any], reference: Array | None, keep: int) -> _Scored:
        """Accuracy of each job, and the first ``keep`` images."""
        tallies = []
        for job, runner in zip(self._jobs, self._runners, strict=True):
            file = job.candidate.file
            size = IMAGES_AT_ONCE if file is None else batch_limits(file).nearest(IMAGES_AT_ONCE)
            tallies.append(Tally(job.candidate.label, runner, size, reference))
        images = score_all(tallies, loader, keep)
        return _Scored(images, [tally.score() for tally in tallies])

    def time(self, batches: Sequence[Array], calls: int) -> _Timed:
        """A few calls of each job per turn, in shuffled order.

        The first call of a turn is not timed: it finds in the caches what the others left there, so that the time of a small
        network would depend on how many others are measured beside it.
        """
        wall: list[list[float]] = [[] for _ in self._jobs]
        cpu: list[list[float]] = [[] for _ in self._jobs]
        for index in range(WARM_UP_CALLS):
            for runner in self._runners:
                runner.run(batches[index % len(batches)])
        watch = Watch()
        order, shuffle = list(zip(self._runners, wall, cpu, strict=True)), random.Random(0).shuffle
        for turn in turns(calls):
            shuffle(order)
            for runner, wall_times, cpu_times in order:
                runner.run(batches[turn[0] % len(batches)])
                for index in turn:
                    data = batches[index % len(batches)]
                    wall_start, cpu_start = time.perf_counter(), time.process_time()
                    runner.run(data)
                    wall_times.append(time.perf_counter() - wall_start)
                    cpu_times.append(time.process_time() - cpu_start)
        return _Timed(wall, cpu, watch.conditions(), batches[0])

    def rows(
        self,
        timed: _Timed,
        scores: Sequence[dict[str, Any]],
        layers: Sequence[tuple[int | None, int | None]],
        profile_layers: bool,
    ) -> list[Row]:
        """One for each job, with what is measured besides: peak memory, copies of an engine, times of layers."""
        each = zip(self._jobs, self._runners, timed.wall, timed.cpu, scores, layers, strict=True)
        return [
            Row(
                model=job.candidate.model,
                method=job.candidate.method,
                toolkit=job.candidate.toolkit,
                weight_bits=job.candidate.weight_bits,
                activation_bits=job.candidate.activation_bits,
                runtime=runner.runtime,
                precision="int8" if job.candidate.activation_bits < 32 else runner.precision,
                batch=len(timed.batch),
                threads=self._threads,
                load_ms=runner.load_ms,
                file_mib=None if job.candidate.file is None else _size(job.candidate.file) / 2**20,
                integer_layers=integer,
                total_layers=total,
                peak_rss_mib=_peak_memory(job, self._threads, timed.batch),
                conditions=timed.conditions,
                layers=_layer_times(job, self._threads, timed.batch) if profile_layers else (),
                **_latency(wall, cpu, len(timed.batch)),
                **_stages(job, runner, timed.batch),
                **score,
            )
            for job, runner, wall, cpu, score, (integer, total) in each
        ]


def percentiles(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median, 90th and 99th percentile; the upper two only where there are enough samples for them."""
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    enough = len(samples)
    return float(p50), float(p90) if enough >= CALLS_FOR_P90 else None, float(p99) if enough >= CALLS_FOR_P99 else None


def _random_images(candidates: Sequence[Candidate]) -> Array:
    files = [candidate.file for candidate in candidates if candidate.file is not None]
    if not files:
        raise QakdError("loader: torch modules do not say what size their input has; pass a loader with images.")
    sizes = input_sizes(files[0])[1:]
    fixed = [size for size in sizes if size is not None]
    if len(fixed) < len(sizes):
        raise QakdError(f"{files[0]}: its input size is not fixed; pass a loader with real images.")
    return np.random.default_rng(0).random((IMAGES_AT_ONCE, *fixed), dtype=np.float32)


def _batches(images: Array, batch: int) -> list[Array]:
    repeats = -(-batch // len(images))
    pool = np.concatenate([images] * repeats) if repeats > 1 else images
    return [np.ascontiguousarray(pool[start : start + batch]) for start in range(0, len(pool) - batch + 1, batch)]


def _latency(wall: Sequence[float], cpu: Sequence[float], batch: int) -> dict[str, Any]:
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


def _peak_memory(job: Job, threads: int, data: Array) -> float | None:
    if job.runtime not in FILE_RUNTIMES:
        return None
    path = job.candidate.existing
    return _if_it_can(
        "peak memory is", lambda: peak_rss_mib(path, job.runtime, job.precision, threads, data.shape), otherwise=None
    )


def _layer_times(job: Job, threads: int, data: Array) -> tuple[LayerTime, ...]:
    if job.runtime not in FILE_RUNTIMES:
        return ()
    path, calls = job.candidate.existing, {"warm_up": WARM_UP_CALLS, "calls": _PROFILED_CALLS}
    return _if_it_can(
        "times of layers are",
        lambda: tuple(node_times(path, job.runtime, threads, job.precision, data, **calls)),
        otherwise=(),
    )


def _stages(job: Job, runner: Runner, data: Array) -> dict[str, Any]:
    """What an engine's copies and its computing take, apart, by events on the GPU; nothing elsewhere."""
    if not isinstance(runner, EngineRunner):
        return {}
    times: list[StageTimes] = _if_it_can(
        f"{job.candidate.label}: times of copies are",
        lambda: [runner.time(data) for _ in range(_STAGED_CALLS)],
        otherwise=[],
    )
    names = ("upload_ms", "compute_ms", "download_ms") if times else ()
    return {name: float(np.median([getattr(each, name) for each in times])) for name in names}


def _count_layers(candidate: Candidate, runner: Runner) -> tuple[int, int] | None:
    if isinstance(runner, OpenVINORunner):
        return runner.count_layers()
    if isinstance(runner, EngineRunner):
        return engine_layers(candidate.existing)
    if runner.runtime == "onnxruntime":
        counted = census(candidate.existing)
        return counted.integer, counted.total
    return None


def _size(path: Path) -> int:
    """Of a file and its weights, where they lie beside it."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
