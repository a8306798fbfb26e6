"""NVIDIA's own command line for the engine that :func:`.build.build_engine` builds."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from .precheck import inspect_onnx


def trtexec_command(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    inputs: Mapping[str, Sequence[int | None]],
    *,
    runtime: str = "tensorrt",
    min_batch: int = 1,
    opt_batch: int = 8,
    max_batch: int = 64,
    capabilities: Sequence[str] = (),
) -> str:
    """The command line of NVIDIA's own tool that builds the same engine: ``trtexec``, or ``tensorrt_rtx``.

    Args:
        onnx_path: canonical ONNX file.
        engine_path: where the engine goes.
        inputs: sizes of every input by name, None for the dynamic batch: from :func:`input_shape` or a manifest.
        runtime: "tensorrt" or "tensorrt_rtx".
        min_batch: of the optimization profile.
        opt_batch: likewise.
        max_batch: likewise.
        capabilities: as in the manifest; RTX only.
    """
    rtx = runtime == "tensorrt_rtx"
    words = ["tensorrt_rtx" if rtx else "trtexec", f"--onnx={onnx_path}", f"--saveEngine={engine_path}", "--skipInference"]
    if not rtx:
        words.append("--stronglyTyped")
    elif list(capabilities) == ["CURRENT"]:
        words.append("--useGpu")
    elif capabilities:
        words.append("--computeCapabilities=" + ",".join(name.removeprefix("SM") for name in capabilities))
    if any(None in shape for shape in inputs.values()):
        for key, batch in (("min", min_batch), ("opt", opt_batch), ("max", max_batch)):
            sizes = ("x".join(str(batch if size is None else size) for size in shape) for shape in inputs.values())
            words.append(f"--{key}Shapes=" + ",".join(f"{name}:{size}" for name, size in zip(inputs, sizes, strict=True)))
    return shlex.join(words)


def input_shape(onnx_path: str | os.PathLike[str]) -> dict[str, tuple[int | None, ...]]:
    """Sizes of every input of an ONNX file by name; None for a dynamic batch."""
    return inspect_onnx(onnx_path).inputs
