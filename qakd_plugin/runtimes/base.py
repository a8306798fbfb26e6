"""What a runtime is here: something that has loaded a file, or holds a module, and computes one batch after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from ..errors import QakdError

Array = npt.NDArray[Any]
FileRuntime = Literal["onnxruntime", "openvino"]
FILE_RUNTIMES: tuple[FileRuntime, ...] = ("onnxruntime", "openvino")
MODULE_RUNTIMES = ("torch", "torch.compile")
RUNTIMES = (*FILE_RUNTIMES, "tensorrt", *MODULE_RUNTIMES)

DYNAMIC_INT8 = "dynamic int8"
"""A precision: beside weights that alone are quantized, the runtime rounds activations to 8 bits, with scales that it takes
from each call's numbers. Nothing of that was trained or proven."""


OTHER_INPUTS = "Pass inputs as it was exported for, or export it for these."
"""What to do where a file or module fails on a batch."""

EXPORT_AGAIN = "Export it again."
"""What to do with a file that cannot be loaded."""


@dataclass(frozen=True)
class Input:
    """What a runner takes under one name.

    Attributes:
        shape: its sizes, None for open ones; None as a whole where nothing is known of them, as of a module.
        dtype: its type; None where it is not known.
    """

    shape: tuple[int | None, ...] | None
    dtype: np.dtype[Any] | None


class Runner(Protocol):
    """A loaded file or a module: named arrays in, named arrays out."""

    @property
    def runtime(self) -> str:
        """Its name."""

    @property
    def precision(self) -> str:
        """Of what is not quantized: "float32", "float16", "bfloat16", "dynamic int8"."""

    @property
    def load_ms(self) -> float | None:
        """Of the file; None where there is none."""

    @property
    def inputs(self) -> Mapping[str, Input]:
        """By the file's own names, in its order; of a module, what its forward takes."""

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """The file's own names, in its order; None of a module, which tells them when it runs."""

    def fit(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Its inputs by its own names and in its types, so that a call has nothing left to convert.

        Args:
            inputs: by name, or by position: {"0": ..}.

        Raises:
            QakdError: they are not those that it takes (:func:`fitted`).
        """

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call: outputs by name. Inputs are what :meth:`fit` takes."""

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


def random_inputs(expected: Mapping[str, Input], count: int, *, least: int = 1) -> dict[str, Array]:
    """Numbers between 0 and 1 for inputs that are floats of fixed sizes: for latency, which hardly depends on them.

    Args:
        expected: inputs of a file.
        count: samples of each input; fewer where they are large, so that all inputs together take 256 MiB.
        least: samples of each input in any case.

    Raises:
        QakdError: an input holds something else than floats, leaves sizes open, or takes more than 1 GiB for a sample.
    """
    arrays: dict[str, Array] = {}
    shapes = {name: _sample_shape(name, spec) for name, spec in expected.items()}
    sample_bytes = sum(4 * math.prod(shape) for shape in shapes.values())
    if sample_bytes > _LARGEST_SAMPLE:
        largest = max(shapes, key=lambda name: math.prod(shapes[name]))
        raise QakdError(
            f"its input {largest!r} of {list(shapes[largest])} takes {sample_bytes / 2**30:.3g} GiB for one sample, too much "
            "to be drawn at random"
        )
    draw, count = np.random.default_rng(0), max(least, min(count, _ALL_SAMPLES // max(sample_bytes, 1)))
    for name, shape in shapes.items():
        try:
            arrays[name] = draw.random((count, *shape), dtype=np.float32)
        except MemoryError as error:
            raise QakdError(f"its input {name!r}: {count} samples of {list(shape)} do not fit into memory") from error
    return arrays


_LARGEST_SAMPLE = 2**30
_ALL_SAMPLES = 2**28
"""Bytes of random inputs."""


def _sample_shape(name: str, spec: Input) -> tuple[int, ...]:
    if spec.dtype is None or spec.dtype.kind != "f":
        raise QakdError(f"its input {name!r} holds {spec.dtype}, which is not drawn at random")
    sizes = [size for size in (spec.shape or ())[1:] if size is not None and size >= 0]
    if not spec.shape or len(sizes) < len(spec.shape) - 1:
        raise QakdError(f"its input {name!r} has no fixed size")
    return tuple(sizes)


def fitted(expected: Mapping[str, Input], given: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays by the names of a file's inputs, in its order and in its types.

    Floats become the file's float type, whatever its width; everything else is converted only where no number changes, and
    floats never become integers.

    Args:
        expected: inputs of the file.
        given: by the same names, or by position: {"0": ..} is the file's only input, whatever its name.

    Raises:
        QakdError: a name is missing or unknown, a shape or a type does not fit; says what the file takes.
    """
    if given.keys() != expected.keys():
        if list(given) != [str(index) for index in range(len(expected))]:
            raise QakdError(
                f"inputs: the file takes {', '.join(map(repr, expected))}, got {_described(given)}. Yield a mapping with these "
                "names, or pass batch_fn=lambda batch: ({name: array, ...}, targets)."
            )
        given = dict(zip(expected, given.values(), strict=True))
    return {name: _fit(name, wanted, given[name]) for name, wanted in expected.items()}


def _fit(name: str, wanted: Input, array: Array) -> Array:
    if wanted.shape is not None:
        fits = len(wanted.shape) == array.ndim and all(
            size in (None, got) for size, got in zip(wanted.shape, array.shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in wanted.shape)
            raise QakdError(f"input {name!r} takes shape [{sizes}], got {list(array.shape)}.")
    return array if wanted.dtype in (None, array.dtype) else _converted(name, wanted.dtype, array)


def _converted(name: str, dtype: np.dtype[Any], array: Array) -> Array:
    if array.dtype.kind == dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(dtype)
    if array.dtype.kind in "iub" and dtype.kind in "iubf" and _holds(dtype, array):
        return array.astype(dtype)
    raise QakdError(
        f"input {name!r} takes {dtype}, got {array.dtype}"
        f"{' with numbers that it cannot hold' if array.dtype.kind in 'iub' else ''}. Convert it in the loader or in batch_fn."
    )


def _holds(dtype: np.dtype[Any], whole: Array) -> bool:
    """Whether a type has each of some whole numbers."""
    if whole.size == 0 or dtype == np.bool_:
        return bool(np.isin(whole, (0, 1)).all())
    if dtype.kind == "f":
        return bool(np.array_equal(whole.astype(dtype).astype(whole.dtype), whole))
    limits = np.iinfo(dtype)
    return limits.min <= int(whole.min()) and int(whole.max()) <= limits.max


def _described(given: Mapping[str, Array]) -> str:
    positions = list(given) == [str(index) for index in range(len(given))]
    names = "nothing" if not given else ", ".join(map(repr, given))
    return f"{len(given)} without a name" if positions and given else names
