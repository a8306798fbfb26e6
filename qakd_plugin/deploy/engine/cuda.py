"""The little of CUDA that running an engine takes: buffers, a stream, events, a captured graph.

All of it goes through the CUDA driver: with cuda-python (``cuda.bindings``), which torch's CUDA wheels bring, or with pycuda
where that is what is installed. A device that only runs engines needs one of them, TensorRT, NumPy and pydantic. Both work in
the GPU's primary context, the one that TensorRT and torch use.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..._common.optional import require
from ...errors import EngineError, MissingPackageError
from .bindings import cuda_driver

_LATEST = "Free memory on the GPU, or update its driver."
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


@dataclass(frozen=True)
class Buffer:
    """The same tensor on both sides: ``host`` in page-locked memory, ``address`` on the GPU; ``owner`` keeps both alive."""

    host: npt.NDArray[Any]
    address: int
    owner: Any


class Device(Protocol):
    """One GPU and one stream on it; all work is queued on that stream. ``stream`` is its ``cudaStream_t``."""

    stream: int

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """Memory for one tensor."""

    def upload(self, buffer: Buffer) -> None:
        """Queue the copy from host to GPU."""

    def download(self, buffer: Buffer) -> None:
        """Queue the copy from GPU to host."""

    def mark(self) -> Any:
        """Queue an event that records its time."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have passed."""

    def synchronize(self) -> None:
        """Wait until everything queued is done."""

    def close(self) -> None:
        """Let go of the GPU; buffers are not to be used afterwards."""


def open_device() -> Device:
    """The first GPU, through cuda-python or, where that is not installed, pycuda.

    Raises:
        MissingPackageError: neither is installed; carries the pip line.
        EngineError: there is no GPU, or it cannot be opened.
    """
    if cuda_driver() is None:
        raise EngineError("EngineRunner needs an NVIDIA GPU and its driver, and none was found. Run the ONNX file instead.")
    try:
        return CudaPythonDevice(require("cuda.bindings.driver", extra="cuda", purpose="run engines"))
    except MissingPackageError:
        if importlib.util.find_spec("pycuda") is None:
            raise
    return PycudaDevice(require("pycuda.driver", extra="pycuda", purpose="run engines"))


class CudaPythonDevice:
    """Through NVIDIA's own bindings of the driver. The context is current in the thread that made it: use it there only.

    Args:
        driver: ``cuda.bindings.driver``.
    """

    def __init__(self, driver: ModuleType) -> None:
        self._driver = driver
        self._call("cuInit", 0)
        gpu = self._call("cuDeviceGet", 0)
        with ExitStack() as undo:
            context = self._call("cuDevicePrimaryCtxRetain", gpu)
            undo.callback(self._call, "cuDevicePrimaryCtxRelease", gpu)
            self._call("cuCtxPushCurrent", context)
            undo.callback(self._call, "cuCtxPopCurrent")
            # Not the default stream: TensorRT synchronizes more on that one.
            self._stream = self._call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            undo.callback(self._call, "cuStreamDestroy", self._stream)
            undo.callback(self.synchronize)
            self._undo = undo.pop_all()
        self.stream = int(self._stream)

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        pinned = _Owned(self._driver, "cuMemFreeHost", self._call("cuMemHostAlloc", size, 0))
        device = _Owned(self._driver, "cuMemFree", self._call("cuMemAlloc", size))
        memory: Any = (ctypes.c_byte * size).from_address(int(pinned.handle))
        host = np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)
        host[...] = 0
        return Buffer(host, int(device.handle), (pinned, device))

    def upload(self, buffer: Buffer) -> None:
        pinned, device = buffer.owner
        self._call("cuMemcpyHtoDAsync", device.handle, pinned.handle, buffer.host.nbytes, self._stream)

    def download(self, buffer: Buffer) -> None:
        pinned, device = buffer.owner
        self._call("cuMemcpyDtoHAsync", pinned.handle, device.handle, buffer.host.nbytes, self._stream)

    def mark(self) -> Any:
        event = _Owned(self._driver, "cuEventDestroy", self._call("cuEventCreate", 0))
        self._call("cuEventRecord", event.handle, self._stream)
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start.handle, end.handle))

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        self._undo.close()

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a function of the driver returns beside its status."""
        status, *values = getattr(self._driver, function)(*arguments)
        if int(status):
            raise EngineError(f"{function} failed with CUDA error {getattr(status, 'name', int(status))}. {_LATEST}")
        return values[0] if values else None


class _Owned:
    """What the driver made, given back to it when nobody holds it any more."""

    def __init__(self, driver: ModuleType, free: str, handle: Any) -> None:
        self.handle = handle
        self._free = getattr(driver, free)

    def __del__(self) -> None:
        self._free(self.handle)


class PycudaDevice:
    """Through pycuda. The context is current in the thread that made the device: use it there only."""

    def __init__(self, driver: ModuleType) -> None:
        self._driver = driver
        driver.init()
        self._context = driver.Device(0).retain_primary_context()
        self._context.push()
        try:
            self._stream = driver.Stream()
        except BaseException:
            self._leave()
            raise
        self._open = True
        atexit.register(self.close)  # pycuda aborts the process if a context is still current when it is torn down
        self.stream = int(self._stream.handle)

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        host = self._driver.pagelocked_empty(shape, np.dtype(dtype))
        device = self._driver.mem_alloc(max(1, host.nbytes))
        return Buffer(host, int(device), device)

    def upload(self, buffer: Buffer) -> None:
        self._driver.memcpy_htod_async(buffer.owner, buffer.host, self._stream)

    def download(self, buffer: Buffer) -> None:
        self._driver.memcpy_dtoh_async(buffer.host, buffer.owner, self._stream)

    def mark(self) -> Any:
        event = self._driver.Event()
        event.record(self._stream)
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.time_till(end))

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            try:
                self.synchronize()
            finally:
                self._leave()

    def _leave(self) -> None:
        self._context.pop()
        self._context.detach()


class CudaGraph:
    """What a function queues on a stream, captured once and launched as a whole.

    Through the driver itself, so that it works the same with cuda-python and with pycuda, which has no graphs.

    Args:
        driver: from :func:`~qakd_plugin.deploy.engine.bindings.cuda_driver`.
        stream: ``cudaStream_t``.
        enqueue: queues work on that stream and nothing else; returns whether it could.

    Raises:
        EngineError: something that it does cannot be captured.
    """

    def __init__(self, driver: ctypes.CDLL, stream: int, enqueue: Callable[[], bool]) -> None:
        self._driver, self._stream = driver, ctypes.c_void_p(stream)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            captured = enqueue()
        finally:
            ended = driver.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        try:
            if not captured or ended:
                raise EngineError(
                    f"the engine cannot be captured in a CUDA graph (CUDA error {ended}). Launch it call by call: "
                    "cuda_graph=False."
                )
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            if graph:
                driver.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Queue everything that was captured."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Free it."""
        if self._executable:
            self._driver.cuGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status:
            raise EngineError(f"{function} failed with CUDA error {status}. {_LATEST}")
