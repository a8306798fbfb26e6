"""What each row gains or loses against FP32: both are judged on the same samples, so that what is hard for both cancels out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .accuracy import Tally
from .jobs import Job
from .rows import Change


def with_changes(jobs: Sequence[Job], tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """The fields of each job's rows, with ``change`` where the model has an FP32 file or module and something was counted.

    Args:
        jobs: that were scored.
        tallies: of each, filled in by the same samples.
    """
    scores = [tally.score() for tally in tallies]
    return [{**score, "change": _change(index, jobs, tallies, scores)} for index, score in enumerate(scores)]


def _change(index: int, jobs: Sequence[Job], tallies: Sequence[Tally], scores: Sequence[dict[str, Any]]) -> Change | None:
    baseline = _baseline(index, jobs, scores)
    if baseline is None or baseline == index:
        return None
    for mine, others in zip(tallies[index].counts, tallies[baseline].counts, strict=True):
        found = mine.change(others)
        if found is not None:
            return Change(*found, f"{jobs[baseline].candidate.label} in {jobs[baseline].runtime}")
    return None


def _baseline(index: int, jobs: Sequence[Job], scores: Sequence[dict[str, Any]]) -> int | None:
    """The best FP32 job of the same model and runtime, or of any runtime."""
    own = jobs[index]
    fp32 = [
        other
        for other, job in enumerate(jobs)
        if job.candidate.weight_bits == 32 and job.precision == "float32" and job.candidate.model == own.candidate.model
    ]
    same = [other for other in fp32 if jobs[other].runtime == own.runtime]
    return max(same or fp32, key=lambda other: _worth(scores[other]), default=None)


def _worth(score: dict[str, Any]) -> float:
    """Larger is better; of a metric without a direction all are worth the same."""
    if not score.get("metrics"):
        return float(score.get("accuracy", 0.0))
    first = score["metrics"][0]
    return 0.0 if first.higher_is_better is None else first.value if first.higher_is_better else -first.value
