"""Canonical ONNX -> TensorRT engine, with a manifest that says what is in it and proves that it is that file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..._common.files import atomic_path, read_whole, write_atomic
from ...errors import EngineError
from .bindings import Runtime, choose_capabilities, collecting_logger, gpu_capability, last, load_runtime, progress_monitor
from .layer_inspector import inspect_plan
from .manifest import BuiltBy, Counts, Layer, Manifest, Profile, Source, load_engine, manifest_path, sealed, verify_engine
from .precheck import OnnxContents, WeightLayer, inspect_onnx
from .profile import Sizes, named_dimensions, profile_shapes
from .rtx_plan import PlanContents, PlanLayer, count, read_plan
from .trtexec import input_shape, trtexec_command

__all__ = ["EngineInfo", "build_engine", "input_shape", "load_engine", "trtexec_command", "verify_engine"]


@dataclass(frozen=True)
class EngineInfo:
    """A built engine and its manifest.

    Attributes:
        path: the engine.
        manifest_path: ``<path>.json``.
        manifest: what it says: digests, versions, profile, GPU generations, layers with their precisions.
    """

    path: Path
    manifest_path: Path
    manifest: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class _Request:
    """An engine that can be built, as far as that is known before TensorRT sees the file.

    Attributes:
        name: path of the ONNX file, as the user gave it.
        source: what the file holds.
        profile: batch sizes, where the file's batch is dynamic.
        shapes: of each input: smallest, tuned for, largest.
        library: that builds.
        gpu: generation of the GPU at hand.
        capabilities: generations to build for.
        require_int8: smallest share of layers that must compute in integers.
        timing_cache: file of measured kernels.
    """

    name: str
    source: OnnxContents
    profile: Profile
    shapes: dict[str, list[tuple[int, ...]]]
    library: Runtime
    gpu: str | None
    capabilities: list[str]
    require_int8: float | None
    timing_cache: str | os.PathLike[str] | None


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    runtime: str = "auto",
    *,
    min_batch: int = 1,
    opt_batch: int = 8,
    max_batch: int = 64,
    sizes: Sizes | None = None,
    capabilities: Sequence[str] | None = None,
    require_int8: float | None = None,
    allow_float: bool = False,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> EngineInfo:
    """Build a strongly typed engine from a canonical ONNX file: every precision is the one that its Q/DQ nodes say.

    TensorRT-RTX builds without a GPU; the classic TensorRT needs the one that it builds for.

    Args:
        onnx_path: from ``export_onnx(..., target="tensorrt")``.
        engine_path: where the engine goes; its manifest is ``<engine_path>.json``. Both appear whole or not at all.
        runtime: "tensorrt" (10 or 11), "tensorrt_rtx", or "auto": the first of the two that is installed.
        min_batch: smallest batch of the optimization profile; the profile counts where the file's batch is dynamic.
        opt_batch: the batch that it is tuned for.
        max_batch: largest batch.
        sizes: smallest, tuned for and largest size of each other dynamic dimension, by the name it has in the file:
            ``sizes={"sequence": (8, 128, 512)}``.
        capabilities: RTX only: GPU generations such as ("SM89",), or ("CURRENT",). By default the GPU at hand, and several
            portable ones where there is none.
        require_int8: smallest share, 0 to 1, of convolutions and matrix products with weights that must compute in integers.
        allow_float: take a file without Q/DQ, for a floating-point baseline.
        timing_cache: classic TensorRT only: file of measured kernels, read where it exists and written back: a second build
            takes a fraction of the time.
        progress: called with a line for each phase of the build and each step of it.

    Returns:
        Paths and manifest.

    Raises:
        EngineError: the file is no ONNX, holds no Q/DQ, or what TensorRT cannot take (names the node); it does not parse or
            build; a dynamic dimension has no sizes; fewer layers than required compute in integers (names those that do
            not); the path cannot be written.
        MissingPackageError: no TensorRT is installed.
    """
    batches = (min_batch, opt_batch, max_batch)
    request = _request(onnx_path, runtime, batches, sizes, capabilities, require_int8, allow_float, timing_cache)
    engine, record = Path(engine_path), manifest_path(engine_path)
    # The manifest takes its name first: should the engine fail to follow, the digest of an older engine does not match.
    with atomic_path(engine, EngineError) as new_engine, atomic_path(record, EngineError) as new_record:
        plan = _build(request, progress)
        manifest = _manifest(request, plan)
        new_engine.write_bytes(plan)
        new_record.write_text(json.dumps(manifest, indent=2) + "\n")
    return EngineInfo(engine, record, manifest)


def _request(
    onnx_path: str | os.PathLike[str],
    runtime: str,
    batches: tuple[int, int, int],
    sizes: Sizes | None,
    capabilities: Sequence[str] | None,
    require_int8: float | None,
    allow_float: bool,
    timing_cache: str | os.PathLike[str] | None,
) -> _Request:
    """Everything that can be refused before anything is built or written."""
    try:
        profile = Profile(min=batches[0], opt=batches[1], max=batches[2])
    except ValidationError as error:
        raise EngineError(
            f"0 < min_batch <= opt_batch <= max_batch must hold, in whole numbers, got {', '.join(map(repr, batches))}."
        ) from error
    if require_int8 is not None and not 0 <= require_int8 <= 1:
        raise EngineError(f"require_int8={require_int8}: a share between 0 and 1 was expected.")
    source = inspect_onnx(onnx_path)
    if not source.quantized and not allow_float:
        raise EngineError(
            f"{os.fspath(onnx_path)} holds no QuantizeLinear: the engine would compute in floating point. Export a prepared "
            "model with export_onnx(..., target='tensorrt'), or pass allow_float=True for a floating-point baseline."
        )
    shapes = profile_shapes(source.inputs, batches, sizes)
    library, gpu = load_runtime(runtime), gpu_capability()
    targets = choose_capabilities(library, capabilities, gpu)
    if timing_cache is not None and library.is_rtx:
        raise EngineError("timing_cache: tensorrt_rtx has none, it measures nothing while it builds. Leave it out.")
    return _Request(os.fspath(onnx_path), source, profile, shapes, library, gpu, targets, require_int8, timing_cache)


def _manifest(request: _Request, plan: bytes) -> dict[str, Any]:
    """What is known about a plan that was built as requested.

    Raises:
        EngineError: fewer of its layers than required compute in integers.
    """
    source, library = request.source, request.library
    contents = (
        read_plan(plan) if library.is_rtx else inspect_plan(library, plan, {name: of[1] for name, of in request.shapes.items()})
    )
    layers = None if contents is None else _with_missing(contents.layers, source.layers)
    _require_integers(layers, source.layers, request.require_int8)
    manifest = Manifest(
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        onnx=Source(file=Path(request.name).name, sha256=hashlib.sha256(source.data).hexdigest()),
        runtime=BuiltBy(name=library.name, version=library.version, module=library.module.__name__),
        capabilities=request.capabilities,
        gpu=request.gpu,
        inputs={name: [size if isinstance(size, int) else None for size in shape] for name, shape in source.inputs.items()},
        float_type="float16" if source.float16 else "float32",
        quantized=source.quantized,
        profile=request.profile if any(None in shape for shape in source.inputs.values()) else None,
        shapes={name: list(map(list, of)) for name, of in request.shapes.items()} if named_dimensions(source.inputs) else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        metadata=source.metadata,
        **_precisions(contents, layers),
    )
    return sealed(manifest.model_dump())


def _build(request: _Request, progress: Callable[[str], None] | None) -> bytes:
    library, source = request.library, request.source
    trt = library.module
    logger, messages = collecting_logger(library)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # what the bindings raise where CUDA cannot start
        raise EngineError(
            f"{library.name} {library.version} cannot start: {last([*messages, str(error)])} Check the driver."
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.data):
        raise EngineError(
            f"{request.name}: {library.name} {library.version} cannot take it: {_parser_problem(parser, messages)}"
        )
    config = builder.create_builder_config()
    monitor = None if progress is None else progress_monitor(library, progress)
    if monitor is not None:
        config.progress_monitor = monitor
    if source.dynamic:
        config.add_optimization_profile(_profile(builder, request))
    if library.is_rtx:
        config.num_compute_capabilities = len(request.capabilities)
        for index, target in enumerate(request.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), index)
    else:  # the GPU is at hand: the inspector will be asked
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.timing_cache is not None:
        attach_timing_cache(config, request.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{request.name}: {library.name} {library.version} failed to build an engine: {last(messages)}")
    if request.timing_cache is not None:
        write_atomic(request.timing_cache, bytes(config.get_timing_cache().serialize()), EngineError)
    return bytes(plan)


def _parser_problem(parser: Any, messages: Sequence[str]) -> str:
    """Node, operator and reason of the first thing that the parser refused."""
    if parser.num_errors == 0:
        return last(messages)
    problem = parser.get_error(0)
    where = f"node {problem.node_name()!r} ({problem.node_operator()}): " if problem.node_name() else ""
    more = f" ({parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"{where}{problem.desc()}{more}. Keep this operation out of the model, or run it before or after the engine."


def _profile(builder: Any, request: _Request) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in request.source.inputs.items():
        if not all(isinstance(size, int) for size in shape):
            try:
                profile.set_shape(name, *request.shapes[name])
            except RuntimeError as error:  # what the bindings raise
                raise EngineError(f"input {name!r} of {list(shape)}: {error} Choose other sizes.") from error
    return profile


def attach_timing_cache(config: Any, path: str | os.PathLike[str]) -> None:
    """Let a build start from the kernels measured by earlier ones; an empty cache where there is no file.

    Raises:
        EngineError: the file is not a cache of this TensorRT and GPU.
    """
    file = Path(path)
    try:
        measured = read_whole(file) if file.exists() else b""
    except OSError as error:
        raise EngineError(f"timing_cache: {file} cannot be read: {error.strerror}. Delete it, or name another.") from error
    cache = config.create_timing_cache(measured)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(f"timing_cache: {file} is not a cache of this TensorRT and this GPU. Delete it, or name another.")


def _with_missing(layers: Sequence[PlanLayer], expected: Sequence[WeightLayer]) -> list[PlanLayer]:
    """The plan's layers, and those of the ONNX file that the plan does not show, of unknown precision."""
    shown = {name for layer in layers for name in (layer.name, *layer.onnx_layers)}
    missing = [layer for layer in expected if layer.name and layer.name not in shown]
    return [*layers, *(PlanLayer(layer.name, layer.kind, ("unknown", "unknown")) for layer in missing)]


def _precisions(contents: PlanContents | None, layers: Sequence[PlanLayer] | None) -> dict[str, Any]:
    """Entries of the manifest; where the plan cannot be read they stay "unknown"."""
    if contents is None or layers is None:
        return {}
    return {
        "convolutions": Counts(**count(layers, "convolution")),
        "matmuls": Counts(**count(layers, "matmul")),
        "int4_weights": contents.int4_weights,
        "int4_layers": sum(layer.stored == "int4" for layer in layers),
        "layers": [
            Layer(**{**asdict(layer), "inputs": list(layer.inputs), "onnx_layers": list(layer.onnx_layers)}) for layer in layers
        ],
    }


def _require_integers(layers: Sequence[PlanLayer] | None, weighted: Sequence[WeightLayer], share: float | None) -> None:
    """Of layers with weights, as the plan or the ONNX file has it: products of two activations count in the manifest alone."""
    if share is None:
        return
    if layers is None:
        raise EngineError("require_int8: the plan cannot be read, so the share of integer layers is unknown. Leave it out.")
    names = {layer.name for layer in weighted}
    judged = [layer for layer in layers if layer.stored is not None or not names.isdisjoint((layer.name, *layer.onnx_layers))]
    floating = [f"{layer.name} ({' x '.join(layer.inputs)})" for layer in judged if not layer.integer]
    found = 1 - len(floating) / len(judged) if judged else 0.0
    if found < share:
        shown = ", ".join(floating[:10]) + (f" and {len(floating) - 10} more" if len(floating) > 10 else "")
        raise EngineError(
            f"require_int8={share:g}, but {found:.0%} of {len(judged)} convolutions and matrix products with weights compute "
            f"in integers. Not in integers: {shown}. Both the input and the weight of a layer need a quantizer."
        )
