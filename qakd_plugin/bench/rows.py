"""One row of a report: a file in a runtime, measured.

The bounds of its fields are those that a report is checked with (:mod:`.schema`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

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
            weights alone are quantized.
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
        samples: images that the accuracy was counted on.
        agreement: share of images on which it agrees with the reference logits.
        sqnr_db: against the reference logits.
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
        findings: why it is not faster than the best float row, where it is the best integer row and is not.
        layers: time of each layer, on request.
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
    sqnr_db: Annotated[float, Ge(-1e4), Le(1e4)] | None = None
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
        data = asdict(self)
        data["findings"] = [{**finding, "layers": list(finding["layers"])} for finding in data["findings"]]
        data["layers"] = list(data["layers"])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The row of plain data that fits the schema."""
        values = dict(data)
        if values.get("conditions") is not None:
            values["conditions"] = Conditions(**values["conditions"])
        values["findings"] = tuple(
            Finding(entry["kind"], tuple(entry["layers"]), entry["advice"]) for entry in values.get("findings", ())
        )
        values["layers"] = tuple(LayerTime(**entry) for entry in values.get("layers", ()))
        return cls(**values)


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
