"""Rows of one run against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..deploy.diagnosis import diagnose
from .candidates import Candidate
from .census import census
from .record import Row
from .runners import FILE_RUNTIMES


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Ratios within one run: over the same runtime's FP32, and over the fastest float row of any runtime."""
    done = []
    for row in rows:
        floats = [other for other in rows if other.setting == row.setting and other.is_float]
        same = [o.p50_ms for o in floats if o.runtime == row.runtime and o.precision == "float32"]
        done.append(
            replace(
                row,
                speedup=same[0] / row.p50_ms if same else None,
                speedup_over_best_float=min(o.p50_ms for o in floats) / row.p50_ms if floats else None,
            )
        )
    return done


def with_findings(rows: Sequence[Row], candidates: Sequence[Candidate]) -> list[Row]:
    """Say at the best integer row of each setting why it is not faster than the best float row, where it is not."""
    done = list(rows)
    for setting in dict.fromkeys(row.setting for row in rows):
        integer = [index for index, row in enumerate(rows) if row.setting == setting and not row.is_float]
        best = min(integer, key=lambda index: rows[index].p50_ms, default=None)
        if best is None or (rows[best].speedup_over_best_float or math.inf) > 1:
            continue
        candidate = candidates[best]
        if rows[best].runtime in FILE_RUNTIMES and candidate.existing.suffix == ".onnx":
            left = census(candidate.existing).float_layers if rows[best].runtime == "onnxruntime" else ()
            done[best] = replace(rows[best], findings=tuple(diagnose(candidate.existing, left)))
    return done
