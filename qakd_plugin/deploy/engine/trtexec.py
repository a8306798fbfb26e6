"""NVIDIA's own command line for the engine that :func:`.build.build_engine` builds."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from .precheck import Shape, inspect_onnx
from .profile import Sizes, profile_shapes


def trtexec_command(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str],
    inputs: Mapping[str, Sequence[int | str | None]],
    *,
    runtime: str = "tensorrt",
    min_batch: int = 1,
    opt_batch: int = 8,
    max_batch: int = 64,
    sizes: Sizes | None = None,
    capabilities: Sequence[str] = (),
) -> str:
    """The command line of NVIDIA's own tool that builds the same engine: ``trtexec``, or ``tensorrt_rtx``.

    Args:
        onnx_path: canonical ONNX file.
        engine_path: where the engine goes.
        inputs: sizes of every input by name, None for the dynamic batch, names of other dynamic dimensions: from
            :func:`input_shape`.
        runtime: "tensorrt" or "tensorrt_rtx".
        min_batch: of the optimization profile.
        opt_batch: likewise.
        max_batch: likewise.
        sizes: likewise of the other dynamic dimensions: smallest, tuned for and largest, by name.
        capabilities: as in the manifest; RTX only.

    Raises:
        EngineError: a dynamic dimension has no sizes.
    """
    rtx = runtime == "tensorrt_rtx"
    words = [
        "tensorrt_rtx" if rtx else "trtexec",
        f"--onnx={os.fspath(onnx_path)}",
        f"--saveEngine={os.fspath(engine_path)}",
        "--skipInference",
    ]
    if not rtx:
        words.append("--stronglyTyped")
    elif list(capabilities) == ["CURRENT"]:
        words.append("--useGpu")
    elif capabilities:
        words.append("--computeCapabilities=" + ",".join(name.removeprefix("SM") for name in capabilities))
    if any(not isinstance(size, int) for shape in inputs.values() for size in shape):
        shapes = profile_shapes(inputs, (min_batch, opt_batch, max_batch), sizes)
        for index, key in enumerate(("min", "opt", "max")):
            parts = (f"{name}:{'x'.join(map(str, of[index]))}" for name, of in shapes.items())
            words.append(f"--{key}Shapes=" + ",".join(parts))
    return shlex.join(words)


def input_shape(onnx_path: str | os.PathLike[str]) -> dict[str, Shape]:
    """Sizes of every input of an ONNX file by name; None for a dynamic batch, the name of any other dynamic dimension."""
    return inspect_onnx(onnx_path).inputs
