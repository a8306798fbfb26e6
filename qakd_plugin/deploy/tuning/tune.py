"""Which convolutions get a weight zero point of -1 on this processor, and the file in which they have it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from ..._common.files import with_extension, write_atomic
from ..._common.one_at_a_time import one_at_a_time
from ...errors import ExportError, ParityError, QakdError
from ...runtimes.base import Array, Input, fitted, random_inputs
from ...runtimes.host import environment
from ..canonical.graph import read_onnx, understood
from .timing import Inputs, Variants
from .zero_point import eligible_layers, with_weight_zero_point


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

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the file by its name alone."""
        return {**asdict(self), "path": self.path.name}

    def __str__(self) -> str:
        found = f"{self.plain_ms:.2f} ms plain, {self.tuned_ms:.2f} ms at best ({self.plain_ms / self.tuned_ms:.2f}x)"
        if not self.layers:
            return f"Nothing gained on this processor: {found}. {self.path.name} stays the file to deploy."
        return f"{found}, with {len(self.layers)} of {self.eligible} convolutions changed."


@one_at_a_time
def tune_for_host(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples: Array | Mapping[str, Array] | None = None,
    batch: int = 1,
    threads: int = 1,
    calls: int = 40,
    minimum_gain: float = 0.02,
) -> Tuning:
    """Measure on this machine which convolutions gain from a weight zero point of -1, and write a file with those changed.

    The file's outputs are the same bits, with the runtime's fusions off and on; this is checked. Where the whole network gains
    less than ``minimum_gain``, no ONNX file is written, and the given one stays the one to deploy. A record of what was
    measured goes to ``out`` with the suffix ``.tuning.json`` either way.

    Args:
        path: a file exported with ``target="onnxruntime"``.
        out: where the tuned file goes.
        samples: (N, ...) inputs for the check and the measurement: of the file's only input, or by name; random ones by
            default, where all inputs are floats of fixed sizes.
        batch: samples per call, as it will be deployed.
        threads: of the runtime, likewise.
        calls: timed calls of each variant.
        minimum_gain: least share of the time that must be saved; measurements repeat within 1 to 3 %.

    Raises:
        ExportError: the file is no ONNX, ONNX Runtime cannot load or run it, it holds no convolution in ONNX Runtime's form, an
            argument cannot be used, or ``out`` cannot be written.
        ParityError: the outputs of a tuned file differ, which would be a fault of the runtime.
    """
    source, target = Path(path), Path(out)
    for name, number in (("batch", batch), ("threads", threads), ("calls", calls)):
        if not isinstance(number, int) or number < (0 if name == "threads" else 1):
            raise ExportError(f"{name}={number!r}: a positive whole number was expected.")
    model, runtime = read_onnx(source), Variants(source, threads)
    plain = _bytes(model, source)
    runtime.session(plain)  # what the runtime takes is what can be reasoned about
    with understood(source, "tuned"):
        eligible = eligible_layers(model)
        stored = model.graph.initializers
        expected = {str(value.name): _input(value) for value in model.graph.inputs if value.name not in stored}
    if not eligible:
        raise ExportError(
            f"{source}: no quantized convolution in ONNX Runtime's form: export it with target='onnxruntime'. Depthwise and "
            "grouped convolutions never gain."
        )
    batches = _batches(expected, samples, batch)
    variants = {(): plain, eligible: _bytes(with_weight_zero_point(model, eligible), source)}
    before, after = runtime.layer_times(list(variants.values()), batches[0])
    faster = tuple(name for name in eligible if after.get(name, np.inf) < before.get(name, np.inf))
    if faster not in variants:
        variants[faster] = _bytes(with_weight_zero_point(model, faster), source)
    times = dict(zip(variants, runtime.interleaved(list(variants.values()), batches, calls), strict=True))
    best = min((layers for layers in variants if layers), key=times.__getitem__)
    _check_same_bits(runtime, plain, variants[best], batches)
    gained = times[best] <= (1 - minimum_gain) * times[()]
    host = environment()
    tuning = Tuning(
        path=target if gained else source,
        layers=best if gained else (),
        eligible=len(eligible),
        plain_ms=times[()],
        tuned_ms=times[best],
        batch=batch,
        threads=threads,
        cpu=host["cpu"],
        cpu_flags=tuple(host["cpu_flags"]),
    )
    if gained:
        write_atomic(target, variants[best], ExportError)
    write_atomic(with_extension(target, ".tuning.json"), json.dumps(tuning.as_dict(), indent=1) + "\n", ExportError)
    return tuning


def _bytes(model: ir.Model, source: Path) -> bytes:
    try:
        data: bytes = ir.serde.serialize_model(model).SerializeToString()
    except Exception as error:  # onnx-ir and protobuf raise many kinds on damaged tensors, and on more than 2 GiB
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{source} cannot be written again ({type(error).__name__}: {reason}). Export it again.") from error
    return data


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


def _check_same_bits(runtime: Variants, plain: bytes, tuned: bytes, batches: Sequence[Inputs]) -> None:
    for fusions in (False, True):
        first, second = (runtime.session(data, fusions=fusions) for data in (plain, tuned))
        for batch in batches:
            pairs = zip(runtime.run(first, batch), runtime.run(second, batch), strict=True)
            if not all(np.array_equal(one, other) for one, other in pairs):
                raise ParityError(
                    f"the tuned file computes other numbers with fusions {'on' if fusions else 'off'}: a fault of ONNX Runtime "
                    f"{onnxruntime.__version__}. Deploy the plain file."
                )
