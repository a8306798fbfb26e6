"""Canonical ONNX -> TensorRT engine, with a manifest that says what is in it and proves that it is that file.

An engine is executable code. It is written together with ``<engine>.json``, which holds its SHA-256, and is only ever loaded
when
both match.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from .._files import write_atomic
from ..errors import EngineError
from .graph import constant
from .plan import PlanLayer, count, read_plan
from .trt import PORTABLE_CAPABILITIES, Runtime, collecting_logger, load_runtime

FORMAT = 1
"""Version of the manifest's layout."""


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


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    runtime: str = "auto",
    *,
    min_batch: int = 1,
    opt_batch: int = 8,
    max_batch: int = 64,
    capabilities: Sequence[str] | None = None,
    require_int8: float | None = None,
) -> EngineInfo:
    """Build a strongly typed engine from a canonical ONNX file: every precision is the one its Q/DQ nodes say.

    TensorRT-RTX builds without a GPU; the classic TensorRT needs the one it builds for.

    Args:
        onnx_path: from ``export_onnx(..., target="tensorrt")``.
        engine_path: where the engine goes; its manifest is ``<engine_path>.json``. Both appear whole or not at all.
        runtime: "tensorrt" (10, 11), "tensorrt_rtx", or "auto".
        min_batch: smallest batch of the optimization profile.
        opt_batch: the batch it is tuned for.
        max_batch: largest batch.
        capabilities: RTX only: GPU generations, such as ("SM89",) or ("CURRENT",); several portable ones by default.
        require_int8: smallest share of convolutions and matrix products that must compute in integers.

    Returns:
        Paths and manifest.

    Raises:
        EngineError: the file is no ONNX, holds what TensorRT cannot take (names the node), does not parse or build, or fewer
            layers
            than required compute in integers (names those that do not).
        MissingPackageError: no TensorRT is installed.
    """
    if not 0 < min_batch <= opt_batch <= max_batch:
        raise EngineError(f"0 < min_batch <= opt_batch <= max_batch must hold, got {min_batch}, {opt_batch}, {max_batch}.")
    data = _read_onnx(onnx_path)
    library = load_runtime(runtime)
    plan, targets = _build(library, data, str(onnx_path), (min_batch, opt_batch, max_batch), capabilities)
    layers = read_plan(plan) if library.is_rtx else None
    _require_integers(layers, require_int8)
    manifest = {
        "format": FORMAT,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "bytes": len(plan),
        "onnx": {"file": Path(onnx_path).name, "sha256": hashlib.sha256(data).hexdigest()},
        "runtime": {"name": library.name, "version": library.version},
        "capabilities": targets,
        "profile": {"min": min_batch, "opt": opt_batch, "max": max_batch},
        "convolutions": "unknown" if layers is None else count(layers, "convolution"),
        "matmuls": "unknown" if layers is None else count(layers, "matmul"),
        "layers": "unknown" if layers is None else [asdict(layer) for layer in layers],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    engine = Path(engine_path)
    record = engine.with_name(engine.name + ".json")
    record.unlink(missing_ok=True)  # between the two renames the old manifest must not vouch for the new engine
    write_atomic(engine, plan, EngineError)
    write_atomic(record, json.dumps(manifest, indent=2) + "\n", EngineError)
    return EngineInfo(engine, record, manifest)


def verify_engine(engine_path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    """Read an engine that matches its manifest.

    Returns:
        The plan and the manifest.

    Raises:
        EngineError: a file is missing or damaged, the digest differs, or the manifest's format is another.
    """
    engine = Path(engine_path)
    record = engine.with_name(engine.name + ".json")
    for path in (engine, record):
        if not path.is_file():
            raise EngineError(f"{path} does not exist. An engine is only loaded with its manifest: build it with build_engine.")
    try:
        manifest = json.loads(record.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"{record} is not valid JSON ({error}). Build the engine again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EngineError(f"{record}: manifest format {FORMAT} expected. Build the engine again with this version.")
    plan = engine.read_bytes()
    digest = hashlib.sha256(plan).hexdigest()
    if digest != manifest.get("sha256"):
        raise EngineError(
            f"{engine} is not the file its manifest describes (SHA-256 {digest[:12]}..., expected "
            f"{str(manifest.get('sha256'))[:12]}...). "
            "An engine is executable code: it is refused. Build it again from the ONNX file."
        )
    return plan, manifest


def load_engine(engine_path: str | os.PathLike[str]) -> Any:
    """Deserialize an engine that matches its manifest.

    Returns:
        TensorRT's ``ICudaEngine``.

    Raises:
        EngineError: as :func:`verify_engine`; the runtime is another version than the one it was built with; there is no GPU or
            driver.
    """
    plan, manifest = verify_engine(engine_path)
    library = load_runtime(manifest["runtime"]["name"])
    if library.version != manifest["runtime"]["version"]:
        raise EngineError(
            f"{engine_path} was built by {library.name} {manifest['runtime']['version']}, installed is {library.version}. "
            "Build it again with this version."
        )
    logger, messages = collecting_logger(library)
    try:
        engine = library.module.Runtime(logger).deserialize_cuda_engine(plan)
    except (RuntimeError, TypeError) as error:
        engine, messages = None, [*messages, str(error)]
    if engine is None:
        raise EngineError(
            f"{engine_path} cannot be loaded: {_last(messages)} Running an engine needs an NVIDIA GPU and its driver."
        )
    return engine


def trtexec_command(onnx_path: str | os.PathLike[str], engine_path: str | os.PathLike[str], input_shape: Sequence[int]) -> str:
    """The command line of NVIDIA's tool that builds the same engine.

    Args:
        onnx_path: canonical ONNX file.
        engine_path: where the engine goes.
        input_shape: of one sample, without the batch dimension.
    """
    shape = "x".join(str(size) for size in input_shape)
    profile = " ".join(f"--{key}Shapes=input:{batch}x{shape}" for key, batch in (("min", 1), ("opt", 8), ("max", 64)))
    return f"trtexec --onnx={onnx_path} --saveEngine={engine_path} --stronglyTyped {profile}"


def input_shape(onnx_path: str | os.PathLike[str]) -> list[int]:
    """Sizes of the first input, without the batch dimension."""
    model = ir.load(onnx_path)
    shape = model.graph.inputs[0].shape
    return [] if shape is None else [int(size) if isinstance(size, int) else -1 for size in shape][1:]


def _read_onnx(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes, if TensorRT will take it as it is meant."""
    try:
        data = Path(path).read_bytes()
        model = ir.serde.deserialize_model(onnx.ModelProto.FromString(data))
    except FileNotFoundError as error:
        raise EngineError(f"{path} does not exist. Export it first with export_onnx(..., target='tensorrt').") from error
    except Exception as error:  # protobuf and onnx-ir raise many kinds of errors on foreign bytes; all mean the same here
        raise EngineError(f"{path} is not a readable ONNX file ({type(error).__name__}: {str(error)[:120]}).") from error
    if not model.graph.inputs or len(model.graph) == 0:
        raise EngineError(f"{path} is not a readable ONNX file: it holds no graph.")
    for node in model.graph:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            _check_quantizer(node)
    return data


def _check_quantizer(node: ir.Node) -> None:
    """Refuse what TensorRT rejects late, or, worse, misreads: it takes unsigned codes for signed ones without a word."""
    scale = constant(node.inputs[1])
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    codes = constant(node.inputs[0])
    advice = "Export with target='tensorrt' from a symmetric configuration."
    if scale is not None and not bool(np.all(np.isfinite(scale) & (scale > 0))):
        raise EngineError(f"{node.name}: its scale must be finite and positive. {advice}")
    if zero_point is not None and bool(np.any(zero_point.astype(np.int64) != 0)):
        raise EngineError(f"{node.name}: zero point {int(zero_point.flatten()[0])}: TensorRT takes 0 only. {advice}")
    unsigned = zero_point is not None and zero_point.dtype == np.uint8
    if unsigned or (zero_point is None and node.op_type == "QuantizeLinear" and "output_dtype" not in node.attributes):
        raise EngineError(f"{node.name}: unsigned codes: TensorRT would read them as signed. {advice}")
    if codes is not None and codes.dtype == np.int32:
        raise EngineError(f"{node.name}: a bias quantized to int32: TensorRT takes float biases. {advice}")


def _build(
    library: Runtime, data: bytes, name: str, batches: tuple[int, int, int], capabilities: Sequence[str] | None
) -> tuple[bytes, list[str]]:
    trt = library.module
    logger, messages = collecting_logger(library)
    builder = trt.Builder(logger)
    if builder is None:
        raise EngineError(f"{library.name} cannot start: {_last(messages)}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        where = f" at node {problems[0].node_name()!r}" if problems and problems[0].node_name() else ""
        raise EngineError(
            f"{name}: {library.name} cannot take it{where}: {problems[0].desc() if problems else _last(messages)}"
        )
    config = builder.create_builder_config()
    _add_profile(builder, network, config, batches)
    targets = _set_capabilities(library, config, capabilities)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{name}: {library.name} {library.version} failed to build an engine: {_last(messages)}")
    return bytes(plan), targets


def _add_profile(builder: Any, network: Any, config: Any, batches: tuple[int, int, int]) -> None:
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape[1:]):
            raise EngineError(
                f"input {tensor.name!r} has dynamic sizes beside the batch, {shape}: export with a fixed image size."
            )
        if shape and shape[0] < 0:
            dynamic = True
            profile.set_shape(tensor.name, *[(batch, *shape[1:]) for batch in batches])
    if dynamic:
        config.add_optimization_profile(profile)


def _set_capabilities(library: Runtime, config: Any, capabilities: Sequence[str] | None) -> list[str]:
    """RTX compiles for the GPU generations it is told; the classic library for the GPU that is there."""
    if not library.is_rtx:
        if capabilities is not None:
            raise EngineError("capabilities can be chosen for tensorrt_rtx only: TensorRT builds for the GPU at hand.")
        return ["CURRENT"]
    kinds = library.module.ComputeCapability
    chosen = list(PORTABLE_CAPABILITIES if capabilities is None else capabilities)
    for capability in chosen:
        if not hasattr(kinds, capability):
            known = [name for name in dir(kinds) if name.startswith("SM")]
            raise EngineError(f"capability {capability!r} is unknown to {library.name} {library.version}: choose from {known}.")
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        config.set_compute_capability(getattr(kinds, capability), index)
    return chosen


def _require_integers(layers: list[PlanLayer] | None, share: float | None) -> None:
    if share is None:
        return
    if layers is None:
        raise EngineError("require_int8: the plan cannot be read, so the share of integer layers is unknown.")
    floats = [layer.name for layer in layers if not layer.integer]
    found = 1 - len(floats) / len(layers)
    if found < share:
        raise EngineError(
            f"require_int8={share:g}, but {found:.0%} of {len(layers)} convolutions and matrix products compute in integers. "
            "In floating "
            f"point: {', '.join(floats[:10])}{' ...' if len(floats) > 10 else ''}."
        )


def _last(messages: list[str]) -> str:
    return messages[-1].strip() if messages else "no reason given."
