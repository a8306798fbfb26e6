"""The little of CUDA that running an engine takes: buffers, a stream, events, a captured graph.

Buffers are torch CUDA tensors where torch can use the GPU, and pycuda's where it is not installed: a device that only runs
engines needs TensorRT, pycuda and NumPy. Both work in the GPU's primary context, the one that TensorRT uses.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..._common.optional import require
from ...errors import EngineError
from .bindings import cuda_driver

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
    """The first GPU, through torch where torch can use it, through pycuda otherwise.

    Raises:
        MissingPackageError: torch cannot use a GPU and pycuda is not installed; carries the pip line.
        EngineError: there is no GPU.
    """
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            return TorchDevice(torch)
    if cuda_driver() is None:
        raise EngineError("Running an engine needs an NVIDIA GPU and its driver; none was found.")
    return PycudaDevice(require("pycuda.driver", extra="pycuda", purpose="run engines without torch"))


class TorchDevice:
    """Through torch's CUDA tensors, streams and events."""

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch
        self._stream = torch.cuda.Stream()  # not the default stream: TensorRT synchronizes more on that one
        self.stream = int(self._stream.cuda_stream)

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        with self._torch.cuda.stream(self._stream):
            host = self._torch.from_numpy(np.zeros(shape, dtype)).pin_memory()
            device = host.to("cuda")
        return Buffer(host.numpy(), int(device.data_ptr()), (host, device))

    def upload(self, buffer: Buffer) -> None:
        host, device = buffer.owner
        with self._torch.cuda.stream(self._stream):
            device.copy_(host, non_blocking=True)

    def download(self, buffer: Buffer) -> None:
        host, device = buffer.owner
        with self._torch.cuda.stream(self._stream):
            host.copy_(device, non_blocking=True)

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()


class PycudaDevice:
    """Through pycuda. The context is current in the thread that made the device: use it there only."""

    def __init__(self, driver: ModuleType) -> None:
        self._driver = driver
        driver.init()
        self._context = driver.Device(0).retain_primary_context()
        self._context.push()
        self._open = True
        atexit.register(self.close)  # pycuda aborts the process if a context is still current when it is torn down
        self._stream = driver.Stream()
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
            self.synchronize()
            self._context.pop()
            self._context.detach()
            atexit.unregister(self.close)


class CudaGraph:
    """What a function queues on a stream, captured once and launched as a whole.

    Through the driver itself, so that it works the same beside torch and beside pycuda, which has no graphs.

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
                raise EngineError(f"the engine cannot be captured in a CUDA graph (CUDA error {ended}).")
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
            raise EngineError(f"{function} failed with CUDA error {status}.")
