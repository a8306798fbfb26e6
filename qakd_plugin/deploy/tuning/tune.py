"""A file fitted to the processor that it will run on, by measuring there what each change gains."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..._common.files import with_extension, write_atomic
from ..._common.one_at_a_time import one_at_a_time
from ..._common.optional import require
from ...errors import ExportError, QakdError
from ...runtimes.base import FILE_RUNTIMES, Array, FileRuntime, Input, fitted, random_inputs
from ...runtimes.host import environment
from ..canonical.clamps import has_signed_codes
from ..canonical.graph import activation_quantizers, read_onnx, understood
from ..file_record import PREFIX, Tuned
from .grids import floats_of, layer_name
from .proof import TuningProof
from .search import Choice, Search
from .timing import Inputs, Variants

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """What was measured and chosen.

    Attributes:
        path: the file to deploy: the tuned one, or the given one where nothing gained.
        layers: convolutions whose weights got zero point -1; empty where nothing gained.
        eligible: how many convolutions could have got it.
        plain_ms: median processor time of a call of the given file.
        tuned_ms: likewise of the fastest variant, in the same interleaved run.
        batch: samples per call.
        threads: of the runtime.
        cpu: the processor this holds for.
        cpu_flags: what it can do, as far as it matters here.
        runtime: that it was tuned for, and is deployed in.
        precision: of what is not quantized: "bfloat16" where OpenVINO's hint must say so.
        float_layers: that compute in floating point now, by the names of the trained model, their weights as they were.
        unrounded: quantizers of the trained model that clamp to their range and no longer round.
        blocked: convolutions that read blocks of pixels (SpaceToDepth).
        half_steps: quantizers on half the step, so that codes 0 to 127 are 0 to 255.
        proof: what was shown of the tuned file; None where nothing gained.
    """

    path: Path
    layers: tuple[str, ...]
    eligible: int
    plain_ms: float
    tuned_ms: float
    batch: int
    threads: int
    cpu: str
    cpu_flags: tuple[str, ...]
    runtime: FileRuntime = "onnxruntime"
    precision: str = "float32"
    float_layers: tuple[str, ...] = ()
    unrounded: tuple[str, ...] = ()
    half_steps: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    proof: TuningProof | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the file by its name alone."""
        return {**asdict(self), "path": self.path.name}

    def __str__(self) -> str:
        found = f"{self.plain_ms:.2f} ms plain, {self.tuned_ms:.2f} ms at best ({self.plain_ms / self.tuned_ms:.2f}x)"
        if self.proof is None:
            return f"Nothing gained on this processor: {found}. {self.path.name} stays the file to deploy."
        changes = []
        if self.layers:
            changes.append(f"{len(self.layers)} of {self.eligible} convolutions changed")
        if self.blocked:
            changes.append(f"{len(self.blocked)} that read blocks of pixels")
        if self.half_steps:
            changes.append(f"{len(self.half_steps)} quantizers on half their step")
        if self.unrounded:
            changes.append(f"{len(self.unrounded)} quantizers that no longer round")
        lines = [f"{found}, with {', '.join(changes) or 'the file as it is'}."]
        if self.float_layers:
            lines.append(f"In floating point now: {', '.join(self.float_layers)}.")
        if self.precision == "bfloat16":
            lines.append('Compile it with {"INFERENCE_PRECISION_HINT": "bf16"}, as it was measured and proven.')
        return " ".join(lines)

    def as_record(self) -> Tuned:
        """What the tuned file says of itself."""
        return Tuned(
            runtime=self.runtime,
            precision=self.precision,
            cpu=self.cpu,
            batch=self.batch,
            threads=self.threads,
            plain_ms=self.plain_ms,
            tuned_ms=self.tuned_ms,
            float_layers=list(self.float_layers),
            unrounded=list(self.unrounded),
            half_steps=list(self.half_steps),
            zero_points=list(self.layers),
            blocked=list(self.blocked),
            proof=None if self.proof is None else self.proof.as_dict(),
        )


@one_at_a_time
def tune_for_host(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    runtime: FileRuntime | None = None,
    samples: Array | Mapping[str, Array] | None = None,
    batch: int = 1,
    threads: int = 1,
    calls: int = 40,
    minimum_gain: float = 0.02,
    exact: bool = False,
) -> Tuning:
    """Measure on this machine which layers are worth their integers, and write a file in which the others have none.

    What is tried, alone and together, and kept where whole files are faster by ``minimum_gain`` in interleaved runs:

    - activation quantizers that no longer round, of single layers and of groups: they still clamp to their ranges, so no number
      is farther from what was trained than half a step, as rounding is. Layers that read them compute in floating point, with
      weights as they were trained;
    - unsigned codes: where a quantizer uses codes 0 to 127 alone, half its step, and 0 to 255;
    - ONNX Runtime: convolution weights with a zero point of -1, which are the same numbers, for processors with AMX;
    - ONNX Runtime: a first convolution with a stride of two that reads blocks of two by two pixels (SpaceToDepth): the same
      integers, added in another order;
    - OpenVINO: bfloat16 for what is not quantized, where the processor has it.

    A tuned file is proven before it is written (:mod:`qakd_plugin.deploy.tuning.proof`): every number that changed lies within
    half a step of what the given file makes of the same input, the runtime computes what the file says, and the last two change
    no bit. The file's metadata ("qakd.tuning") names what changed. It is for this runtime on processors like this one. Where
    the whole network gains less, no ONNX file is written, and the given one stays the one to deploy. A record of what was
    measured goes to ``out`` with the suffix ``.tuning.json`` either way.

    Args:
        path: a file exported with ``target="onnxruntime"`` or ``target="openvino"``.
        out: where the tuned file goes.
        runtime: "onnxruntime" or "openvino"; None: the one that the file was exported for, ONNX Runtime where it does not say.
        samples: (N, ...) inputs for the check and the measurement: of the file's only input, or by name; random ones by
            default, where all inputs are floats of fixed sizes.
        batch: samples per call, as it will be deployed.
        threads: of the runtime, likewise.
        calls: timed calls of each variant.
        minimum_gain: least share of the time that must be saved; measurements repeat within 1 to 3 %.
        exact: only what leaves every bit of the outputs as it is, as the runtime computes them: zero points and blocks.

    Raises:
        ExportError: the file is no ONNX, was exported for another runtime, the runtime cannot load or run it, it holds nothing
            that could be changed, an argument cannot be used, or ``out`` cannot be written.
        MissingPackageError: OpenVINO is not installed.
        ParityError: zero points change outputs, which would be a fault of the runtime.
    """
    source, target = Path(path), Path(out)
    for name, number in (("batch", batch), ("threads", threads), ("calls", calls)):
        if not isinstance(number, int) or number < (0 if name == "threads" else 1):
            raise ExportError(f"{name}={number!r}: a positive whole number was expected.")
    model = read_onnx(source)
    chosen = _runtime(model, source, runtime)
    variants = Variants(source, chosen, threads)
    plain = variants.serialized(model)
    variants.check(plain)  # what the runtime takes is what can be reasoned about
    with understood(source, "tuned"):
        _check_form(model, source, chosen)
        stored = model.graph.initializers
        expected = {str(value.name): _input(value) for value in model.graph.inputs if value.name not in stored}
        search = Search(model, variants, (), calls, minimum_gain, exact)
        nothing = not (search.eligible or search.blockable or search.grids)
    if nothing:
        what = "convolution of unsigned codes without groups, which exact=True looks for" if exact else "quantized activation"
        raise ExportError(f"{source} holds no {what}: there is nothing to tune. Deploy it as it is.")
    search.batches = _batches(expected, samples, batch)
    best = search.best()
    plain_ms, tuned_ms = search.compare(best or search.closest)
    if best is not None and tuned_ms > (1 - minimum_gain) * plain_ms:
        best = None  # the gain was the luck of the run that chose it
    if best is None and target.exists():
        _log.warning("%s is of an earlier run, and stays: nothing gains enough now, so deploy %s.", target, source)
    tuning = _tuning(search, best, (plain_ms, tuned_ms), source if best is None else target, batch)
    if best is not None:
        tuned = search.made(best)
        tuned.metadata_props[f"{PREFIX}tuning"] = json.dumps(tuning.as_record(), separators=(",", ":"))
        write_atomic(target, variants.serialized(tuned), ExportError)
    write_atomic(with_extension(target, ".tuning.json"), json.dumps(tuning.as_dict(), indent=1) + "\n", ExportError)
    return tuning


def _tuning(search: Search, best: Choice | None, times: tuple[float, float], path: Path, batch: int) -> Tuning:
    host, runtime, choice = environment(), search.runtime, best or Choice()
    grids = search.grids
    unrounded = [grids[index] for index in sorted(choice.finer.unrounded)]
    floats = set(floats_of(unrounded, runtime.runtime))
    return Tuning(
        path=path,
        layers=tuple(name for name in search.eligible if name in choice.shifted),
        eligible=len(search.eligible),
        plain_ms=times[0],
        tuned_ms=times[1],
        batch=batch,
        threads=runtime.threads,
        cpu=host["cpu"],
        cpu_flags=tuple(host["cpu_flags"]),
        runtime=runtime.runtime,
        precision=choice.precision,
        float_layers=tuple(layer_name(node) for node in search.model.graph if node in floats),
        unrounded=tuple(grid.name for grid in unrounded),
        half_steps=tuple(grids[index].name for index in sorted(choice.finer.halved - choice.finer.unrounded)),
        blocked=tuple(name for name in search.blockable if name in choice.blocked),
        proof=None if best is None else search.prove(best),
    )


def _runtime(model: ir.Model, source: Path, runtime: str | None) -> FileRuntime:
    if runtime is not None and runtime not in FILE_RUNTIMES:
        raise ExportError(f"runtime={runtime!r} is unknown: use one of {list(FILE_RUNTIMES)}.")
    target = model.metadata_props.get(f"{PREFIX}target")
    wanted = runtime or target or "onnxruntime"
    found = next((one for one in FILE_RUNTIMES if one == wanted), None)
    if target not in (None, found) or found is None:
        wanted = runtime or "onnxruntime"
        raise ExportError(f"{source} was exported for {target!r}: export it with target={wanted!r} to tune it for {wanted}.")
    if found == "openvino":
        require("openvino", extra="openvino", purpose="tune for OpenVINO")
    return found


def _check_form(model: ir.Model, source: Path, runtime: str) -> None:
    if runtime == "onnxruntime" and any(map(has_signed_codes, activation_quantizers(model.graph))):
        raise ExportError(
            f"{source} is not in ONNX Runtime's form, whose codes of activations are unsigned: export it with "
            "target='onnxruntime'."
        )


def _batches(expected: Mapping[str, Input], samples: Array | Mapping[str, Array] | None, batch: int) -> list[Inputs]:
    """Batches of the size that will be deployed; an input's first dimension counts samples."""
    given = _random(expected, batch) if samples is None else samples if isinstance(samples, Mapping) else {"0": samples}
    try:
        found = fitted(expected, given)
    except QakdError as error:
        raise ExportError(f"samples: {error}") from error
    count = min((len(array) for array in found.values() if array.ndim), default=0)
    if count < batch or any(not array.ndim or len(array) != count for array in found.values()):
        shapes = ", ".join(f"{name!r} {list(array.shape)}" for name, array in found.items())
        raise ExportError(f"samples: expected {batch} or more, as many of each input; got {shapes}.")
    return [
        {name: np.ascontiguousarray(array[start : start + batch]) for name, array in found.items()}
        for start in range(0, count - batch + 1, batch)
    ]


def _input(value: ir.Value) -> Input:
    """Any number of samples, whatever the batch that the file says: how many are given is checked elsewhere."""
    sizes = [size if isinstance(size, int) else None for size in value.shape or ()]
    return Input((None, *sizes[1:]), None if value.dtype is None else value.dtype.numpy())


def _random(expected: Mapping[str, Input], batch: int) -> dict[str, Array]:
    try:
        return random_inputs(expected, 4 * batch, least=batch)
    except QakdError as error:
        raise ExportError(f"{error}: pass samples.") from error
