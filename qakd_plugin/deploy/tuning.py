"""A file for ONNX Runtime, fitted to the processor that it will run on, by measuring there.

ONNX Runtime's convolutions with symmetric weights run on kernels that cannot use a matrix unit (AMX). With a weight zero point
of -1 and codes lowered by one, which are the same numbers, it takes its matrix product instead, which can. For some layers that
is faster on processors with AMX, for others slower, and elsewhere rarely of use; so it is measured, layer by layer. Such a file
is for ONNX Runtime alone: TensorRT rejects it, and OpenVINO computes it in floating point.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from .._common.files import with_extension, write_atomic
from ..errors import ExportError, ParityError
from ..runtimes.host import environment
from ..runtimes.interleaving import turns
from ..runtimes.onnxruntime import session_options, start_session
from .canonical.graph import cast, chain, constant, dequantizer_before, initializer, producer, read_onnx, stored_codes

WARM_UP_CALLS = 5


@dataclass(frozen=True)
class Tuning:
    """What was measured and chosen.

    Attributes:
        path: the file to deploy: the tuned one, or the given one where nothing gained.
        layers: convolutions whose weights got zero point -1; empty where nothing gained.
        eligible: how many convolutions could have got it.
        plain_ms: median processor time of a call of the given file.
        tuned_ms: likewise of the fastest variant, in the same interleaved run.
        batch: images per call.
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


def tune_for_host(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples: npt.NDArray[np.float32] | None = None,
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
        samples: float32 (N, ...) inputs for the check and the measurement; random ones by default.
        batch: images per call, as it will be deployed.
        threads: of the runtime, likewise.
        calls: timed calls of each variant.
        minimum_gain: least share of the time that must be saved; measurements repeat within 1 to 3 %.

    Raises:
        ExportError: the file is no ONNX, or holds no convolution in ONNX Runtime's form, or ``out`` cannot be written.
        ParityError: the outputs of a tuned file differ, which would be a fault of the runtime.
    """
    source, target = Path(path), Path(out)
    model = read_onnx(source)
    eligible = eligible_layers(model)
    if not eligible:
        raise ExportError(
            f"{source}: no quantized convolution in ONNX Runtime's form: export it with target='onnxruntime'. Depthwise and "
            "grouped convolutions never gain."
        )
    images = _images(model, samples, batch)
    variants = {(): _bytes(model), eligible: _bytes(shifted(model, eligible))}
    before, after = _layer_times(list(variants.values()), images[0], threads, eligible)
    faster = tuple(name for name in eligible if after.get(name, np.inf) < before.get(name, np.inf))
    if faster not in variants:
        variants[faster] = _bytes(shifted(model, faster))
    times = dict(zip(variants, _interleaved(list(variants.values()), images, threads, calls), strict=True))
    best = min((layers for layers in variants if layers), key=times.__getitem__)
    _check_same_bits(variants[()], variants[best], images, threads)
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


def eligible_layers(model: ir.Model) -> tuple[str, ...]:
    """Names of the convolutions whose weights can get a zero point of -1: ungrouped, unsigned inputs, no code -128."""
    return tuple(node.name or "" for node in model.graph if node.name and node.op_type == "Conv" and _is_eligible(node))


def shifted(model: ir.Model, layers: Iterable[str]) -> ir.Model:
    """A copy in which weights of some convolutions have zero point -1 and codes lowered by one, which is done at load."""
    model = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    graph, wanted, done = model.graph, set(layers), set()
    for conv in [node for node in graph if node.name in wanted]:
        dequantize = producer(conv.inputs[1], "DequantizeLinear")
        assert dequantize is not None
        if dequantize in done:
            continue
        done.add(dequantize)
        scale, value = constant(dequantize.inputs[1]), dequantize.inputs[0]
        assert scale is not None
        assert value is not None
        lower = initializer(graph, "code_minus_one", np.asarray(-1, dtype=np.int32))
        steps = (cast(ir.DataType.INT32), ir.node("Add", [None, lower]), cast(ir.DataType.INT8))
        value = chain(dequantize, value, steps, f"{dequantize.name}/tuned")
        dequantize.resize_inputs(3)
        dequantize.replace_input_with(0, value)
        name = f"{dequantize.name}/tuned.zero_point"  # of its own, as in targets.onnxruntime
        dequantize.replace_input_with(2, initializer(graph, name, np.full(scale.shape, -1, dtype=np.int8)))
    return model


def _is_eligible(conv: ir.Node) -> bool:
    if conv.attributes.get_int("group", 1) != 1:
        return False
    weight, before = producer(conv.inputs[1], "DequantizeLinear"), dequantizer_before(conv.inputs[0])
    if weight is None or before is None or len(before.inputs) < 3 or len(weight.inputs) < 3:
        return False
    unsigned, zero = constant(before.inputs[2]), constant(weight.inputs[2])
    if unsigned is None or unsigned.dtype != np.uint8 or zero is None or zero.dtype != np.int8 or zero.any():
        return False
    all_convolutions = all(use.node.op_type == "Conv" for use in weight.outputs[0].uses())
    return all_convolutions and int(stored_codes(weight).min(initial=0)) > -128


def _bytes(model: ir.Model) -> bytes:
    data: bytes = ir.serde.serialize_model(model).SerializeToString()
    return data


def _images(model: ir.Model, samples: npt.NDArray[np.float32] | None, batch: int) -> list[npt.NDArray[np.float32]]:
    """Batches of the size that will be deployed."""
    value = model.graph.inputs[0]
    sizes = [size if isinstance(size, int) else None for size in value.shape or ()][1:]
    if samples is None:
        fixed = [size for size in sizes if size is not None]
        if not sizes or len(fixed) < len(sizes):
            raise ExportError(f"input {value.name!r} has no fixed image size: pass samples.")
        samples = np.random.default_rng(0).random((4 * batch, *fixed), dtype=np.float32)
    fits = samples.ndim == len(sizes) + 1 and all(
        size in (None, got) for size, got in zip(sizes, samples.shape[1:], strict=True)
    )
    if not fits or samples.dtype != np.float32 or len(samples) < batch:
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ExportError(
            f"samples: expected float32 (N, {expected}) with N of {batch} at least, got {samples.dtype} {samples.shape}."
        )
    return [np.ascontiguousarray(samples[start : start + batch]) for start in range(0, len(samples) - batch + 1, batch)]


def _session(data: bytes, threads: int, *, profile: Path | None = None, fusions: bool = True) -> onnxruntime.InferenceSession:
    return start_session(data, session_options(threads, fusions=fusions, profile=profile))


def _run(session: onnxruntime.InferenceSession, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def _layer_times(
    variants: Sequence[bytes], images: npt.NDArray[np.float32], threads: int, layers: Sequence[str]
) -> list[dict[str, float]]:
    """Median time of each layer's kernel in each variant, microseconds, from profiles of interleaved calls."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = [_session(data, threads, profile=Path(folder) / f"{index}") for index, data in enumerate(variants)]
        for _ in range(WARM_UP_CALLS + 15):
            for session in sessions:
                _run(session, images)
        profiles = [json.loads(Path(session.end_profiling()).read_text()) for session in sessions]
    return [_kernel_times(events, layers) for events in profiles]


def _kernel_times(events: Sequence[dict[str, Any]], layers: Sequence[str]) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for event in events:
        # Fused nodes have a suffix of their own.
        name, kernel, _ = re.sub(r"_token_\d+", "", event["name"]).partition("_kernel_time")
        if event.get("cat") == "Node" and kernel:
            times.setdefault(name, []).append(event["dur"])
    return {name: statistics.median(times[name][WARM_UP_CALLS:]) for name in layers if name in times}


def _interleaved(variants: Sequence[bytes], images: Sequence[npt.NDArray[np.float32]], threads: int, calls: int) -> list[float]:
    """Median processor time of a call of each variant, milliseconds: in turns."""
    sessions = [_session(data, threads) for data in variants]
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions * WARM_UP_CALLS:
        _run(session, images[0])
    for turn in turns(calls):
        for session, taken in zip(sessions, times, strict=True):
            _run(session, images[turn[0] % len(images)])
            for index in turn:
                start = time.process_time()
                _run(session, images[index % len(images)])
                taken.append(time.process_time() - start)
    return [statistics.median(taken) * 1e3 for taken in times]


def _check_same_bits(plain: bytes, tuned: bytes, images: Sequence[npt.NDArray[np.float32]], threads: int) -> None:
    for fusions in (False, True):
        first, second = (_session(data, threads, fusions=fusions) for data in (plain, tuned))
        for batch in images:
            if not np.array_equal(_run(first, batch), _run(second, batch)):
                raise ParityError(
                    f"the tuned file computes other numbers with fusions {'on' if fusions else 'off'}: a fault of ONNX Runtime "
                    f"{onnxruntime.__version__}. Deploy the plain file."
                )
