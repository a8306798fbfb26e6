"""Latency and quality of deployed files, candidates interleaved so that a drift of the machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._common.one_at_a_time import one_at_a_time
from ..errors import QakdError
from ..runtimes.base import Array
from .accuracy import IMAGES_AT_ONCE
from .candidates import Candidate, candidate_from_path
from .jobs import jobs_of
from .ratios import with_findings, with_speedups
from .rows import Row
from .samples import BatchFn, Samples
from .session import Counting, Scored, Session

if TYPE_CHECKING:
    import os

    from torch import nn

    from ..tasks.metrics import AnyMetric, MetricFn


@one_at_a_time
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
    the runtime can (OpenVINO, torch) and the processor has it, in bfloat16: rows of their own. Files whose weights alone are
    quantized are measured as they were trained and, in ONNX Runtime (4-bit weights of linear layers) and OpenVINO, with
    activations that the runtime rounds to 8 bits: rows of their own, "dynamic int8". The fastest integer row of a
    runtime that is not faster than floating point carries findings that say why, in that runtime. With an FP32 file and labels,
    rows say what they lose against it on the same samples.

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
    counted = Counting(reference, metric, metric_fn)
    counted.check(has_loader=loader is not None)
    say = progress or (lambda _: None)
    candidates = [model if isinstance(model, Candidate) else candidate_from_path(model) for model in models]
    jobs = jobs_of(candidates, runtimes, batch_sizes)
    candidates_in_words = f"{len(jobs)} candidate{'s' * (len(jobs) > 1)}"
    scored: Scored | None = None
    layers: list[tuple[int | None, int | None]] = []
    rows: list[Row] = []
    for count in threads:
        with Session(jobs, count) as session:
            layers = layers or session.count_layers()
            if scored is None and loader is None:
                reader, samples = session.random()
                scored = Scored(reader, samples, [{}] * len(jobs))
            elif scored is None and loader is not None:
                say(f"{counted.what} of {candidates_in_words}")
                reader = session.reader(_own_split(batch_fn))
                scored = session.score(reader, loader, counted, max([IMAGES_AT_ONCE, *batch_sizes]))
            assert scored is not None
            for batch in batch_sizes:
                say(f"latency of {candidates_in_words}, batch {batch}, {count} thread{'s' * (count > 1)}, interleaved")
                timed = session.time(scored.reader, _batches(scored.samples, batch), calls)
                rows += session.rows(timed, batch, scored.scores, layers, profile_layers)
    return with_findings(with_speedups(rows), [job.candidate for job in jobs] * (len(rows) // len(jobs)))


def _own_split(batch_fn: BatchFn | None) -> BatchFn | None:
    """None for the package's default, which knows networks; here files are known."""
    if batch_fn is None:
        return None
    from ..tasks.batches import default_batch

    return None if batch_fn is default_batch else batch_fn


def _batches(samples: Samples, batch: int) -> list[Samples]:
    pool = samples.repeated(batch)
    return [pool.rows(start, start + batch).contiguous() for start in range(0, pool.count - batch + 1, batch)]
