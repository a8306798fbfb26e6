"""One row of a report, and the schema of a whole one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import jsonschema

from ..deploy.diagnosis import Finding
from ..errors import QakdError
from ..runtimes.base import LayerTime as LayerTime
from ..runtimes.host import Conditions as Conditions

SCHEMA_VERSION = 2
"""2: a report may hold several runs, each with its environment; rows name their run. Version 1 had one."""

_DEEPEST = 32
_LARGEST = 2**63
"""Bounds of what a report may nest and count: anything beyond comes from a damaged file."""


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
        samples: images behind the accuracy.
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
    load_ms: float | None
    file_mib: float | None
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
    upload_ms: float | None = None
    compute_ms: float | None = None
    download_ms: float | None = None
    peak_rss_mib: float | None = None
    run: int = 0
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
        """The row behind plain data that fits the schema."""
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


def schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    text = resources.files(__package__).joinpath("schema.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(document: Mapping[str, Any]) -> None:
    """Check a report document.

    Raises:
        QakdError: names the place and what was expected.
    """
    _check_plain(document)
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if problem is not None:
        raise QakdError(f"report: {_place(problem.absolute_path)}: {problem.message[:300]}")
    runs = len(document["runs"])
    for index, row in enumerate(document["rows"]):
        if row.get("run", 0) >= runs:
            raise QakdError(f"report: rows/{index}/run: {row.get('run', 0)} was given, and the report has {runs} runs.")


def _check_plain(document: Mapping[str, Any]) -> None:
    """Refuse what JSON, HTML or arithmetic would choke on later: NaN, giant numbers, lone surrogates, deep nesting."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        problem = _problem(value, len(place))
        if problem:
            raise QakdError(f"report: {_place(place)}: {problem}")
        if isinstance(value, dict):
            waiting += [((*place, key), inner) for key, inner in value.items()]
            waiting += [((*place, "a key"), key) for key in value]
        elif isinstance(value, list | tuple):
            waiting += [((*place, index), inner) for index, inner in enumerate(value)]


def _place(path: Iterable[Any]) -> str:
    return "/".join(str(part)[:40] for part in path) or "the document"


def _problem(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST:
        return f"nested more than {_DEEPEST} levels deep."
    if isinstance(value, str):
        return None if value.isascii() or value.encode(errors="replace").decode() == value else "text with a lone surrogate."
    if value is None or isinstance(value, bool | dict | list | tuple):
        return None
    if not isinstance(value, int | float):
        return f"{type(value).__name__} is no JSON type."
    if isinstance(value, int):
        return "a number beyond 2^63." if abs(value) > _LARGEST else None
    return None if math.isfinite(value) else f"{value} is not a finite number."
