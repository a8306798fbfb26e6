"""TensorRT and TensorRT-RTX behind one face. Nothing here, or in what builds on it, needs torch.

The three libraries (TensorRT 10, TensorRT 11, TensorRT-RTX) share one API as far as a strongly typed network goes. What
differs is
where it is imported from, that RTX compiles for named GPU generations, and that only the classic one has a timing cache.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..errors import EngineError, MissingPackageError

_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_PIP = {
    "tensorrt": "pip install 'qakd-plugin[tensorrt]'",
    "tensorrt_rtx": "pip install 'qakd-plugin[tensorrt-rtx]'",
}
PORTABLE_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""GPU generations an RTX engine is built for where no GPU says which one to take: Ampere, Ada, Blackwell."""


@dataclass(frozen=True)
class Runtime:
    """A loaded TensorRT: ``name`` is "tensorrt" or "tensorrt_rtx"."""

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
        MissingPackageError: it is not installed; carries the pip line.
    """
    if name not in {"auto", *_MODULES}:
        raise EngineError(f"runtime={name!r} is unknown: use 'tensorrt', 'tensorrt_rtx' or 'auto'.")
    wanted = list(_MODULES) if name == "auto" else [name]
    for candidate in wanted:
        for module in _MODULES[candidate]:
            try:
                return Runtime(candidate, importlib.import_module(module))
            except (ImportError, OSError) as error:
                problem = error
    lines = " or ".join(_PIP[candidate] for candidate in wanted)
    raise MissingPackageError(f"{' and '.join(wanted)}: not installed ({problem}). Install with: {lines}")


def collecting_logger(runtime: Runtime) -> tuple[Any, list[str]]:
    """A logger for TensorRT that keeps errors and warnings instead of printing them."""
    trt = runtime.module
    messages: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(message)

    return Collector(), messages
