"""Rows of one run against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..deploy.diagnosis import diagnose
from ..deploy.finding import Finding
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES
from .candidates import Candidate
from .census import census
from .rows import Row, baselines, beaten


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Ratios within one run, over both of a row's baselines."""
    done = []
    for row in rows:
        same, best = (None if other is None else other.p50_ms / row.p50_ms for other in baselines(row, rows))
        done.append(replace(row, speedup=same, speedup_over_best_float=best))
    return done


def with_findings(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Row]:
    """Say at each integer row why it is not faster than the float row to beat, if it is not.

    What was measured stands whatever happens here: a file that cannot be examined has a finding that says so.
    """
    slow = {id(row) for row, _ in beaten(rows)}
    examined = cache(_findings)  # a file has a row for each batch and number of threads
    return [
        replace(row, findings=tuple(examined(candidate.existing, row.runtime)))
        if id(row) in slow and row.runtime in FILE_RUNTIMES and candidate.existing.suffix == ".onnx"
        else row
        for row, candidate in zip(rows, candidates, strict=True)
    ]


def _findings(path: Path, runtime: str) -> list[Finding]:
    try:
        return diagnose(path, census(path).float_layers if runtime == "onnxruntime" else (), runtime)
    except (QakdError, OSError) as error:
        return [Finding("not examined", (), f"Why it is not faster is not known, since its graph could not be read: {error}")]
