"""Run an engine, and time its parts apart: copy to the GPU, compute, copy back.

Written from the documented interfaces of TensorRT 10 and 11 and TensorRT-RTX 1.7; it has not yet been run on a GPU.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

from ..._common.files import read_whole, write_atomic
from ...errors import EngineError, QakdError
from ...runtimes.base import Input, fitted
from .bindings import cuda_driver, last, load_runtime
from .cuda import Buffer, CudaGraph, Device, open_device
from .layer_inspector import ask, read_report
from .manifest import LoadedEngine, load_engine, read_manifest
from .rtx_plan import PlanLayer

Array = npt.NDArray[Any]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one call, measured by CUDA events on the GPU's stream.

    Attributes:
        upload_ms: copy of the inputs to the GPU.
        compute_ms: the network.
        download_ms: copy of the outputs back.
    """

    upload_ms: float
    compute_ms: float
    download_ms: float


class EngineRunner:
    """A loaded engine. Fits :class:`qakd_plugin.runtimes.base.Runner`.

    Args:
        path: of the engine; its manifest lies beside it.
        cuda_graph: launch the engine as one CUDA graph where it can be captured.
        runtime_cache: RTX only: file of kernels compiled for this GPU, read where it exists and written by :meth:`close`.
            The next start then compiles nothing.

    Attributes:
        runtime: "tensorrt" or "tensorrt_rtx".
        precision: of what is not quantized.
        load_ms: wall-clock time of reading, checking and loading the engine, once its runtime is imported and CUDA started.

    Raises:
        EngineError: the engine does not match its manifest, belongs to another version or GPU, or there is no GPU.
        MissingPackageError: its runtime is not installed, or neither cuda-python nor pycuda is.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, cuda_graph: bool = True, runtime_cache: str | os.PathLike[str] | None = None
    ) -> None:
        library = load_runtime(read_manifest(path)["runtime"]["name"])
        if runtime_cache is not None and not library.is_rtx:
            raise EngineError("runtime_cache: tensorrt compiles nothing at run time and has none. Leave it out.")
        try:
            device = open_device()
        except EngineError as error:
            raise EngineError(f"{path} cannot be run: {error}") from error
        with ExitStack() as undo:
            undo.callback(device.close)
            started = time.perf_counter()
            loaded = load_engine(path)
            self.runtime, self.precision = loaded.runtime.name, str(loaded.manifest["float_type"])
            self._cache_file = None if runtime_cache is None else Path(runtime_cache)
            context, self._cache = _make_context(loaded, cuda_graph, self._cache_file)
            driver = cuda_driver() if cuda_graph and not loaded.runtime.is_rtx else None  # RTX captures by itself
            self._loaded, self._context = loaded, context
            self._session = EngineSession(loaded, context, device, driver)
            self.load_ms = (time.perf_counter() - started) * 1e3
            undo.callback(self._session.close)
            undo.callback(self._write_cache)
            self._undo = undo.pop_all()

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Names, shapes (None where the profile has a range) and types of the engine's inputs."""
        return self._session.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the engine's outputs."""
        return self._session.outputs

    @overload
    def run(self, inputs: Array) -> Array: ...

    @overload
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def run(self, inputs: Array | Mapping[str, Array]) -> Array | dict[str, Array]:
        """Compute one batch.

        Args:
            inputs: by the engine's names, or by position: {"0": ..}; or the array (N, ...) of its only input. N is within its
                profile.

        Returns:
            All outputs by name; of an array, the first output alone, (N, ...).

        Raises:
            EngineError: a name, shape or type is none that the engine takes, or the GPU failed.
        """
        if isinstance(inputs, Mapping):
            return self._session.run(inputs)
        return self._session.run({"0": inputs})[self.outputs[0]]

    def time(self, inputs: Array | Mapping[str, Array]) -> StageTimes:
        """Compute one batch as :meth:`run` does, and return how long its parts took."""
        return self._session.time(inputs if isinstance(inputs, Mapping) else {"0": inputs})

    def fit(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs by the engine's names and in its types.

        Raises:
            EngineError: they are none that the engine takes.
        """
        return self._session.fit(inputs)

    def layers(self) -> tuple[PlanLayer, ...] | None:
        """Convolutions and matrix products as the engine inspector shows them for the last input; None where it shows none."""
        contents = read_report(ask(self._loaded.runtime, self._loaded.engine, self._context))
        return None if contents is None else contents.layers

    def close(self) -> None:
        """Write the runtime cache and let go of the GPU.

        Raises:
            EngineError: the cache cannot be written; the GPU is let go of all the same.
        """
        self._undo.close()

    def _write_cache(self) -> None:
        if self._cache is not None and self._cache_file is not None:
            write_atomic(self._cache_file, bytes(self._cache.serialize()), EngineError)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class EngineSession:
    """An engine's context with the buffers of one set of input shapes at a time.

    Args:
        loaded: an engine.
        context: its ``IExecutionContext``.
        device: where buffers and the stream are.
        driver: to capture each shape's launch in a CUDA graph; None to launch call by call, as is done with what cannot be
            captured.
    """

    def __init__(self, loaded: LoadedEngine, context: Any, device: Device, driver: Any = None) -> None:
        trt, engine = loaded.runtime.module, loaded.engine
        self._trt, self._engine, self._context, self._device, self._driver = trt, engine, context, device, driver
        self._messages = loaded.messages
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._profiles = {name: _profile(engine, name) for name in inputs}
        self.inputs = {name: _input(trt, engine, name, *self._profiles[name]) for name in inputs}
        self.outputs = tuple(name for name in names if name not in inputs)
        self._buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._graph: CudaGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether calls of the last shape are launched as a CUDA graph captured here."""
        return self._graph is not None

    def fit(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """By the engine's names and in its types; shapes within its profile."""
        try:
            found = fitted({name: replace(spec, shape=None) for name, spec in self.inputs.items()}, inputs)
        except QakdError as error:
            raise EngineError(str(error)) from error
        for name, array in found.items():
            check_shape(name, array.shape, *self._profiles[name])
        return found

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one batch and return its outputs by name."""
        self._fill(inputs)
        self._upload()
        self._launch()
        for name in self.outputs:
            self._device.download(self._buffers[name])
        self._device.synchronize()
        return {name: self._buffers[name].host.copy() for name in self.outputs}

    def time(self, inputs: Mapping[str, Array]) -> StageTimes:
        """Compute one batch and return how long its parts took."""
        self._fill(inputs)
        marks = [self._device.mark()]
        self._upload()
        marks.append(self._device.mark())
        self._launch()
        marks.append(self._device.mark())
        for name in self.outputs:
            self._device.download(self._buffers[name])
        marks.append(self._device.mark())
        self._device.synchronize()
        return StageTimes(*(self._device.elapsed_ms(start, end) for start, end in pairwise(marks)))

    def close(self) -> None:
        """Free the graph and the buffers."""
        if self._graph is not None:
            self._graph.close()
        self._graph, self._shapes = None, None
        self._buffers.clear()

    def _fill(self, inputs: Mapping[str, Array]) -> None:
        found = self.fit(inputs)
        shapes = {name: array.shape for name, array in found.items()}
        if shapes != self._shapes:
            self._bind(shapes)
        for name, array in found.items():
            np.copyto(self._buffers[name].host, array)

    def _upload(self) -> None:
        for name in self.inputs:
            self._device.upload(self._buffers[name])

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Make buffers for input shapes, and warm the engine up on them: the first call may compile and allocate."""
        self.close()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"input {name!r}: the engine refused the shape {list(shape)}. Build it for such shapes.")
        for name in (*self.inputs, *self.outputs):
            size = tuple(self._context.get_tensor_shape(name))
            if any(length < 0 for length in size):
                raise EngineError(
                    f"output {name!r}: its size {list(size)} depends on the data. Leave it out of what is exported."
                )
            buffer = self._device.buffer(size, self._trt.nptype(self._engine.get_tensor_dtype(name)))
            self._context.set_tensor_address(name, buffer.address)
            self._buffers[name] = buffer
        self._launch()
        self._device.synchronize()
        self._shapes = shapes
        if self._driver is not None:
            self._graph = self._captured_launch()

    def _captured_launch(self) -> CudaGraph | None:
        try:
            return CudaGraph(self._driver, self._device.stream, self._enqueue)
        except EngineError as error:
            _log.warning("Engine calls are launched one by one: %s", error)
            return None

    def _launch(self) -> None:
        if self._graph is not None:
            self._graph.launch()
        elif not self._enqueue():
            raise EngineError(f"the engine failed to run: {last(self._messages)} Build it again for this GPU.")

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._device.stream))


def check_shape(name: str, shape: Sequence[int], smallest: Sequence[int], largest: Sequence[int]) -> None:
    """Refuse an input outside the engine's optimization profile.

    Args:
        name: of the input.
        shape: of the array given.
        smallest: sizes of the profile.
        largest: sizes of the profile.

    Raises:
        EngineError: says which sizes the engine takes.
    """
    fits = len(shape) == len(smallest) and all(
        low <= size <= high for size, low, high in zip(shape, smallest, largest, strict=True)
    )
    if not fits:
        takes = [low if low == high else f"{low} to {high}" for low, high in zip(smallest, largest, strict=True)]
        raise EngineError(
            f"input {name!r} takes [{', '.join(map(str, takes))}], got {list(shape)}. Give it batches of that size, or build "
            "the engine with another min_batch and max_batch."
        )


def _profile(engine: Any, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest sizes of an input."""
    smallest, _, largest = engine.get_tensor_profile_shape(name, 0)
    return tuple(smallest), tuple(largest)


def _input(trt: Any, engine: Any, name: str, smallest: tuple[int, ...], largest: tuple[int, ...]) -> Input:
    sizes = (low if low == high else None for low, high in zip(smallest, largest, strict=True))
    return Input(tuple(sizes), np.dtype(trt.nptype(engine.get_tensor_dtype(name))))


def _make_context(loaded: LoadedEngine, cuda_graph: bool, cache_file: Path | None) -> tuple[Any, Any]:
    """An execution context, and the runtime cache that it fills."""
    engine = loaded.engine
    if not loaded.runtime.is_rtx:
        return _ready(loaded, engine.create_execution_context()), None
    trt, cache = loaded.runtime.module, None
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graph else trt.CudaGraphStrategy.DISABLED
    # Compile for the shape at hand before answering, not in the background while it is being measured.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if cache_file is not None:
        cache = config.create_runtime_cache()
        try:
            compiled = read_whole(cache_file) if cache_file.exists() else None
        except OSError as error:
            raise EngineError(
                f"runtime_cache: {cache_file} cannot be read: {error.strerror}. Delete it, or name another."
            ) from error
        if compiled is not None and not cache.deserialize(compiled):
            _log.warning("%s belongs to another GPU, driver or version: it is written anew.", cache_file)
        config.set_runtime_cache(cache)
    return _ready(loaded, engine.create_execution_context(config)), cache


def _ready(loaded: LoadedEngine, context: Any) -> Any:
    if context is None:
        raise EngineError(
            f"the engine cannot be made ready to run: {last(loaded.messages)} Build it for smaller batches if the GPU's "
            "memory is full."
        )
    return context
