"""Rows of one run against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..deploy.diagnosis import diagnose
from ..deploy.finding import Finding
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES
from .candidates import Candidate
from .census import census
from .rows import Row, baselines


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Ratios within one run, over both of a row's baselines."""
    done = []
    for row in rows:
        same, best = (None if other is None else other.p50_ms / row.p50_ms for other in baselines(row, rows))
        done.append(replace(row, speedup=same, speedup_over_best_float=best))
    return done


def with_findings(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Row]:
    """Say at the best integer row of each setting why it is not faster than the best float row, where it is not.

    What was measured stands whatever happens here: a file that cannot be examined has a finding that says so.
    """
    done = list(rows)
    for setting in dict.fromkeys(row.setting for row in rows):
        integer = [index for index, row in enumerate(rows) if row.setting == setting and not row.is_float]
        best = min(integer, key=lambda index: rows[index].p50_ms, default=None)
        if best is None or (rows[best].speedup_over_best_float or math.inf) > 1:
            continue
        candidate = candidates[best]
        if rows[best].runtime in FILE_RUNTIMES and candidate.existing.suffix == ".onnx":
            done[best] = replace(rows[best], findings=tuple(_findings(candidate.existing, rows[best].runtime)))
    return done


def _findings(path: Path, runtime: str) -> list[Finding]:
    try:
        return diagnose(path, census(path).float_layers if runtime == "onnxruntime" else ())
    except (QakdError, OSError) as error:
        return [Finding("not examined", (), f"Why it is not faster is not known, since its graph could not be read: {error}")]
