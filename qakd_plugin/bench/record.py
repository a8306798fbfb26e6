"""One row of a report, and the schema of a whole one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import jsonschema

from ..errors import QakdError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """A file in a runtime, measured.

    Attributes:
        model: what it is called, "digits".
        method: how it came about: "FP32", "PTQ", "QAT", "SQAKD".
        toolkit: that prepared it; None for float models.
        weight_bits: of its inner layers; 32 for float.
        activation_bits: likewise.
        runtime: "onnxruntime", "openvino".
        precision: what it computes in: "float32", "bfloat16", "int8".
        batch: images per call.
        threads: of the runtime.
        calls: timed calls.
        p50_ms: median latency of a call.
        p90_ms: None with fewer than 64 calls.
        p99_ms: None with fewer than 662 calls.
        cpu_ms: median processor time of a call.
        throughput: images per second at the median.
        load_ms: time to load the file.
        file_mib: size of the file.
        accuracy: top-1 of the deployed file through the runtime.
        accuracy_low: lower end of its 95 % interval (Wilson).
        accuracy_high: upper end.
        samples: images behind the accuracy.
        agreement: share of images on which it agrees with the reference logits.
        sqnr_db: against the reference logits.
        integer_layers: convolutions and matrix products that the runtime computes in integers.
        total_layers: all of them.
        speedup: over the same runtime's FP32 row of the same model, batch and threads, in the same run.
        speedup_over_best_float: over the fastest float row of the same model, batch and threads.
    """

    model: str
    method: str
    toolkit: str | None
    weight_bits: int
    activation_bits: int
    runtime: str
    precision: str
    batch: int
    threads: int
    calls: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    cpu_ms: float
    throughput: float
    load_ms: float
    file_mib: float
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    samples: int = 0
    agreement: float | None = None
    sqnr_db: float | None = None
    integer_layers: int | None = None
    total_layers: int | None = None
    speedup: float | None = None
    speedup_over_best_float: float | None = None

    @property
    def name(self) -> str:
        """Short label: what tells it from other rows of a report."""
        bits = "" if self.weight_bits == 32 else f" W{self.weight_bits}A{self.activation_bits}"
        origin = "" if self.toolkit is None else f" ({self.toolkit})"
        return f"{self.method}{bits}{origin}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the schema has it."""
        return asdict(self)


def schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    text = resources.files(__package__).joinpath("schema.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(document: dict[str, Any]) -> None:
    """Check a report document.

    Raises:
        QakdError: names the place and what was expected.
    """
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if problem is not None:
        place = "/".join(map(str, problem.absolute_path)) or "the document"
        raise QakdError(f"report: {place}: {problem.message[:300]}")
