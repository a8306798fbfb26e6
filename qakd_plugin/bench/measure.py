"""Latency and accuracy of deployed files, candidates interleaved so that a drift of the machine hits all alike."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..errors import QakdError
from .census import census
from .record import Row
from .runners import Array, Runner, make_runner

WARM_UP_CALLS = 10
CALLS_FOR_P90 = 64
CALLS_FOR_P99 = 662
"""Samples that a 90th and a 99th percentile need (early-stopping bound of MLPerf Inference)."""


@dataclass(frozen=True)
class Candidate:
    """A file to measure, and what a report should call it.

    Attributes:
        path: ONNX file.
        method: "FP32", "PTQ", "QAT", "SQAKD".
        model: name of the network.
        toolkit: that prepared it.
        weight_bits: 32 for float.
        activation_bits: 32 for float.
        runtime: only measured there; None: in all runtimes asked for.
    """

    path: str | os.PathLike[str]
    method: str = ""
    model: str = ""
    toolkit: str | None = None
    weight_bits: int = 32
    activation_bits: int = 32
    runtime: str | None = None


@dataclass
class _Timed:
    candidate: Candidate
    runner: Runner
    wall: list[float]
    cpu: list[float]


def benchmark(
    models: Sequence[str | os.PathLike[str] | Candidate],
    loader: Iterable[Any] | None = None,
    runtimes: Sequence[str] = ("onnxruntime",),
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    calls: int = 200,
    reference: Array | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure files side by side in one run.

    Args:
        models: ONNX files and engines, or :class:`Candidate`; engines run in "tensorrt", ONNX files in the other runtimes.
        loader: batches (images, labels) for accuracy through the runtime, and real inputs for latency; without it, random
            images of the shape the first file takes.
        runtimes: "onnxruntime", "openvino", "tensorrt".
        batch_sizes: images per call.
        threads: threads of the runtime.
        calls: timed calls of each candidate, after a warm-up.
        reference: float32 (N, C) logits of the trained model on ``loader``'s images, for agreement and SQNR.
        progress: called with a line per stage.

    Returns:
        One row per file, runtime, batch size and number of threads.

    Raises:
        QakdError: a file is missing or does not load, or the loader's images do not fit; names it.
        MissingPackageError: a runtime is not installed; carries the pip line.
    """
    if not models:
        raise QakdError("models is empty: name at least one ONNX file.")
    say = progress or (lambda _: None)
    candidates = [model if isinstance(model, Candidate) else _plain(model) for model in models]
    for candidate in candidates:
        if not Path(candidate.path).is_file():
            raise QakdError(f"models: {candidate.path} does not exist.")
    images, labels = _collect(loader) if loader is not None else (_random_images(candidates[0]), None)
    rows: list[Row] = []
    scores: dict[tuple[int, str], dict[str, Any]] = {}
    for count in threads:
        jobs = [
            (index, candidate, runtime)
            for index, candidate in enumerate(candidates)
            for runtime in runtimes
            if candidate.runtime in (None, runtime) and (Path(candidate.path).suffix == ".engine") == (runtime == "tensorrt")
        ]
        if len({index for index, _, _ in jobs}) < len(candidates):
            raise QakdError("runtimes: engines run in 'tensorrt', ONNX files in 'onnxruntime' and 'openvino'; name them all.")
        runners = [make_runner(candidate.path, runtime, count) for _, candidate, runtime in jobs]
        for (index, candidate, runtime), runner in zip(jobs, runners, strict=True):
            if labels is not None and (index, runtime) not in scores:
                say(f"accuracy of {Path(candidate.path).name} in {runtime}")
                scores[index, runtime] = _score(runner, images, labels, reference)
        for batch in batch_sizes:
            say(f"latency of {len(jobs)} candidates, batch {batch}, {count} thread{'s' * (count > 1)}, interleaved")
            timed = [_Timed(candidate, runner, [], []) for (_, candidate, _), runner in zip(jobs, runners, strict=True)]
            _measure(timed, images, batch, calls)
            for (index, _, runtime), one in zip(jobs, timed, strict=True):
                rows.append(_row(one, batch, count, calls, scores.get((index, runtime), {})))
    return _with_speedups(rows)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927)."""
    z = 1.959963984540054
    share = correct / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


def percentiles(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median, 90th and 99th percentile; the upper two only where there are enough samples for them."""
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    enough = len(samples)
    return float(p50), float(p90) if enough >= CALLS_FOR_P90 else None, float(p99) if enough >= CALLS_FOR_P99 else None


def _plain(path: str | os.PathLike[str]) -> Candidate:
    name = Path(path).stem
    quantized = _has_quantizers(path)
    return Candidate(path, method=name, model=name, weight_bits=8 if quantized else 32, activation_bits=8 if quantized else 32)


def _has_quantizers(path: str | os.PathLike[str]) -> bool:
    if Path(path).suffix != ".onnx" or not Path(path).is_file():
        return False
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(path, load_external_data=False).graph.node)


def _collect(loader: Iterable[Any]) -> tuple[Array, Array]:
    """All images and labels of a loader, as arrays."""
    images, labels = [], []
    for batch in loader:
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise QakdError("loader: accuracy needs batches (images, labels).")
        images.append(np.asarray(batch[0], dtype=np.float32))
        labels.append(np.asarray(batch[1]))
    if not images:
        raise QakdError("loader is empty: it yielded no batch.")
    return np.concatenate(images), np.concatenate(labels)


def _random_images(candidate: Candidate) -> Array:
    shape = onnx.load(candidate.path, load_external_data=False).graph.input[0].type.tensor_type.shape
    sizes = [dimension.dim_value for dimension in shape.dim][1:]
    if any(size < 1 for size in sizes):
        raise QakdError(f"{candidate.path}: its input size is not fixed; pass a loader with real images.")
    return np.random.default_rng(0).random((64, *sizes), dtype=np.float32)


def _score(runner: Runner, images: Array, labels: Array, reference: Array | None) -> dict[str, Any]:
    logits = np.concatenate([runner.run(images[start : start + 64]) for start in range(0, len(images), 64)])
    correct = int((logits.argmax(1) == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    score: dict[str, Any] = {
        "accuracy": correct / len(labels),
        "accuracy_low": low,
        "accuracy_high": high,
        "samples": len(labels),
    }
    if reference is not None:
        noise = float(((logits.astype(np.float64) - reference) ** 2).sum())
        signal = float((reference.astype(np.float64) ** 2).sum())
        score["agreement"] = float((logits.argmax(1) == reference.argmax(1)).mean())
        score["sqnr_db"] = 10 * math.log10(signal / noise) if noise else None
    return score


def _measure(timed: Sequence[_Timed], images: Array, batch: int, calls: int) -> None:
    """Fill in wall and processor time per call, in seconds: one call of each candidate after the other."""
    repeats = -(-batch // len(images))
    pool = np.concatenate([images] * repeats) if repeats > 1 else images
    batches = [np.ascontiguousarray(pool[start : start + batch]) for start in range(0, len(pool) - batch + 1, batch)]
    for index in range(WARM_UP_CALLS):
        for one in timed:
            one.runner.run(batches[index % len(batches)])
    for index in range(calls):
        data = batches[index % len(batches)]
        for one in timed:
            wall, cpu = time.perf_counter(), time.process_time()
            one.runner.run(data)
            one.wall.append(time.perf_counter() - wall)
            one.cpu.append(time.process_time() - cpu)


def _row(one: _Timed, batch: int, threads: int, calls: int, score: dict[str, Any]) -> Row:
    candidate, runner = one.candidate, one.runner
    p50, p90, p99 = percentiles(one.wall)
    counted = census(candidate.path) if runner.runtime == "onnxruntime" else None
    quantized = candidate.weight_bits < 32
    return Row(
        model=candidate.model,
        method=candidate.method,
        toolkit=candidate.toolkit,
        weight_bits=candidate.weight_bits,
        activation_bits=candidate.activation_bits,
        runtime=runner.runtime,
        precision="int8" if quantized else runner.precision,
        batch=batch,
        threads=threads,
        calls=calls,
        p50_ms=p50 * 1e3,
        p90_ms=None if p90 is None else p90 * 1e3,
        p99_ms=None if p99 is None else p99 * 1e3,
        cpu_ms=float(np.median(one.cpu)) * 1e3,
        throughput=batch / p50,
        load_ms=runner.load_ms,
        file_mib=_size(candidate.path) / 2**20,
        integer_layers=None if counted is None else counted.integer,
        total_layers=None if counted is None else counted.total,
        **score,
    )


def _size(path: str | os.PathLike[str]) -> int:
    """Of a file and its external data."""
    data = Path(f"{os.fspath(path)}.data")
    return Path(path).stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Ratios within one run: over the same runtime's FP32, and over the fastest float row of any runtime."""
    done = []
    for row in rows:
        setting = (row.batch, row.threads)
        floats = [other for other in rows if (other.batch, other.threads) == setting and other.weight_bits == 32]
        same = [o.p50_ms for o in floats if o.runtime == row.runtime and o.precision == "float32"]
        done.append(
            replace(
                row,
                speedup=same[0] / row.p50_ms if same else None,
                speedup_over_best_float=min(o.p50_ms for o in floats) / row.p50_ms if floats else None,
            )
        )
    return done
