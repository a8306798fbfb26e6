"""TensorRT and TensorRT-RTX behind one face: the only place that imports either.

TensorRT 10, TensorRT 11 and TensorRT-RTX share one API as far as a strongly typed network goes. What differs, and is hidden
here: where they are imported from, that RTX compiles for GPU generations named in advance, and how they report. Nothing here
needs torch or ONNX.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..._common.optional import pip_line
from ...errors import EngineError, MissingPackageError

# The wheel of RTX's bindings has the second name; its meta package adds the first.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
RUNTIMES = tuple(_MODULES)
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}

PORTABLE_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""GPU generations an RTX engine is built for where none is at hand: Ampere, Ada and Blackwell, as RTX's own default."""

_CUDA_MAJOR, _CUDA_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Runtime:
    """An imported TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        module: what was imported.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"


def load_runtime(name: str = "auto") -> Runtime:
    """Import TensorRT.

    Args:
        name: "tensorrt", "tensorrt_rtx", or "auto": the first of the two that is installed.

    Raises:
        EngineError: the name is unknown.
        MissingPackageError: it is not installed, or its libraries are not; carries the pip line.
    """
    if name not in {"auto", *_MODULES}:
        raise EngineError(f"runtime={name!r} is unknown: use 'tensorrt', 'tensorrt_rtx' or 'auto'.")
    wanted = list(_MODULES) if name == "auto" else [name]
    problems = []
    for candidate in wanted:
        for module in _MODULES[candidate]:
            try:
                return Runtime(candidate, importlib.import_module(module))
            except (ImportError, OSError) as error:  # OSError: the bindings are there, a shared library is not
                problems.append(f"{module}: {error}")
    lines = " or ".join(pip_line(_EXTRAS[candidate]) for candidate in wanted)
    raise MissingPackageError(f"{' and '.join(wanted)} cannot be imported ({'; '.join(problems)}). Install with: {lines}")


def cuda_driver() -> ctypes.CDLL | None:
    """The CUDA driver's library; None where there is none, or no GPU that it can drive."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    return driver


def gpu_capability() -> str | None:
    """Generation of the first GPU, such as "SM89"; None where there is no GPU or no driver."""
    driver = cuda_driver()
    if driver is None:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, _CUDA_MAJOR), (minor, _CUDA_MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"SM{major.value}{minor.value}"


def choose_capabilities(runtime: Runtime, wanted: Sequence[str] | None, gpu: str | None) -> list[str]:
    """GPU generations to build for.

    Args:
        runtime: the library that builds.
        wanted: what the user asked for; None leaves the choice: the GPU at hand where RTX knows its generation, all
            portable ones otherwise.
        gpu: from :func:`gpu_capability`.

    Raises:
        EngineError: the library does not know one of them, or cannot combine them.
    """
    if not runtime.is_rtx:
        if wanted is not None:
            raise EngineError("capabilities: only tensorrt_rtx takes them; tensorrt builds for the GPU at hand. Leave it out.")
        return ["CURRENT"]
    known = [name for name in dir(runtime.module.ComputeCapability) if name.startswith("SM")]
    if wanted is None:
        return ["CURRENT"] if gpu in known else list(PORTABLE_CAPABILITIES)
    unknown = [name for name in wanted if name not in {*known, "CURRENT"}]
    if unknown or not wanted:
        raise EngineError(f"capabilities={list(wanted)}: {runtime.name} {runtime.version} knows {known} and 'CURRENT'.")
    if "CURRENT" in wanted and (len(wanted) > 1 or gpu is None):
        raise EngineError(f"capabilities={list(wanted)}: 'CURRENT' stands alone, and needs a GPU and its driver.")
    return list(dict.fromkeys(wanted))


def collecting_logger(runtime: Runtime) -> tuple[Any, list[str]]:
    """A logger that keeps errors instead of printing them, and the list that it fills."""
    trt = runtime.module
    messages: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(message.strip())

    return Collector(), messages


def progress_monitor(runtime: Runtime, report: Callable[[str], None]) -> Any:
    """A monitor that tells ``report`` which phase of the build has begun, and how far it is."""
    trt = runtime.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total > 1:
                report(f"{phase_name}: {step + 1} of {total}")
            return True  # False would cancel the build

    return Monitor()


def last(messages: Sequence[str]) -> str:
    """The last thing a library said, for an error message."""
    return messages[-1] if messages else "The library gave no reason."
