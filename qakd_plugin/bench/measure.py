"""Latency and quality of deployed files, candidates interleaved so that a drift of the machine hits all alike."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from ..deploy.engine.runner import EngineRunner, StageTimes
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES, Array, LayerTime, Runner
from ..runtimes.host import Conditions, Watch
from ..runtimes.interleaving import WARM_UP_CALLS, turns
from ..runtimes.openvino import OpenVINORunner
from .accuracy import IMAGES_AT_ONCE, Accuracy, Agreement, Count, Tally, labels_of, score_all
from .candidates import Candidate, candidate_from_path
from .census import census, engine_layers
from .file_facts import batch_limits
from .jobs import Job, jobs_of
from .loading import make_runner, node_times
from .peak_memory import peak_rss_mib
from .ratios import with_findings, with_speedups
from .rows import Row
from .samples import BatchFn, Reader, Samples

if TYPE_CHECKING:
    import os

    from torch import nn

    from ..tasks.metrics import AnyMetric, MetricFn

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
    reference: Array | Mapping[str, Array] | None = None,
    profile_layers: bool = False,
    progress: Callable[[str], None] | None = None,
    batch_fn: BatchFn | None = None,
    metric: AnyMetric | None = None,
    metric_fn: MetricFn | None = None,
) -> list[Row]:
    """Measure files side by side in one run.

    Float files and modules are measured in float32 (in ONNX Runtime and engines in the type that the file holds) and, where
    the runtime can (OpenVINO, torch) and the processor has it, in bfloat16: rows of their own. The best integer row of a model
    that is not faster than its best float row carries findings that say why.

    Args:
        models: ONNX files, engines, OpenVINO's .xml files, float torch modules, or :class:`Candidate`. What is given without
            Candidate counts as one model. Engines run in "tensorrt", modules in "torch" and "torch.compile", files in
            "onnxruntime" and "openvino".
        loader: batches (inputs, targets). It is read once, each batch is given to every file, and the first 64 samples (more
            where a call takes more), of those with the first one's shape, are the inputs for latency. With class labels,
            integers (N,), the accuracy of logits (N, C) is counted. Without a loader, random inputs, where the first file's are
            floats of fixed sizes.
        runtimes: "onnxruntime", "openvino", "tensorrt", "torch", "torch.compile".
        batch_sizes: samples per call: the first dimension of each input. What has no such dimension goes with every call.
        threads: threads of the runtime.
        calls: timed calls of each candidate, after a warm-up.
        reference: float32 outputs of the trained model on ``loader``'s samples, in its order, for agreement and SQNR: (N, ...)
            of the only output or the one called "logits", or several by name.
        profile_layers: also record each layer's time and precision (ONNX Runtime, OpenVINO), in a pass of its own: recording
            slows a runtime down.
        progress: called with a line per stage.
        batch_fn: splits a batch into inputs (an array, a tuple by position, a mapping by the files' names) and targets, as in
            ``distill``. By default x, (x, y), or a mapping, of which each file takes what it has inputs for.
        metric: ``torchmetrics.Metric`` or ``MetricCollection``, counted through every runtime in the place of accuracy, with
            a 95 % percentile bootstrap interval: 100 copies are updated with resampled batches, and computed.
        metric_fn: callable(outputs, targets) -> what ``metric.update`` takes, one entry per sample. Outputs are a torch tensor
            where there is one, else a dict by name.

    Returns:
        One row per file, runtime, precision, batch size and number of threads.

    Raises:
        QakdError: a file is missing or does not load, cannot take a batch size, what the loader yields does not fit its
            inputs, or the metric does not take its outputs; names it.
        MissingPackageError: a runtime is not installed; carries the pip line.
    """
    if not models:
        raise QakdError("models is empty: name at least one ONNX file.")
    counted = _Counted(reference, metric, metric_fn)
    counted.check(has_loader=loader is not None)
    say = progress or (lambda _: None)
    candidates = [model if isinstance(model, Candidate) else candidate_from_path(model) for model in models]
    jobs = jobs_of(candidates, runtimes, batch_sizes)
    scored: _Scored | None = None
    layers: list[tuple[int | None, int | None]] = []
    rows: list[Row] = []
    for count in threads:
        with _Session(jobs, count) as session:
            layers = layers or session.count_layers()
            if scored is None and loader is None:
                reader, samples = session.random()
                scored = _Scored(reader, samples, [{}] * len(jobs))
            elif scored is None and loader is not None:
                say(f"{counted.what} of {len(jobs)} candidates")
                reader = session.reader(_own_split(batch_fn))
                scored = session.score(reader, loader, counted, max([IMAGES_AT_ONCE, *batch_sizes]))
            assert scored is not None
            for batch in batch_sizes:
                say(f"latency of {len(jobs)} candidates, batch {batch}, {count} thread{'s' * (count > 1)}, interleaved")
                timed = session.time(scored.reader, _batches(scored.samples, batch), calls)
                rows += session.rows(timed, batch, scored.scores, layers, profile_layers)
    return with_findings(with_speedups(rows), [job.candidate for job in jobs] * (len(rows) // len(jobs)))


@dataclass(frozen=True)
class _Counted:
    """What is counted besides latency, as the user says it."""

    reference: Array | Mapping[str, Array] | None
    metric: AnyMetric | None
    metric_fn: MetricFn | None

    @property
    def what(self) -> str:
        """In one or two words."""
        return "accuracy" if self.metric is None else type(self.metric).__name__

    def check(self, has_loader: bool) -> None:
        """Raise QakdError for what cannot be meant."""
        if self.metric_fn is not None and self.metric is None:
            raise QakdError("metric_fn says what a metric takes, and there is none: pass metric=, of torchmetrics.")
        given = [name for name in ("reference", "metric") if getattr(self, name) is not None]
        if given and not has_loader:
            raise QakdError(f"{given[0]}: it is counted on a loader's samples: pass loader=.")
        if self.metric is not None:
            from ..tasks.metrics import check_metric

            check_metric(self.metric)

    def counts(self, name: str, has_labels: bool) -> list[Count]:
        """Counters of one file."""
        counts: list[Count] = []
        if self.metric is not None:
            from .metric import MetricCount

            counts.append(MetricCount(name, self.metric, self.metric_fn))
        elif has_labels:
            counts.append(Accuracy(name))
        return counts if self.reference is None else [*counts, Agreement(name, self.reference)]


@dataclass(frozen=True)
class _Scored:
    """What one pass over a loader gives: the samples that latency is measured with, and the fields of each job's rows."""

    reader: Reader
    samples: Samples
    scores: list[dict[str, Any]]


@dataclass(frozen=True)
class _Timed:
    """Wall and processor time of each call of each job, in seconds, and how quiet the machine was.

    ``feeds`` are inputs of each job, one batch of those that were computed.
    """

    wall: list[list[float]]
    cpu: list[list[float]]
    conditions: Conditions
    feeds: list[dict[str, Array]]


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

    def reader(self, batch_fn: BatchFn | None) -> Reader:
        """What splits a loader's batches for these jobs."""
        return Reader(batch_fn, self._runners)

    def random(self) -> tuple[Reader, Samples]:
        """Inputs for all jobs, of the first file's shapes."""
        pairs = zip(self._jobs, self._runners, strict=True)
        files = [(job.candidate.file, runner) for job, runner in pairs if job.candidate.file is not None]
        if not files:
            raise QakdError("loader: torch modules do not say what size their input has; pass a loader with images.")
        file, runner = files[0]
        draw, arrays = np.random.default_rng(0), {}
        for name, spec in runner.inputs.items():
            if spec.dtype is None or spec.dtype.kind != "f":
                raise QakdError(f"{file}: its input {name!r} holds {spec.dtype}, which is not drawn at random; pass a loader.")
            sizes = [size for size in (spec.shape or ())[1:] if size is not None]
            if not spec.shape or len(sizes) < len(spec.shape) - 1:
                raise QakdError(f"{file}: its input size is not fixed; pass a loader with real images.")
            arrays[name] = draw.random((IMAGES_AT_ONCE, *sizes), dtype=np.float32)
        reader = self.reader(lambda batch: (batch, None))
        return reader, reader.split(arrays if len(arrays) > 1 else next(iter(arrays.values())))

    def score(self, reader: Reader, loader: Iterable[Any], counted: _Counted, keep: int) -> _Scored:
        """What is counted of each job, and the first ``keep`` samples."""
        batches: Iterator[Samples] = map(reader.split, loader)
        head = list(itertools.islice(batches, 1))
        if not head:
            raise QakdError("loader is empty: it yielded no batch.")
        batches, cut = _rejoined(head, batches), counted.metric is None
        has_labels = cut and head[0].targets is not None
        at_once = IMAGES_AT_ONCE if cut else head[0].count
        if cut:
            self._check_purpose(has_labels or counted.reference is not None)
            batches = map(_labelled if has_labels else _unlabelled, batches)
        tallies = []
        for job, runner in zip(self._jobs, self._runners, strict=True):
            file, label = job.candidate.file, job.candidate.label
            size = at_once if file is None else batch_limits(file).nearest(at_once)
            tallies.append(Tally(label, runner, size, counted.counts(label, has_labels)))
        samples = score_all(tallies, batches, reader, keep, cut=cut)
        return _Scored(reader, samples, [tally.score() for tally in tallies])

    def _check_purpose(self, is_counted: bool) -> None:
        """A loader without labels is there for its inputs, where random ones would not do."""
        if is_counted:
            return
        try:
            self.random()
        except QakdError:
            return
        raise QakdError(
            "loader: accuracy needs batches (images, labels), and these hold no labels. Without any, leave the loader out: "
            "inputs for latency are random then."
        )

    def time(self, reader: Reader, batches: Sequence[Samples], calls: int) -> _Timed:
        """A few calls of each job per turn, in shuffled order.

        The first call of a turn is not timed: it finds in the caches what the others left there, so that the time of a small
        network would depend on how many others are measured beside it.
        """
        feeds = [[reader.feed(runner, samples.inputs) for samples in batches] for runner in self._runners]
        wall: list[list[float]] = [[] for _ in self._jobs]
        cpu: list[list[float]] = [[] for _ in self._jobs]
        for index in range(WARM_UP_CALLS):
            for runner, fed in zip(self._runners, feeds, strict=True):
                runner.run(fed[index % len(fed)])
        watch = Watch()
        order, shuffle = list(zip(self._runners, feeds, wall, cpu, strict=True)), random.Random(0).shuffle
        for turn in turns(calls):
            shuffle(order)
            for runner, fed, wall_times, cpu_times in order:
                runner.run(fed[turn[0] % len(fed)])
                for index in turn:
                    data = fed[index % len(fed)]
                    wall_start, cpu_start = time.perf_counter(), time.process_time()
                    runner.run(data)
                    wall_times.append(time.perf_counter() - wall_start)
                    cpu_times.append(time.process_time() - cpu_start)
        return _Timed(wall, cpu, watch.conditions(), [fed[0] for fed in feeds])

    def rows(
        self,
        timed: _Timed,
        batch: int,
        scores: Sequence[dict[str, Any]],
        layers: Sequence[tuple[int | None, int | None]],
        profile_layers: bool,
    ) -> list[Row]:
        """One for each job, with what is measured besides: peak memory, copies of an engine, times of layers."""
        each = zip(self._jobs, self._runners, timed.wall, timed.cpu, timed.feeds, scores, layers, strict=True)
        return [
            Row(
                model=job.candidate.model,
                method=job.candidate.method,
                toolkit=job.candidate.toolkit,
                weight_bits=job.candidate.weight_bits,
                activation_bits=job.candidate.activation_bits,
                runtime=runner.runtime,
                precision="int8" if job.candidate.activation_bits < 32 else runner.precision,
                batch=batch,
                threads=self._threads,
                load_ms=runner.load_ms,
                file_mib=None if job.candidate.file is None else _size(job.candidate.file) / 2**20,
                integer_layers=integer,
                total_layers=total,
                peak_rss_mib=_peak_memory(job, self._threads, feed),
                conditions=timed.conditions,
                layers=_layer_times(job, self._threads, feed) if profile_layers else (),
                **_latency(wall, cpu, batch),
                **_stages(job, runner, feed),
                **score,
            )
            for job, runner, wall, cpu, feed, score, (integer, total) in each
        ]


def percentiles(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median, 90th and 99th percentile; the upper two only where there are enough samples for them."""
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    enough = len(samples)
    return float(p50), float(p90) if enough >= CALLS_FOR_P90 else None, float(p99) if enough >= CALLS_FOR_P99 else None


def _own_split(batch_fn: BatchFn | None) -> BatchFn | None:
    """None for the package's default, which knows networks; here files are known."""
    if batch_fn is None:
        return None
    from ..tasks.batches import default_batch

    return None if batch_fn is default_batch else batch_fn


def _rejoined(head: list[Samples], rest: Iterator[Samples]) -> Iterator[Samples]:
    """All batches; ``head`` is emptied, so that none of them is held any longer than it is used."""
    while head:
        yield head.pop(0)
    yield from rest


def _labelled(samples: Samples) -> Samples:
    return replace(samples, targets=labels_of(samples))


def _unlabelled(samples: Samples) -> Samples:
    return replace(samples, targets=None)


def _batches(samples: Samples, batch: int) -> list[Samples]:
    pool = samples.repeated(batch)
    return [pool.rows(start, start + batch).contiguous() for start in range(0, pool.count - batch + 1, batch)]


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


def _peak_memory(job: Job, threads: int, feed: Mapping[str, Array]) -> float | None:
    if job.runtime not in FILE_RUNTIMES:
        return None
    path = job.candidate.existing
    return _if_it_can("peak memory is", lambda: peak_rss_mib(path, job.runtime, job.precision, threads, feed), otherwise=None)


def _layer_times(job: Job, threads: int, feed: Mapping[str, Array]) -> tuple[LayerTime, ...]:
    if job.runtime not in FILE_RUNTIMES:
        return ()
    path, calls = job.candidate.existing, {"warm_up": WARM_UP_CALLS, "calls": _PROFILED_CALLS}
    return _if_it_can(
        "times of layers are",
        lambda: tuple(node_times(path, job.runtime, threads, job.precision, feed, **calls)),
        otherwise=(),
    )


def _stages(job: Job, runner: Runner, feed: Mapping[str, Array]) -> dict[str, Any]:
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
