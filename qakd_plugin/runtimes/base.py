"""What a runtime is here: something that has loaded a file, or holds a module, and computes one batch after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from ..errors import QakdError

Array = npt.NDArray[Any]
FILE_RUNTIMES = ("onnxruntime", "openvino")
MODULE_RUNTIMES = ("torch", "torch.compile")
RUNTIMES = (*FILE_RUNTIMES, "tensorrt", *MODULE_RUNTIMES)


class Runner(Protocol):
    """A loaded file. ``run`` takes float32 (N, ...) and returns the first output."""

    @property
    def runtime(self) -> str:
        """Its name."""

    @property
    def precision(self) -> str:
        """Of what is not quantized: "float32", "float16", "bfloat16"."""

    @property
    def load_ms(self) -> float | None:
        """Of the file; None where there is none."""

    def run(self, images: Array) -> Array:
        """One call."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True)
class LayerTime:
    """One node of the graph that a runtime really ran, in a pass of its own that records times.

    Attributes:
        name: that the runtime gave it, mostly the layer's.
        op: what it is.
        precision: of what it reads (ONNX Runtime) or computes in (OpenVINO).
        time_ms: median over the calls of the pass.
    """

    name: str
    op: str
    precision: str
    time_ms: Annotated[float, Ge(0), Le(1e9)]


def median_ms(times: Sequence[float]) -> float:
    """Not the mean: one interruption by the system lasts longer than most layers. 0 of no times."""
    return float(np.median(times)) if len(times) else 0.0


def check_shape(name: str, expected: Sequence[Any], images: Array) -> None:
    """Refuse a batch that does not fit an input.

    Args:
        name: of the input.
        expected: its sizes; anything but a positive number stands for any size.
        images: the batch.

    Raises:
        QakdError: says what the input takes.
    """
    fixed = [size if isinstance(size, int) and size > 0 else None for size in expected]
    fits = len(fixed) == images.ndim and all(want in (None, got) for want, got in zip(fixed, images.shape, strict=True))
    if not fits:
        raise QakdError(f"loader: the file's input {name!r} takes shape {list(expected)}, a batch has {list(images.shape)}.")
