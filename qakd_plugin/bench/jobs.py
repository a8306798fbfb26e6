"""What will be measured: every candidate in every runtime and precision that can take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._common.cpu_features import has_bfloat16
from ..deploy.file_record import FileRecord
from ..errors import QakdError
from ..runtimes.base import DYNAMIC_INT8, MODULE_RUNTIMES, RUNTIMES
from .candidates import Candidate
from .file_facts import BatchLimits, accuracy_levels, batch_limits, float_type, record_of, require_valid


@dataclass(frozen=True)
class Job:
    """A candidate in a runtime; ``precision`` is that of what is not quantized, ``record`` what its file says of itself."""

    candidate: Candidate
    runtime: str
    precision: str
    record: FileRecord | None = None


def jobs_of(candidates: Sequence[Candidate], runtimes: Sequence[str], batch_sizes: Sequence[int]) -> list[Job]:
    """The jobs of a benchmark.

    Raises:
        QakdError: something cannot be measured; said before anything is.
    """
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise QakdError(f"runtimes: {unknown[0]!r} is unknown: use {', '.join(map(repr, RUNTIMES))}.")
    jobs = []
    for candidate in candidates:
        if candidate.file is not None and not candidate.file.is_file():
            raise QakdError(f"models: {candidate.file} does not exist. Check the path.")
        if candidate.file is None and candidate.weight_bits < 32:
            raise QakdError(f"models: {candidate.label}: modules are measured in floating point. Export a quantized one.")
        wanted = [name for name in runtimes if name in candidate.runtimes and candidate.runtime in (None, name)]
        if not wanted:
            raise QakdError(
                f"runtimes: {candidate.label} is measured in none of {list(runtimes)}: engines run in 'tensorrt', ONNX files "
                "in 'onnxruntime' and 'openvino', torch modules in 'torch' and 'torch.compile'; name them all."
            )
        if "openvino" in wanted and candidate.existing.suffix == ".onnx":
            require_valid(candidate.existing)
        limits = BatchLimits(1, None) if candidate.file is None else batch_limits(candidate.file)
        for batch in batch_sizes:
            if not limits.takes(batch):
                raise QakdError(
                    f"batch_sizes: {candidate.label} takes batches of {limits}, {batch} was asked for. Leave it out."
                )
        record = None if candidate.file is None else record_of(candidate.file)
        jobs += [
            Job(candidate, runtime, precision, record)
            for runtime in wanted
            for precision in _precisions(candidate, runtime, record)
        ]
    return jobs


def _precisions(candidate: Candidate, runtime: str, record: FileRecord | None) -> tuple[str, ...]:
    tuning = None if record is None else record.tuning
    if tuning is not None and runtime == "openvino" and tuning.get("precision") == "bfloat16" and has_bfloat16():
        return ("bfloat16",)  # as it was measured and proven
    weights_alone = candidate.weight_bits < 32 and candidate.activation_bits == 32
    if runtime == "onnxruntime":
        levels = accuracy_levels(candidate.existing) if weights_alone else set()
        exact = () if levels == {4} else (float_type(candidate.existing),)
        return (*exact, DYNAMIC_INT8) if levels else exact
    if runtime == "openvino" and weights_alone:
        return ("float32", DYNAMIC_INT8)
    both = candidate.weight_bits == 32 and (runtime == "openvino" or runtime in MODULE_RUNTIMES) and has_bfloat16()
    return ("float32", "bfloat16") if both else ("float32",)
