"""Latency and accuracy of deployed files, candidates interleaved so that a drift of the machine hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._common.cpu_features import has_bfloat16
from ..deploy.engine.runner import EngineRunner
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES, MODULE_RUNTIMES, RUNTIMES, Array, OpenVINORunner, Runner, make_runner, node_times
from ..runtimes.host import Watch
from ..runtimes.interleaving import WARM_UP_CALLS, turns
from .accuracy import IMAGES_AT_ONCE, Tally, score_all
from .candidates import Candidate, named_by_its_path
from .census import census, engine_layers
from .file_facts import BatchLimits, batch_limits, float_type, input_sizes
from .peak_memory import peak_rss_mib
from .ratios import with_findings, with_speedups
from .rows import Conditions, LayerTime, Row

if TYPE_CHECKING:
    import os

    from torch import nn

CALLS_FOR_P90 = 64
CALLS_FOR_P99 = 662
"""Samples that a 90th and a 99th percentile need (early-stopping bound of MLPerf Inference)."""

_PROFILED_CALLS = 20
_STAGED_CALLS = 64


@dataclass
class _Job:
    """A candidate in a runtime and precision; ``score`` and ``layers`` (in integers, all) are found once, whatever batches and
    threads are measured."""

    candidate: Candidate
    runtime: str
    precision: str
    score: dict[str, Any] | None = None
    layers: tuple[int | None, int | None] | None = None


@dataclass
class _Timed:
    job: _Job
    runner: Runner
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


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
    candidates = [model if isinstance(model, Candidate) else named_by_its_path(model) for model in models]
    jobs = _jobs(candidates, runtimes, batch_sizes)
    images = _random_images(candidates) if loader is None else None
    rows: list[tuple[Row, Candidate]] = []
    for count in threads:
        with ExitStack() as stack:
            timed = []
            for job in jobs:
                path = job.candidate.path
                timed.append(_Timed(job, make_runner(path, job.runtime, count, job.precision)))
                stack.callback(timed[-1].runner.close)
            for one in timed:
                if one.job.layers is None:
                    one.job.layers = _count_layers(one.job.candidate, one.runner) or (None, None)
            if loader is not None and images is None:
                say(f"accuracy of {len(jobs)} candidates")
                images = _score(timed, loader, reference, max([IMAGES_AT_ONCE, *batch_sizes]))
            assert images is not None
            for batch in batch_sizes:
                say(f"latency of {len(jobs)} candidates, batch {batch}, {count} thread{'s' * (count > 1)}, interleaved")
                fresh = [_Timed(one.job, one.runner) for one in timed]
                conditions = _measure(fresh, images, batch, calls)
                for one in fresh:
                    rows.append((_row(one, images, batch, count, conditions, profile_layers), one.job.candidate))
    compared = with_speedups([row for row, _ in rows])
    return with_findings(compared, [candidate for _, candidate in rows])


def _jobs(candidates: Sequence[Candidate], runtimes: Sequence[str], batch_sizes: Sequence[int]) -> list[_Job]:
    """What will be measured; refuses what cannot be before anything is."""
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise QakdError(f"runtimes: {unknown[0]!r} is unknown: use {', '.join(map(repr, RUNTIMES))}.")
    jobs = []
    for candidate in candidates:
        if candidate.file is not None and not candidate.file.is_file():
            raise QakdError(f"models: {candidate.file} does not exist.")
        if candidate.file is None and candidate.weight_bits < 32:
            raise QakdError(f"models: {candidate.label}: modules are measured in floating point. Export a quantized one.")
        wanted = [name for name in runtimes if name in candidate.runtimes and candidate.runtime in (None, name)]
        if not wanted:
            raise QakdError(
                f"runtimes: {candidate.label} is measured in none of {list(runtimes)}: engines run in 'tensorrt', ONNX files "
                "in 'onnxruntime' and 'openvino', torch modules in 'torch' and 'torch.compile'; name them all."
            )
        limits = BatchLimits(1, None) if candidate.file is None else batch_limits(candidate.file)
        for batch in batch_sizes:
            if not limits.takes(batch):
                raise QakdError(f"batch_sizes: {candidate.label} takes batches of {limits}, {batch} was asked for.")
        jobs += [_Job(candidate, runtime, precision) for runtime in wanted for precision in _precisions(candidate, runtime)]
    return jobs


def _precisions(candidate: Candidate, runtime: str) -> tuple[str, ...]:
    if runtime == "onnxruntime":
        return (float_type(candidate.existing),)
    both = candidate.weight_bits == 32 and (runtime == "openvino" or runtime in MODULE_RUNTIMES) and has_bfloat16()
    return ("float32", "bfloat16") if both else ("float32",)


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


def _score(timed: Sequence[_Timed], loader: Iterable[Any], reference: Array | None, keep: int) -> Array:
    """Fill in the jobs' scores; returns the first ``keep`` images."""
    tallies = []
    for one in timed:
        file = one.job.candidate.file
        size = IMAGES_AT_ONCE if file is None else batch_limits(file).nearest(IMAGES_AT_ONCE)
        tallies.append(Tally(one.job.candidate.label, one.runner, size, reference))
    images = score_all(tallies, loader, keep)
    for one, tally in zip(timed, tallies, strict=True):
        one.job.score = tally.score()
    return images


def _measure(timed: Sequence[_Timed], images: Array, batch: int, calls: int) -> Conditions:
    """Fill in wall and processor time per call, in seconds: a few calls of each candidate per round, in shuffled order.

    The first call of a turn is not timed: it finds in the caches what the others left there, so that the time of a small
    network would depend on how many others are measured beside it.
    """
    batches = _batches(images, batch)
    order, shuffle = list(timed), random.Random(0).shuffle
    for index in range(WARM_UP_CALLS):
        for one in order:
            one.runner.run(batches[index % len(batches)])
    watch = Watch()
    for turn in turns(calls):
        shuffle(order)
        for one in order:
            one.runner.run(batches[turn[0] % len(batches)])
            for index in turn:
                data = batches[index % len(batches)]
                wall, cpu = time.perf_counter(), time.process_time()
                one.runner.run(data)
                one.wall.append(time.perf_counter() - wall)
                one.cpu.append(time.process_time() - cpu)
    return watch.conditions()


def _batches(images: Array, batch: int) -> list[Array]:
    repeats = -(-batch // len(images))
    pool = np.concatenate([images] * repeats) if repeats > 1 else images
    return [np.ascontiguousarray(pool[start : start + batch]) for start in range(0, len(pool) - batch + 1, batch)]


def _row(one: _Timed, images: Array, batch: int, threads: int, conditions: Conditions, profile_layers: bool) -> Row:
    job, candidate, runner = one.job, one.job.candidate, one.runner
    p50, p90, p99 = percentiles(one.wall)
    data = _batches(images, batch)[0]
    integer, total = job.layers or (None, None)
    is_file = job.runtime in FILE_RUNTIMES
    return Row(
        model=candidate.model,
        method=candidate.method,
        toolkit=candidate.toolkit,
        weight_bits=candidate.weight_bits,
        activation_bits=candidate.activation_bits,
        runtime=runner.runtime,
        precision="int8" if candidate.activation_bits < 32 else runner.precision,
        batch=batch,
        threads=threads,
        calls=len(one.wall),
        p50_ms=p50 * 1e3,
        p90_ms=None if p90 is None else p90 * 1e3,
        p99_ms=None if p99 is None else p99 * 1e3,
        cpu_ms=float(np.median(one.cpu)) * 1e3,
        throughput=batch / p50,
        load_ms=runner.load_ms,
        file_mib=None if candidate.file is None else _size(candidate.file) / 2**20,
        integer_layers=integer,
        total_layers=total,
        peak_rss_mib=peak_rss_mib(candidate.existing, job.runtime, job.precision, threads, data.shape) if is_file else None,
        conditions=conditions,
        layers=_layers(job, threads, data) if profile_layers and is_file else (),
        **_stages(runner, data),
        **(job.score or {}),
    )


def _stages(runner: Runner, data: Array) -> dict[str, Any]:
    """What an engine's copies and its computing take, apart, by events on the GPU; nothing elsewhere."""
    if not isinstance(runner, EngineRunner):
        return {}
    times = [runner.time(data) for _ in range(_STAGED_CALLS)]
    return {name: float(np.median([getattr(t, name) for t in times])) for name in ("upload_ms", "compute_ms", "download_ms")}


def _layers(job: _Job, threads: int, data: Array) -> tuple[LayerTime, ...]:
    found = node_times(
        job.candidate.existing, job.runtime, threads, job.precision, data, warm_up=WARM_UP_CALLS, calls=_PROFILED_CALLS
    )
    return tuple(LayerTime(*node) for node in found)


def _count_layers(candidate: Candidate, runner: Runner) -> tuple[int, int] | None:
    """Convolutions and matrix products: in integers, and all; None where that is not known."""
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
