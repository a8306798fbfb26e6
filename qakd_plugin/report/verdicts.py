"""What the rows of a report mean, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.rows import Row
from ..deploy.finding import Finding


@dataclass(frozen=True)
class Verdict:
    """How the best integer row of one setting compares with the best float row.

    Attributes:
        row: the integer row.
        text: the comparison.
        is_faster: whether the integer row is.
        findings: why not, where it is not.
    """

    row: Row
    text: str
    is_faster: bool
    findings: tuple[Finding, ...]


def warnings_of(rows: Sequence[Row]) -> list[str]:
    """What disturbed a measurement."""
    found = [row.conditions for row in rows if row.conditions is not None and row.conditions.busy]
    if not found:
        return []
    others = max(conditions.other_cores for conditions in found)
    load = max((conditions.load_before or 0.0 for conditions in found), default=0.0)
    return [
        f"The machine was busy: while {len(found)} of {len(rows)} rows were measured, other processes used up to {others:.1f} "
        f"processor cores, and the load average before was up to {load:.1f}. Ratios of one run were disturbed alike; take "
        "latencies, and ratios close to 1, with care. Accuracy is not affected."
    ]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One for each setting that has integer and float rows."""
    settings: dict[tuple[int, str, int, int], list[Row]] = {}
    for row in rows:
        settings.setdefault(row.setting, []).append(row)
    found = []
    for setting in settings.values():
        integer = [row for row in setting if not row.is_float]
        floating = [row for row in setting if row.is_float]
        if integer and floating:
            best, baseline = (min(group, key=lambda row: row.p50_ms) for group in (integer, floating))
            found.append(_verdict(best, baseline))
    return found


def _verdict(best: Row, baseline: Row) -> Verdict:
    faster = best.p50_ms < baseline.p50_ms
    ratio = baseline.p50_ms / best.p50_ms
    start = f"{best.model}, batch" if best.model else "Batch"
    text = (
        f"{start} {best.batch}, {best.threads} thread{'s' * (best.threads > 1)}: the fastest integer row, {best.name} in "
        f"{best.runtime} ({best.p50_ms:.3f} ms), is "
    )
    floating = f"the best float row, {baseline.name} in {baseline.runtime} {baseline.precision} ({baseline.p50_ms:.3f} ms)"
    if faster:
        return Verdict(best, f"{text}{ratio:.2f} times as fast as {floating}.", True, ())
    text += f"not faster than {floating}: {ratio:.2f}x."
    if best.integer_layers is not None and best.total_layers is not None:
        text += f" {best.integer_layers} of its {best.total_layers} convolutions and matrix products compute in integers."
    if not best.findings:
        text += " No cause that is known was found in its graph."
    return Verdict(best, text, False, best.findings)
