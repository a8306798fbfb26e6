"""Rows of one run against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..deploy.diagnosis import diagnose
from ..deploy.finding import Finding
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES
from .candidates import Candidate
from .census import census
from .rows import Row, baselines, fastest_integer_rows, rival


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Ratios within one run, over both of a row's baselines."""
    done = []
    for row in rows:
        same, best = (None if other is None else other.p50_ms / row.p50_ms for other in baselines(row, rows))
        done.append(replace(row, speedup=same, speedup_over_best_float=best))
    return done


def with_findings(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Row]:
    """Say at the fastest integer row of each setting and runtime why it is not faster than the float row to beat, if it is not.

    What was measured stands whatever happens here: a file that cannot be examined has a finding that says so.
    """
    done = list(rows)
    for row in fastest_integer_rows(rows):
        other, index = rival(row, rows), next(index for index, each in enumerate(rows) if each is row)
        candidate = candidates[index]
        if other is None or row.p50_ms < other.p50_ms:
            continue
        if row.runtime in FILE_RUNTIMES and candidate.existing.suffix == ".onnx":
            done[index] = replace(row, findings=tuple(_findings(candidate.existing, row.runtime)))
    return done


def _findings(path: Path, runtime: str) -> list[Finding]:
    try:
        return diagnose(path, census(path).float_layers if runtime == "onnxruntime" else (), runtime)
    except (QakdError, OSError) as error:
        return [Finding("not examined", (), f"Why it is not faster is not known, since its graph could not be read: {error}")]
