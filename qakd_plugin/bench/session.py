"""Files and modules loaded side by side: one pass over a loader for what is counted, then calls of all in shuffled turns."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ..errors import QakdError
from ..runtimes.base import Array, Runner, random_inputs
from ..runtimes.host import Conditions, Watch
from ..runtimes.interleaving import WARM_UP_CALLS, turns
from . import row_fields
from .accuracy import IMAGES_AT_ONCE, Accuracy, Agreement, Count, Tally, labels_of, score_all
from .changes import with_changes
from .file_facts import batch_limits
from .jobs import Job
from .loading import make_runner
from .rows import Row
from .samples import BatchFn, Reader, Samples

if TYPE_CHECKING:
    from ..tasks.metrics import AnyMetric, MetricFn


@dataclass(frozen=True)
class Counting:
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
class Scored:
    """What one pass over a loader gives: the samples that latency is measured with, and the fields of each job's rows."""

    reader: Reader
    samples: Samples
    scores: list[dict[str, Any]]


@dataclass(frozen=True)
class Timed:
    """Wall and processor time of each call of each job, in seconds, and how quiet the machine was.

    ``feeds`` are inputs of each job, one batch of those that were computed.
    """

    wall: list[list[float]]
    cpu: list[list[float]]
    conditions: Conditions
    feeds: list[dict[str, Array]]


class Session:
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
        return [row_fields.count_layers(job.candidate, runner) or (None, None) for job, runner in pairs]

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
        try:
            arrays = random_inputs(runner.inputs, IMAGES_AT_ONCE)
        except QakdError as error:
            raise QakdError(f"{file}: {error}; pass a loader with real inputs.") from error
        reader = self.reader(lambda batch: (batch, None))
        return reader, reader.split(arrays if len(arrays) > 1 else next(iter(arrays.values())))

    def score(self, reader: Reader, loader: Iterable[Any], counted: Counting, keep: int) -> Scored:
        """What is counted of each job, and the first ``keep`` samples."""
        batches: Iterator[Samples] = map(reader.split, loader)
        head = list(itertools.islice(batches, 1))
        if not head:
            raise QakdError("loader is empty: it yielded no batch. Check the data set and drop_last.")
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
        return Scored(reader, samples, with_changes(self._jobs, tallies))

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

    def time(self, reader: Reader, batches: Sequence[Samples], calls: int) -> Timed:
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
        return Timed(wall, cpu, watch.conditions(), [fed[0] for fed in feeds])

    def rows(
        self,
        timed: Timed,
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
                file_mib=None if job.candidate.file is None else row_fields.size(job.candidate.file) / 2**20,
                integer_layers=integer,
                total_layers=total,
                peak_rss_mib=row_fields.peak_memory(job, self._threads, feed),
                conditions=timed.conditions,
                file="" if job.candidate.file is None else job.candidate.file.name,
                record=job.record,
                layers=row_fields.layer_times(job, self._threads, feed) if profile_layers else (),
                **row_fields.latency(wall, cpu, batch),
                **row_fields.stages(job, runner, feed),
                **score,
            )
            for job, runner, wall, cpu, feed, score, (integer, total) in each
        ]


def _rejoined(head: list[Samples], rest: Iterator[Samples]) -> Iterator[Samples]:
    """All batches; ``head`` is emptied, so that none of them is held any longer than it is used."""
    while head:
        yield head.pop(0)
    yield from rest


def _labelled(samples: Samples) -> Samples:
    return replace(samples, targets=labels_of(samples))


def _unlabelled(samples: Samples) -> Samples:
    return replace(samples, targets=None)
