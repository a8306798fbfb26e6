"""The columns of a report, what stands in them, and rows side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._common.console import cell
from ..bench.rows import MetricValue, OutputAgreement, Row, baselines
from ..deploy.file_record import UNTRAINED
from .histories import trained_by, training_text, way
from .scatter import pareto

Value = str | int | float | None
_LONGEST = 120


@dataclass(frozen=True)
class Column:
    """One figure of a row.

    Attributes:
        heading: short.
        meaning: for those who do not know it.
        value: to sort by.
        text: to read.
        descending: whether the best value is the largest, so that it is sorted that way first.
    """

    heading: str
    meaning: str
    value: Callable[[Row], Value]
    text: Callable[[Row], str]
    descending: bool = False

    def is_numeric(self, rows: Sequence[Row]) -> bool:
        """Whether its values are numbers."""
        return not any(isinstance(self.value(row), str) for row in rows)


def _number(
    heading: str,
    meaning: str,
    value: Callable[[Row], float | None],
    form: str,
    factor: float = 1.0,
    *,
    descending: bool = False,
) -> Column:
    def text(row: Row) -> str:
        found = value(row)
        return "-" if found is None else format(int(found) if form == "d" else found * factor, form)

    return Column(heading, meaning, value, text, descending)


def _text(heading: str, meaning: str, value: Callable[[Row], str]) -> Column:
    return Column(heading, meaning, value, value)


def _interval(row: Row) -> str:
    if row.accuracy_low is None or row.accuracy_high is None:
        return "-"
    return f"{100 * row.accuracy_low:.1f} to {100 * row.accuracy_high:.1f}"


def _share(row: Row) -> float | None:
    return None if not row.total_layers or row.integer_layers is None else row.integer_layers / row.total_layers


ROW = _text("row", "method, bits of weights and activations, and the toolkit that prepared it", lambda row: row.name)
MODEL = _text("model", "name of the network", lambda row: row.model)
RUNTIME = _text("runtime", "runtime, and what it computes in", lambda row: f"{row.runtime} {row.precision}")
BATCH = _number("batch", "images per call", lambda row: row.batch, "d", 1)
THREADS = _number("threads", "threads of the runtime", lambda row: row.threads, "d", 1)
ACCURACY = _number(
    "accuracy %", "top-1 of the deployed file, through the runtime", lambda row: row.accuracy, ".2f", 100, descending=True
)
INTERVAL = Column("95 % interval", "of the accuracy (Wilson)", lambda row: row.accuracy_low, _interval)
P50 = _number("p50 ms", "median latency of a call", lambda row: row.p50_ms, ".3f")
P90 = _number("p90 ms", "90th percentile; needs 64 calls", lambda row: row.p90_ms, ".3f")
THROUGHPUT = _number("images/s", "at the median latency", lambda row: row.throughput, ",.0f")
SPEEDUP = _number(
    "x FP32", "median latency of the same runtime's fastest FP32 row over this one, same run", lambda row: row.speedup, ".2f"
)
INTEGER = Column(
    "int layers",
    "convolutions and matrix products that the runtime computes in integers, of all",
    _share,
    lambda row: "-" if row.total_layers is None else f"{row.integer_layers}/{row.total_layers}",
)
FILE = _number("MiB", "size of the file", lambda row: row.file_mib, ".2f")
BEST_FLOAT = _number(
    "x best float",
    "median latency of the fastest float row of any runtime over this one, same run",
    lambda row: row.speedup_over_best_float,
    ".2f",
)
TRAINING = _text("training", "what the file's record says: by what it was trained, and for how long", training_text)
IDENTITY = (RUNTIME, MODEL, BATCH, THREADS)
COLUMNS = (
    TRAINING,
    _number("agree %", "share of images with the label that the trained model gives", lambda row: row.agreement, ".2f", 100),
    _number("SQNR dB", "logits against the trained model's", lambda row: row.sqnr_db, ".1f"),
    P90,
    _number("p99 ms", "99th percentile; needs 662 calls", lambda row: row.p99_ms, ".3f"),
    _number("CPU ms", "median processor time of a call, all threads", lambda row: row.cpu_ms, ".3f"),
    THROUGHPUT,
    SPEEDUP,
    INTEGER,
    _number("load ms", "time to load the file", lambda row: row.load_ms, ",.0f"),
    _number(
        "peak MiB",
        "largest resident memory of a process that only loads and runs the file",
        lambda row: row.peak_rss_mib,
        ",.0f",
    ),
    _number("upload ms", "copy to the GPU", lambda row: row.upload_ms, ".3f"),
    _number("compute ms", "on the GPU", lambda row: row.compute_ms, ".3f"),
    _number("download ms", "copy back", lambda row: row.download_ms, ".3f"),
    _number("calls", "timed calls", lambda row: row.calls, "d", 1),
)
_CONSTANTS = (MODEL, BATCH, THREADS)
_LONGEST_NAME = 40


def change_columns(rows: Sequence[Row]) -> list[Column]:
    """What rows lose against FP32, and the interval of that."""
    shares = all(row.metric is None or row.metric.unit == "%" for row in rows)
    factor, form, what = (100.0, ".2f", "points to FP32") if shares else (1.0, ".4g", "to FP32")

    def change(row: Row) -> float | None:
        return None if row.change is None else row.change.value

    def text(row: Row) -> str:
        found = change(row)
        return "-" if found is None else f"{factor * found:+{form}}" if found else "0"

    def low(row: Row) -> float | None:
        return None if row.change is None else row.change.low

    def interval(row: Row) -> str:
        if row.change is None or row.change.low is None or row.change.high is None:
            return "-"
        return f"{factor * row.change.low:+{form}} to {factor * row.change.high:+{form}}"

    falling = all(row.metric is None or row.metric.higher_is_better is not False for row in rows)
    return [
        Column(what, "against FP32 on the same samples, in the same runtime where it was measured", change, text, falling),
        Column(f"95 % of {what}", "interval of the paired difference (Tango, or paired bootstrap)", low, interval),
    ]


def metric_columns(rows: Sequence[Row]) -> list[Column]:
    """Two columns for each number of the rows' metrics: its value, and its interval."""
    kinds: dict[tuple[str, str], MetricValue] = {}
    for value in (value for row in rows for value in row.metrics):
        kinds.setdefault(value.kind, value)
    return [column for first in kinds.values() for column in _columns_of(first)]


def _columns_of(first: MetricValue) -> list[Column]:
    name, factor = short(first.name, _LONGEST_NAME), 100.0 if first.unit == "%" else 1.0
    better = {True: "; higher is better", False: "; lower is better", None: ""}[first.higher_is_better]
    heading = f"{name} {first.unit}".strip()

    def found(row: Row) -> MetricValue | None:
        return next((value for value in row.metrics if value.kind == first.kind), None)

    def number(row: Row) -> float | None:
        value = found(row)
        return None if value is None else value.value

    def low(row: Row) -> float | None:
        value = found(row)
        return None if value is None else value.low

    def interval(row: Row) -> str:
        value = found(row)
        if value is None or value.low is None or value.high is None:
            return "-"
        return f"{factor * value.low:.4g} to {factor * value.high:.4g}"

    meaning = f"{name} of the deployed file, through the runtime{better}"
    return [
        _number(heading, meaning, number, ".4g", factor, descending=first.higher_is_better is True),
        Column(f"95 % of {name}", f"interval of {name} (percentile bootstrap over samples)", low, interval),
    ]


def _output_columns(rows: Sequence[Row]) -> list[Column]:
    """Agreement and SQNR of each of several outputs."""
    names = dict.fromkeys(found.output for row in rows for found in row.outputs)
    return [column for name in names for column in _columns_of_output(name)]


def _columns_of_output(name: str) -> list[Column]:
    def found(row: Row) -> OutputAgreement | None:
        return next((found for found in row.outputs if found.output == name), None)

    def agreement(row: Row) -> float | None:
        compared = found(row)
        return None if compared is None else compared.agreement

    def sqnr_db(row: Row) -> float | None:
        compared = found(row)
        return None if compared is None else compared.sqnr_db

    shown = short(name, _LONGEST_NAME)
    return [
        _number(f"agree % {shown}", f"share of labels of {shown} that are the trained model's", agreement, ".2f", 100),
        _number(f"SQNR dB {shown}", f"{shown} against the trained model's", sqnr_db, ".1f"),
    ]


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """Columns in which something stands, without those that say the same of all rows and are told in one line above. What a
    file is chosen by comes first, so that a narrow screen shows it."""
    metrics, (to_fp32, its_interval) = metric_columns(rows), change_columns(rows)
    columns = [ROW, ACCURACY, *metrics[::2], to_fp32, P50, BEST_FLOAT, FILE, *IDENTITY]
    columns += [INTERVAL, *metrics[1::2], its_interval, *COLUMNS, *_output_columns(rows)]
    shown = []
    for column in columns:
        values = {column.value(row) for row in rows}
        constant = column in _CONSTANTS or column.heading == "calls"
        recorded = column is not TRAINING or any(row.record is not None for row in rows)
        if values - {None} and recorded and not (constant and len(values) == 1):
            shown.append(column)
    return shown


def common_setting(rows: Sequence[Row]) -> str:
    """What all rows share, in one line: "digits, batch 1, 1 thread, 300 calls each"."""
    parts = []
    for name, single, several in (("model", "{}", ""), ("batch", "batch {}", ""), ("threads", "{} thread", "{} threads")):
        values = {getattr(row, name) for row in rows}
        if len(values) == 1 and (value := values.pop()) != "":
            parts.append((several if several and value != 1 else single).format(value))
    calls = {row.calls for row in rows}
    return ", ".join([*parts, f"{calls.pop()} calls each"] if len(calls) == 1 else parts)


def family(row: Row) -> str:
    """ "float", "ptq", "qat", "distilled", or "unknown": by the file's record, never by its name."""
    method = trained_by(row)
    if row.is_float:
        return "float"
    return {None: "unknown", "": "ptq", "QAT": "qat"}.get(method, "distilled")


def families(rows: Sequence[Row]) -> dict[str, str]:
    """Those that rows belong to, in words."""
    found = {family(row) for row in rows}
    distilled = sorted({method for row in rows if family(row) == "distilled" and (method := trained_by(row))})
    words = {
        "float": "floating point",
        "ptq": f"calibrated, {UNTRAINED}",
        "qat": "QAT",
        "distilled": short(" or ".join(distilled), 60),
        "unknown": "training not known",
    }
    return {name: text for name, text in words.items() if name in found}


def short(text: object, longest: int = _LONGEST) -> str:
    """Text from outside on one line, cut where it is too long to be read."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text)).split())
    return line if len(line) <= longest else line[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def run_names(document: Mapping[str, Any]) -> list[str]:
    """A name for each run: its processor, numbered where there are several runs."""
    names = [short(run["environment"].get("cpu", "unknown processor"), 60) for run in document["runs"]]
    return names if len(names) == 1 else [f"{index}: {name}" for index, name in enumerate(names, 1)]


@dataclass(frozen=True)
class SideBySide:
    """One line per configuration, one column per way it came about: FP32, best float, calibrated, QAT, and distilled ones.

    Attributes:
        methods: names of the columns after the two of floating point.
        lines: (run, what it is as in ``CONFIGURATION``, a row or None per column).
    """

    methods: tuple[str, ...]
    lines: tuple[tuple[int, tuple[str, ...], tuple[Row | None, ...]], ...]

    @property
    def distinguishing(self) -> tuple[int, ...]:
        """Places of ``CONFIGURATION`` that tell the lines apart; the bits always do."""
        varied = [index for index in range(len(CONFIGURATION)) if len({what[index] for _, what, _ in self.lines}) > 1]
        return tuple(sorted({CONFIGURATION.index("bits"), *varied}))


CONFIGURATION = ("model", "bits", "toolkit", "runtime", "batch", "threads")


def side_by_side(rows: Sequence[Row]) -> SideBySide | None:
    """FP32, the best float row, PTQ, QAT and QAT with distillation beside each other; None without quantized rows.

    FP32 is the fastest of the same runtime, the best float row the fastest of any; where several rows belong in one place, the
    best one by its metric (the fastest one, where there is none) stands there.
    """
    quantized = [row for row in rows if not row.is_float]
    if not quantized:
        return None
    rank = {"PTQ": 0, UNTRAINED: 0, "QAT": 1}
    methods = tuple(sorted(dict.fromkeys(map(way, quantized)), key=lambda name: rank.get(name, 2)))
    floats = [row for row in rows if row.is_float]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in quantized:
        groups.setdefault((*row.setting, row.runtime, row.toolkit or "", -row.weight_bits, -row.activation_bits), []).append(
            row
        )
    lines = []
    for group in groups.values():
        first = group[0]
        cells = [max((row for row in group if way(row) == name), key=_preference, default=None) for name in methods]
        lines.append((first.run, _what(first), (*baselines(first, floats), *cells)))
    return SideBySide(methods, tuple(lines))


def _preference(row: Row) -> tuple[float, float]:
    return -math.inf if row.rank is None else row.rank, -row.p50_ms


def _what(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        f"W{row.weight_bits}A{row.activation_bits}",
        row.toolkit or "",
        row.runtime,
        str(row.batch),
        str(row.threads),
    )


def console_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The report's table for a terminal of 80 columns: what tells the rows apart, and the figures that matter most."""
    table = Table(title=title and cell(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    several = {column: len({column.value(row) for row in rows}) > 1 for column in (MODEL, RUNTIME, BATCH, THREADS)}
    counted = metric_columns(rows)[:1] or [ACCURACY]
    if any(row.change is not None for row in rows):
        counted = [*counted, change_columns(rows)[0]]
    wanted = [ROW, *(column for column, varies in several.items() if varies), *counted, P50, SPEEDUP, INTEGER]
    table.add_column("", no_wrap=True, min_width=1)
    cells = [[short(column.text(row), 60) for column in wanted] for row in rows]
    for index, column in enumerate(wanted):
        numeric, longest = column.is_numeric(rows), max((len(line[index]) for line in cells), default=1)
        heading = "top-1 %" if column is ACCURACY else column.heading
        word = max(map(len, heading.split()))
        # Where the terminal is narrow, headings take two lines, then long names do; figures are never cut.
        table.add_column(
            cell(heading),
            justify="right" if numeric else "left",
            no_wrap=not numeric and longest <= 24,
            min_width=max(longest, word) if numeric else None,
        )
    for line, best in zip(cells, pareto(rows), strict=True):
        table.add_row("*" if best else "", *map(cell, line))
    return table
