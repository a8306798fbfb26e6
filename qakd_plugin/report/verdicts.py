"""What the rows of a report mean, in sentences: which file to deploy and why, and where integers are slower than floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..bench.rows import Row, beaten, fastest_integer_rows, rival
from ..deploy.finding import Finding
from ..runtimes.base import DYNAMIC_INT8, MODULE_RUNTIMES

KEPT = 0.99
"""Share of FP32's metric that a file has to keep: the usual quality target of MLPerf Inference."""

ALIKE = 0.05
"""Latencies that differ by less are taken for equal: measurements repeat within a few percent."""

_KEPT = f"{100 * KEPT:.0f} %"

RULE = (
    f"Rule: of the files that keep {_KEPT} of FP32's result, the fastest; of those within {100 * ALIKE:.0f} % of its latency, "
    "the one with the best result."
)


@dataclass(frozen=True)
class Recommendation:
    """Which file of one setting to deploy.

    Attributes:
        row: the file in its runtime; None where the rows do not say.
        setting: "digits, batch 1, 1 thread".
        text: what it is, what it loses, how fast and how large it is; or what is known where that is not enough.
        why: the evidence, what speaks against it, what was refused, or what is missing.
        run: of the report's runs.
    """

    row: Row | None
    setting: str
    text: str
    why: str = ""
    run: int = 0


@dataclass(frozen=True)
class Verdict:
    """How the fastest integer row of a runtime compares with the float row that it has to beat.

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
    """What disturbed a measurement, integers that lose to floating point, and files that ran where they were not proven."""
    return [*_disturbances(rows), *_beaten(rows), *_not_proven(rows)]


def _beaten(rows: Sequence[Row]) -> list[str]:
    """By float row: the integer rows that are no faster, and why."""
    slow: dict[int, list[str]] = {}
    floats: dict[int, Row] = {}
    for row, other in beaten(rows):
        floats[id(other)] = other
        slow.setdefault(id(other), []).append(f"{_row(row)} ({row.p50_ms:.3f} ms; {_causes(row)})")
    return [
        f"{_setting(other)}: {_row(other)}, which is not quantized, takes {other.p50_ms:.3f} ms and is as fast as these or "
        f"faster: {', '.join(slow[id(other)])}."
        for other in floats.values()
    ]


def _causes(row: Row) -> str:
    """Kinds of findings with the layers they are of, in a few words."""
    said = []
    for finding in row.findings:
        more = len(finding.layers) - 1
        of = "" if not finding.layers else f": {finding.layers[0]}" + (f" and {more} more" if more else "")
        said.append(finding.kind + of)
    return ", ".join(said) or "no cause is known"


def _not_proven(rows: Sequence[Row]) -> list[str]:
    """By runtime: files written for another one, whose proof does not hold for the kernels of this one."""
    proofs: dict[str, Literal["fused", "openvino"]] = {"onnxruntime": "fused", "openvino": "openvino"}
    warnings = []
    for runtime, name in proofs.items():
        proven = {row.name: row.record.parity for row in rows if row.runtime == runtime and row.record is not None}
        missing = [row for row, parity in proven.items() if parity is not None and parity.get(name) is None]
        if missing:
            warnings.append(
                f"Not proven in {runtime}: {', '.join(missing)}. Written for another runtime, they may compute "
                f'something else in this one. Export with target="{runtime}".'
            )
    return warnings


def _disturbances(rows: Sequence[Row]) -> list[str]:
    found = [row.conditions for row in rows if row.conditions is not None and row.conditions.busy]
    if not found:
        return []
    others = max(conditions.other_cores for conditions in found)
    load = max((conditions.load_before or 0.0 for conditions in found), default=0.0)
    # Over less than a second what others used is not known, and the load of the minute before decided.
    used = f"other processes used up to {others:.1f} processor cores, and " if others >= 0.05 else ""
    return [
        f"The machine was busy: while {len(found)} of {len(rows)} rows were measured, {used}the load average before was up "
        f"to {load:.1f}. Ratios of one run were disturbed alike; take latencies, and ratios close to 1, with care. Accuracy is "
        "not affected."
    ]


def recommendations(rows: Sequence[Row]) -> list[Recommendation]:
    """One for each setting that has a quantized row."""
    quantized = [group for group in _settings(rows) if not all(row.is_float for row in group)]
    return [replace(_recommendation(group), run=group[0].run) for group in quantized]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One for each setting and runtime that has integer rows, where there is a float row to beat."""
    found = []
    for row in fastest_integer_rows(rows):
        other = rival(row, rows)
        if other is not None:
            found.append(_verdict(row, other))
    return found


def difference(row: Row) -> str:
    """What a row gains or loses, in words: "0.67 points less than FP32"; "" where that is not known."""
    if row.change is None:
        return ""
    if row.change.value == 0:
        return "as much as FP32"
    factor, form, unit = _unit(row)
    return f"{abs(factor * row.change.value):{form}}{unit} {'less' if row.change.value < 0 else 'more'} than FP32"


def evidence(row: Row) -> str:
    """How certain that is: "95 % interval of the difference -1.56 to +0.22, McNemar p = 0.25: no difference is shown"."""
    change, (factor, form, _) = row.change, _unit(row)
    if change is None or change.low is None or change.high is None:
        return ""
    text = f"95 % interval of the difference {factor * change.low:+{form}} to {factor * change.high:+{form}}"
    text += "" if change.p_value is None else f", McNemar p = {change.p_value:.2g}"
    if not change.excludes_zero:
        return f"{text}: no difference is shown"
    if row.metric is None or row.metric.higher_is_better is None:
        return text
    return f"{text}: a measurable {'loss' if _loss(row) > 0 else 'gain'}"


def _recommendation(rows: Sequence[Row]) -> Recommendation:
    """Of the rows of one setting."""
    setting = _setting(rows[0])
    files = [row for row in rows if row.runtime not in MODULE_RUNTIMES]
    fastest = min((row for row in files if not row.is_float), key=lambda row: row.p50_ms, default=None)
    if fastest is None:
        return Recommendation(None, setting, "No quantized file was measured.")
    judged = {id(row): kept for row in files if (kept := _keeps(row)) is not None}
    if not any(not row.is_float and id(row) in judged for row in files):
        text = f"The fastest quantized file is {_named(fastest)}, {fastest.p50_ms:.3f} ms, {_speed(fastest, rows)}."
        return Recommendation(None, setting, text, _missing(files))
    sound = [row for row in files if judged.get(id(row))]
    if not sound:  # FP32 was measured as a torch module, which is no file
        text = f"No file keeps {_KEPT} of FP32's result. The fastest is {_named(fastest)}: {_judged(fastest)}."
        return Recommendation(None, setting, text)
    quickest = min(sound, key=lambda row: row.p50_ms)
    near = [row for row in sound if row.p50_ms <= (1 + ALIKE) * quickest.p50_ms]
    best = max(near, key=lambda row: (0.0 if row.rank is None else row.rank, -row.p50_ms))
    text = f"{_named(best)}: {_result(best)}, {_speed(best, rows)}{_size(best)}."
    return Recommendation(best, setting, text, _why(best, fastest, files, judged))


def _why(best: Row, fastest: Row, files: Sequence[Row], judged: dict[int, bool]) -> str:
    """What a reader should know before deploying it."""
    said = [f"Against FP32 on the same {best.samples} samples: {evidence(best)}."] if evidence(best) else []
    if best.is_float:
        quantized = [row for row in files if not row.is_float]
        closest = max(quantized, key=lambda row: -math.inf if row.rank is None else row.rank)
        is_slow = any(judged.get(id(row)) for row in quantized)
        why = f"none that keeps {_KEPT} of FP32's result is faster" if is_slow else f"none keeps {_KEPT} of FP32's result"
        said.append(f"It is no quantized file: {why}. The closest is {_named(closest)}: {_judged(closest)}.")
    if fastest is not best and fastest.p50_ms * (1 + ALIKE) < best.p50_ms and judged.get(id(fastest)) is False:
        ratio = best.p50_ms / fastest.p50_ms
        said.append(f"{_named(fastest)} is {ratio:.2f} times as fast as that, and loses too much: {_judged(fastest)}.")
    return " ".join(said)


def _keeps(row: Row) -> bool | None:
    """Whether a row keeps enough of FP32's metric; None where that is not known."""
    metric = row.metric
    if metric is None or metric.higher_is_better is None:
        return None
    if row.change is None:
        return True if row.is_float and row.precision == "float32" else None
    return _loss(row) <= (1 - KEPT) * abs(metric.value - row.change.value)


def _loss(row: Row) -> float:
    """How much worse than FP32, in the metric's unit; negative where it is better."""
    assert row.change is not None
    assert row.metric is not None
    return -row.change.value if row.metric.higher_is_better else row.change.value


def _missing(files: Sequence[Row]) -> str:
    metric = next((row.metric for row in files if row.metric is not None), None)
    if metric is None:
        return "What it loses against FP32 is not known: measure with a loader that has labels."
    if metric.higher_is_better is None:
        return f"Which file is best is not known: {metric.name} does not say whether higher is better."
    if not any(row.is_float for row in files):
        return "What it loses, and whether it is faster than floating point, is not known: measure the FP32 file beside it."
    return "What it loses against FP32 on the same samples is not known: measure it and the FP32 file in one run."


def _result(row: Row) -> str:
    metric = row.metric
    if metric is None:
        return "its result is not known"
    text = metric.text if metric.kind == ("accuracy", "%") else f"{metric.name} {metric.text}"
    return f"{text}, {difference(row)}" if row.change is not None else text


def _judged(row: Row) -> str:
    return f"{_result(row)} ({evidence(row)})" if evidence(row) else _result(row)


def _unit(row: Row) -> tuple[float, str, str]:
    """Factor, format and name of the unit in which a row's change is told."""
    percent = row.metric is not None and row.metric.unit == "%"
    return (100.0, ".2f", " points") if percent else (1.0, ".4g", "")


def _speed(row: Row, rows: Sequence[Row]) -> str:
    floats = [other for other in rows if other.is_float and other is not row]
    other = min(floats, key=lambda each: each.p50_ms, default=None)
    if other is None:
        return "and no other float row was measured" if row.is_float else "and no float row was measured"
    ratio, name = other.p50_ms / row.p50_ms, f"{_row(other)} ({other.p50_ms:.3f} ms)"
    best = "the next float row" if row.is_float and row.p50_ms <= other.p50_ms else "the best float row"
    return f"{ratio:.2f} times as fast as {best}, {name}" if ratio > 1 else f"slower than {best}, {name}: {ratio:.2f}x"


def _size(row: Row) -> str:
    return "" if row.file_mib is None else f", {row.file_mib:.2f} MiB"


def _named(row: Row) -> str:
    """The file and what it is."""
    return f"{row.file}, {_row(row)}" if row.file else _row(row)


def _row(row: Row) -> str:
    return f"{row.name} in {row.runtime} {row.precision}"


def _settings(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[tuple[int, str, int, int], list[Row]] = {}
    for row in rows:
        found.setdefault(row.setting, []).append(row)
    return list(found.values())


def _setting(row: Row) -> str:
    start = f"{row.model}, batch" if row.model else "Batch"
    return f"{start} {row.batch}, {row.threads} thread{'s' * (row.threads > 1)}"


def _verdict(best: Row, baseline: Row) -> Verdict:
    faster = best.p50_ms < baseline.p50_ms
    ratio = baseline.p50_ms / best.p50_ms
    named = _row(best) if best.precision == DYNAMIC_INT8 else f"{best.name} in {best.runtime}"
    text = f"{_setting(best)}, {best.runtime}: its fastest integer row, {named} ({best.p50_ms:.3f} ms), is "
    where = "there" if baseline.runtime == best.runtime else "of any runtime"
    floating = f"the best float row {where}, {_row(baseline)} ({baseline.p50_ms:.3f} ms)"
    if faster:
        return Verdict(best, f"{text}{ratio:.2f} times as fast as {floating}{_and_loss(best)}.", True, ())
    text += f"not faster than {floating}: {ratio:.2f}x."
    if baseline.runtime != best.runtime and best.speedup is not None and best.speedup > 1:
        text += f" In {best.runtime} itself it is {best.speedup:.2f} times as fast as FP32."
    if best.integer_layers is not None and best.total_layers is not None:
        text += f" {best.integer_layers} of its {best.total_layers} convolutions and matrix products compute in integers."
    if not best.findings:
        text += " No cause that is known was found in its graph."
    return Verdict(best, text, False, best.findings)


def _and_loss(row: Row) -> str:
    return "" if row.change is None else f", and has {difference(row)} ({evidence(row) or 'without an interval'})"
