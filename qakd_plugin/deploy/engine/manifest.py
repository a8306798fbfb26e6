"""An engine and its manifest on disk: written together, loaded only when both match.

An engine is executable code, so it is never deserialized unless its SHA-256 is the one that its manifest recorded when it was
built. Nothing here needs torch or ONNX: this is what a device imports that only runs engines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..._common.files import opened, read_whole
from ...errors import EngineError
from .bindings import Runtime, collecting_logger, gpu_capability, last, load_runtime

FORMAT = 2
"""Version of the manifest's layout."""

Unknown = Literal["unknown"]
"""What a plan does not show."""

_CHUNK = 1 << 22
_LARGEST = 1 << 26
"""Bytes of a manifest: a layer takes a few hundred."""


class _Entries(BaseModel):
    """Nothing is converted; entries of later versions are let through."""

    model_config = ConfigDict(strict=True, frozen=True)


class Source(_Entries):
    """The ONNX file that an engine was built from: its name, and its digest."""

    file: str
    sha256: str


class BuiltBy(_Entries):
    """The runtime that built an engine: "tensorrt" or "tensorrt_rtx", its version, and the module that was imported."""

    name: str
    version: str
    module: str | None = None


class Profile(_Entries):
    """Batch sizes that an engine takes, and the one it is tuned for."""

    min: int
    opt: int
    max: int

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not 0 < self.min <= self.opt <= self.max:
            raise ValueError("0 < min <= opt <= max must hold")
        return self


class Counts(_Entries):
    """How many layers of a kind there are, and how many of them consume integers on both sides."""

    total: int = Field(ge=0)
    int8: int = Field(ge=0)


class Layer(_Entries):
    """A convolution or matrix product: see :class:`.rtx_plan.PlanLayer`."""

    name: str
    kind: Literal["convolution", "matmul"]
    inputs: list[str] = Field(min_length=2, max_length=2)
    onnx_layers: list[str] = []
    stored: str | None = None


class Manifest(_Entries):
    """What is known about an engine; ``model_json_schema()`` is the schema of its file.

    ``inputs`` has None for every dynamic size; ``shapes``, smallest, tuned for and largest of each input, are there where more
    than the batch is dynamic; ``metadata`` is what the ONNX file says of its history. Entries with a default are
    missing in manifests of earlier versions, or where nothing is known.
    """

    format: int = FORMAT
    sha256: str
    bytes: int = Field(ge=0)
    onnx: Source | None = None
    runtime: BuiltBy
    capabilities: list[str]
    gpu: str | None = None
    inputs: dict[str, list[int | None]] | None = None
    float_type: Literal["float16", "float32"]
    quantized: bool | None = None
    profile: Profile | None = None
    shapes: dict[str, list[list[int]]] | None = None
    convolutions: Counts | Unknown = "unknown"
    matmuls: Counts | Unknown = "unknown"
    int4_weights: int | Unknown = "unknown"
    int4_layers: int | Unknown = "unknown"
    layers: list[Layer] | Unknown = "unknown"
    created: str | None = None
    metadata: dict[str, str] = {}


class SealedManifest(Manifest):
    """A manifest with a digest of its own entries. It shows damage; it is no signature."""

    seal: str


@dataclass(frozen=True)
class LoadedEngine:
    """An engine ready to run.

    Attributes:
        engine: TensorRT's ``ICudaEngine``.
        runtime: the library that loaded it.
        messages: what the library complains about, now and while the engine runs.
        manifest: what is known about it.
    """

    engine: Any
    runtime: Runtime
    messages: list[str]
    manifest: dict[str, Any]


def manifest_path(engine_path: str | os.PathLike[str]) -> Path:
    """``<engine>.json``."""
    engine = Path(engine_path)
    return engine.with_name(engine.name + ".json")


def read_manifest(engine_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an engine.

    Raises:
        EngineError: it is missing, damaged, or of another format.
    """
    path = manifest_path(engine_path)
    try:
        data = read_whole(path, _LARGEST + 1)
        if len(data) > _LARGEST:
            raise EngineError(f"{path} has more than {_LARGEST >> 20} MiB: it is no manifest. Build the engine again.")
        manifest = json.loads(data)
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}. An engine is only loaded with its manifest: build it with build_engine."
        ) from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not valid JSON ({type(error).__name__}). Build the engine again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise EngineError(f"{path} has format {str(found)[:40]}, this version reads {FORMAT}. Build the engine again.")
    try:
        SealedManifest.model_validate(manifest)
    except ValidationError as error:
        wrong = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors(include_url=False, include_input=False))
        raise EngineError(
            f"{path} is damaged: {', '.join(wrong)} missing or of the wrong type. Build the engine again."
        ) from error
    if manifest["seal"] != _seal(manifest):
        raise EngineError(f"{path} is damaged: its entries are not those that were written. Build the engine again.")
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a digest of its own entries. It shows damage; it is no signature."""
    return {**manifest, "seal": _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    entries = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def verify_engine(engine_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that an engine is the file that its manifest describes, without loading it.

    Returns:
        The manifest.

    Raises:
        EngineError: a file is missing or damaged, or they do not match.
    """
    manifest = read_manifest(engine_path)
    digest, size = hashlib.sha256(), 0
    try:
        with opened(engine_path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise EngineError(f"{engine_path} cannot be read: {error.strerror}. Build it with build_engine.") from error
    _check_digest(engine_path, manifest, digest.hexdigest(), size)
    return manifest


def load_engine(engine_path: str | os.PathLike[str]) -> LoadedEngine:
    """Deserialize an engine that matches its manifest.

    Returns:
        The engine, with the library that runs it.

    Raises:
        EngineError: as :func:`verify_engine`; it was built by another version of the runtime or for another GPU; there is no
            GPU or no driver.
        MissingPackageError: the runtime that built it is not installed.
    """
    manifest = read_manifest(engine_path)
    library = load_runtime(manifest["runtime"]["name"])
    _check_built_for(engine_path, manifest, library.version)
    try:
        plan = read_whole(engine_path)
    except OSError as error:
        raise EngineError(f"{engine_path} cannot be read: {error.strerror}. Build it with build_engine.") from error
    # The very bytes that were hashed are deserialized: the file may be exchanged between two reads.
    _check_digest(engine_path, manifest, hashlib.sha256(plan).hexdigest(), len(plan))
    logger, messages = collecting_logger(library)
    try:
        engine = library.module.Runtime(logger).deserialize_cuda_engine(plan)
    except (RuntimeError, TypeError) as error:  # what the bindings raise where CUDA cannot start
        raise EngineError(f"{engine_path} cannot be loaded: {last([*messages, str(error)])} {_NEEDS}") from error
    if engine is None:
        raise EngineError(f"{engine_path} cannot be loaded: {last(messages)} {_NEEDS}")
    return LoadedEngine(engine, library, messages, manifest)


_NEEDS = "Running an engine needs an NVIDIA GPU of a generation it was built for, and its driver."


def _check_digest(path: str | os.PathLike[str], manifest: dict[str, Any], digest: str, size: int) -> None:
    if size != manifest["bytes"]:
        raise EngineError(
            f"{path} has {size:,} bytes, its manifest says {manifest['bytes']:,}: it is not the file that was built. "
            "Build it again from the ONNX file."
        )
    if digest != manifest["sha256"]:
        raise EngineError(
            f"{path} is not the file that its manifest describes (SHA-256 {digest[:12]}..., expected "
            f"{manifest['sha256'][:12]}...). An engine is executable code: it is refused. Build it again from the ONNX file."
        )


def _check_built_for(path: str | os.PathLike[str], manifest: dict[str, Any], version: str) -> None:
    built = manifest["runtime"]
    if built["version"] != version:
        raise EngineError(
            f"{path} was built by {built['name']} {built['version']}, installed is {version}. Build it again with this version."
        )
    gpu, here, generations = manifest.get("gpu"), gpu_capability(), manifest["capabilities"]
    built_for = [gpu] if generations == ["CURRENT"] else generations
    if here and any(built_for) and here not in built_for:
        raise EngineError(
            f"{path} was built for a GPU of generation {' or '.join(map(str, built_for))}, this one is {here}. Build it again "
            "on this machine, with tensorrt_rtx for capabilities=['CURRENT']."
        )
