"""What the demo's measured files show: one table, and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..bench.rows import Row

WAYS = {"PTQ": "calibrated only", "QAT": "QAT, with labels", "SQAKD": "SQAKD, no labels"}


def first_table(rows: Sequence[Row]) -> Table:
    """Accuracy with its interval for each number of bits and each way there, and latency, of one runtime's files."""
    floats = [row for row in rows if row.is_float and row.runtime == rows[0].runtime]
    title = f"Top-1 of {floats[0].samples} test images, % [95 % interval], and latency in {floats[0].runtime}"
    table = Table("", *WAYS.values(), "p50 ms", "x FP32", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_row("FP32", _score(floats[0]), "", "", f"{floats[0].p50_ms:.3f}", "1.00")
    for bits, found in _by_bits(rows).items():
        fastest = min(found.values(), key=lambda row: row.p50_ms)
        cells = [_score(found[way]) if way in found else "" for way in WAYS]
        table.add_row(bits, *cells, f"{fastest.p50_ms:.3f}", "" if fastest.speedup is None else f"{fastest.speedup:.2f}")
    return table


def winners(rows: Sequence[Row]) -> list[str]:
    """A sentence for each number of bits at which labels and no labels were tried: what won, and whether the intervals part."""
    sentences = []
    for bits, found in _by_bits(rows).items():
        if set(found) != set(WAYS):
            continue
        calibrated, *trained = (found[way] for way in WAYS)
        worse, better = sorted(trained, key=_accuracy)
        sentence = f"{bits}: calibration alone reaches {_score(calibrated)} %"
        if _parted(calibrated, worse):
            sentence += (
                f", and both ways of training more: {better.method} {_score(better)} %, {worse.method} {_score(worse)} %"
            )
        else:
            sentence += f", {better.method} {_score(better)} %, {worse.method} {_score(worse)} %"
        told = (
            f"{better.method} won, and the intervals part"
            if _parted(worse, better)
            else ("the intervals of the two overlap, so neither has won")
        )
        sentences.append(f"{sentence}; {told}. SQAKD read no label.")
    return sentences


def conclusions(rows: list[Row]) -> list[str]:
    """What the measured files show, in sentences."""
    notes = winners(rows)
    for runtime in dict.fromkeys(row.runtime for row in rows):
        integer = [row for row in rows if row.runtime == runtime and not row.is_float]
        if all(row.integer_layers == row.total_layers for row in integer):
            notes.append(f"Every convolution and linear layer of every quantized file runs on an integer kernel in {runtime}.")
        else:
            names = [row.name for row in integer if row.integer_layers != row.total_layers]
            notes.append(f"Some layers stay in floating point in {runtime}: {', '.join(names)}.")
        speedups = [row.speedup for row in integer if row.speedup is not None]
        if speedups:
            notes.append(
                f"In {runtime} quantized files are {min(speedups):.2f} to {max(speedups):.2f} times as fast as FP32 there."
            )
    notes.append(
        "Files of two and three bits compute exactly what was trained, in 8-bit kernels: the runtimes here compute in 8 "
        "bits at least, so they are as fast as 8-bit files, not faster."
    )
    notes.append("A loss against FP32 whose interval reaches 0 is no evidence: the test split has a few hundred images.")
    return notes


def _by_bits(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Quantized rows of the first row's runtime by their bits, then by method."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if not row.is_float and row.runtime == rows[0].runtime:
            found.setdefault(f"W{row.weight_bits}A{row.activation_bits}", {})[row.method] = row
    return found


def _accuracy(row: Row) -> float:
    return row.accuracy or 0.0


def _parted(low: Row, high: Row) -> bool:
    return (low.accuracy_high or 0.0) < (high.accuracy_low or 0.0)


def _score(row: Row) -> str:
    if row.accuracy is None or row.accuracy_low is None or row.accuracy_high is None:
        return "not counted"
    return f"{100 * row.accuracy:.1f} [{100 * row.accuracy_low:.1f}, {100 * row.accuracy_high:.1f}]"
