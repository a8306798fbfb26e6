"""One row of a report: a file in a runtime, measured.

The bounds of its fields are those that a report is checked with (:mod:`.schema`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from .._common.training_record import TrainingRecord
from ..deploy.file_record import FileRecord
from ..deploy.finding import Finding
from ..runtimes.base import LayerTime as LayerTime
from ..runtimes.host import Conditions as Conditions

Bits = Annotated[int, Ge(1), Le(32)]
Count = Annotated[int, Ge(0), Le(2**31)]
Positive = Annotated[int, Ge(1), Le(2**31)]
Milliseconds = Annotated[float, Ge(0), Le(1e9)]
Mebibytes = Annotated[float, Ge(0), Le(1e9)]
Share = Annotated[float, Ge(0), Le(1)]
Ratio = Annotated[float, Ge(0), Le(1e16)]
Decibels = Annotated[float, Ge(-1e4), Le(1e4)]
Finite = Annotated[float, Ge(-1e300), Le(1e300)]


@dataclass(frozen=True)
class MetricValue:
    """One number that a metric counted through the runtime.

    Attributes:
        name: "multiclass_f1_score", "map_50".
        value: as the metric computes it.
        low: lower end of its 95 % interval; None where there is none.
        high: upper end.
        higher_is_better: None where the metric does not say.
        unit: "%": the value is a share, and is shown in percent; "" where none is known.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = None
    unit: Literal["", "%"] = ""

    @property
    def kind(self) -> tuple[str, str]:
        """What values must share to be compared: name and unit. A user's "accuracy" need not be top-1 in percent."""
        return self.name, self.unit

    @property
    def text(self) -> str:
        """To read."""
        return f"{100 * self.value:.2f} %" if self.unit == "%" else f"{self.value:.4g}"


@dataclass(frozen=True)
class Change:
    """What a row gains or loses against FP32, counted on the same samples.

    FP32 is the best FP32 row of the same model in the same runtime; where none was measured there, in any runtime.

    Attributes:
        value: the row's metric less that of FP32; of accuracy, a share.
        low: lower end of the 95 % interval of this paired difference; None where there is none.
        high: upper end.
        p_value: of accuracy: that of McNemar's exact test.
        baseline: the file of FP32 and its runtime.
    """

    value: Finite
    low: Finite | None
    high: Finite | None
    p_value: Share | None
    baseline: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class OutputAgreement:
    """One of several outputs against the trained model's.

    Attributes:
        output: its name.
        agreement: share of labels that are the same; None of what holds none.
        sqnr_db: None of outputs that are equal.
    """

    output: str
    agreement: Share | None
    sqnr_db: Decibels | None


@dataclass(frozen=True)
class Row:
    """A file in a runtime, measured.

    Attributes:
        model: what it is called, "digits"; "" for files given by their paths alone.
        method: how it came about: "FP32", "PTQ", "QAT", "SQAKD".
        toolkit: that prepared it; None for float models.
        weight_bits: of its inner layers; 32 for float.
        activation_bits: likewise.
        runtime: "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch", "torch.compile".
        precision: what it computes in: "float32", "float16", "bfloat16", "int8"; that of the file's floating point where its
            weights alone are quantized, or "dynamic int8" where the runtime rounds activations that nobody trained so.
        batch: images per call.
        threads: of the runtime.
        calls: timed calls.
        p50_ms: median latency of a call.
        p90_ms: None with fewer than 64 calls.
        p99_ms: None with fewer than 662 calls.
        cpu_ms: median processor time of a call.
        throughput: images per second at the median.
        load_ms: time to load the file; None for a torch module.
        file_mib: size of the file and its external data; None for a torch module.
        accuracy: top-1 of the deployed file through the runtime.
        accuracy_low: lower end of its 95 % interval (Wilson).
        accuracy_high: upper end.
        metrics: numbers of the metric that was counted in place of accuracy; the first one decides.
        samples: that accuracy or metric was counted on.
        agreement: share of labels that are those of the reference; of the output called "logits" where there are several.
        sqnr_db: against the reference, likewise.
        outputs: agreement of each output, where several were compared.
        integer_layers: convolutions and matrix products that the runtime computes in integers.
        total_layers: all of them.
        speedup: over the fastest FP32 row of the same runtime, model, batch and threads, in the same run.
        speedup_over_best_float: likewise over the fastest float row, in whatever runtime.
        upload_ms: median time of the copy to the GPU; None without one. ``p50_ms`` includes all three parts.
        compute_ms: median time on the GPU.
        download_ms: median time of the copy back.
        peak_rss_mib: largest resident memory of a process of its own that loads the file and runs ten calls, Python and the
            runtime's library included; Linux only, None for torch modules and engines.
        run: which of a report's runs it belongs to; ratios hold within one run only.
        conditions: how quiet the machine was.
        findings: of an integer row that is no faster than :func:`rival`: why, in this runtime.
        layers: time of each layer, on request.
        file: name of the file, without its folder; "" for a torch module.
        change: of its metric against FP32; None for FP32 itself, and without FP32 or a metric.
        record: what the file says of how it was prepared and trained, and what was proven; None where it does not.
    """

    model: str
    method: str
    toolkit: str | None
    weight_bits: Bits
    activation_bits: Bits
    runtime: str
    precision: str
    batch: Positive
    threads: Positive
    calls: Positive
    p50_ms: Annotated[float, Ge(1e-6), Le(1e9)]
    p90_ms: Milliseconds | None
    p99_ms: Milliseconds | None
    cpu_ms: Milliseconds
    throughput: Annotated[float, Gt(0), Le(1e18)]
    load_ms: Milliseconds | None
    file_mib: Annotated[float, Gt(0), Le(1e9)] | None
    accuracy: Share | None = None
    accuracy_low: Share | None = None
    accuracy_high: Share | None = None
    samples: Count = 0
    agreement: Share | None = None
    sqnr_db: Decibels | None = None
    integer_layers: Count | None = None
    total_layers: Count | None = None
    speedup: Ratio | None = None
    speedup_over_best_float: Ratio | None = None
    upload_ms: Milliseconds | None = None
    compute_ms: Milliseconds | None = None
    download_ms: Milliseconds | None = None
    peak_rss_mib: Mebibytes | None = None
    run: Count = 0
    conditions: Conditions | None = None
    findings: tuple[Finding, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    metrics: tuple[MetricValue, ...] = ()
    outputs: tuple[OutputAgreement, ...] = ()
    file: str = ""
    change: Change | None = None
    record: FileRecord | None = field(default=None, repr=False, hash=False)

    @property
    def metric(self) -> MetricValue | None:
        """What rows are ranked by: the first number of the metric, or accuracy."""
        if self.metrics:
            return self.metrics[0]
        if self.accuracy is None:
            return None
        return MetricValue("accuracy", self.accuracy, self.accuracy_low, self.accuracy_high, higher_is_better=True, unit="%")

    @property
    def rank(self) -> float | None:
        """Larger is better: the metric in its own direction; None where there is none, or it has no direction."""
        found = self.metric
        if found is None or found.higher_is_better is None:
            return None
        return found.value if found.higher_is_better else -found.value

    @property
    def name(self) -> str:
        """Short label: what tells it from other rows of a report."""
        bits = "" if self.weight_bits == 32 else f" W{self.weight_bits}A{self.activation_bits}"
        origin = "" if self.toolkit is None else f" ({self.toolkit})"
        return f"{self.method}{bits}{origin}"

    @property
    def is_float(self) -> bool:
        """Whether nothing in it is quantized."""
        return self.weight_bits == 32

    @property
    def setting(self) -> tuple[int, str, int, int]:
        """What rows must share to be compared: run, model, batch and threads."""
        return self.run, self.model, self.batch, self.threads

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the schema has it."""
        return {name: _listed(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The row of plain data that fits the schema."""
        values = dict(data)
        if values.get("conditions") is not None:
            values["conditions"] = Conditions(**values["conditions"])
        values["findings"] = tuple(
            Finding(entry["kind"], tuple(entry["layers"]), entry["advice"]) for entry in values.get("findings", ())
        )
        for name, kind in (("layers", LayerTime), ("metrics", MetricValue), ("outputs", OutputAgreement)):
            values[name] = tuple(kind(**entry) for entry in values.get(name, ()))
        if values.get("change") is not None:
            values["change"] = Change(**values["change"])
        if values.get("record") is not None:
            values["record"] = _record(values["record"])
        return cls(**values)


def _record(data: Mapping[str, Any]) -> FileRecord:
    trained = (TrainingRecord(**{**entry, "history": tuple(entry.get("history", ()))}) for entry in data.get("training", ()))
    return FileRecord(**{**data, "training": tuple(trained)})


def _listed(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def baselines(row: Row, rows: Iterable[Row]) -> tuple[Row | None, Row | None]:
    """What a row is compared with: its runtime's fastest FP32 row, and the fastest float row of any runtime.

    Args:
        row: of one setting.
        rows: those of another setting do not count.
    """
    floats = [other for other in rows if other.is_float and other.setting == row.setting]
    same = [other for other in floats if other.runtime == row.runtime and other.precision == "float32"]
    fp32, best = (min(group, key=lambda other: other.p50_ms, default=None) for group in (same, floats))
    return fp32, best


def fastest_integer_rows(rows: Iterable[Row]) -> list[Row]:
    """Of each setting and runtime, in their order."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (*row.setting, row.runtime)
        if not row.is_float and (key not in found or row.p50_ms < found[key].p50_ms):
            found[key] = row
    return list(found.values())


def rival(row: Row, rows: Iterable[Row]) -> Row | None:
    """The float row that an integer row has to beat, or it is not worth deploying in its runtime.

    Of the integer row that is the fastest of all runtimes, the fastest float row of all runtimes; else that of the row's own
    runtime, or of all where none was measured there.

    Args:
        row: an integer row.
        rows: those of another setting do not count.
    """
    alike = [other for other in rows if other.setting == row.setting]
    floats = [other for other in alike if other.is_float]
    same = [other for other in floats if other.runtime == row.runtime]
    is_fastest = all(row.p50_ms <= other.p50_ms for other in alike if not other.is_float)
    return min(floats if is_fastest else same or floats, key=lambda other: other.p50_ms, default=None)


def beaten(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Integer rows that are no faster than :func:`rival`, each with it."""
    pairs = ((row, rival(row, rows)) for row in rows if not row.is_float)
    return [(row, other) for row, other in pairs if other is not None and other.p50_ms <= row.p50_ms]
