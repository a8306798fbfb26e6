"""The machine and the versions behind a measurement; no host names, users or paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "qakd-plugin", "torch", "torchvision", "timm", "nvidia-modelopt", "torchao", "onnx", "onnx-ir", "onnxscript", "onnxruntime",
    "openvino", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy",
)  # fmt: skip
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
BUSY_LOAD = 0.5
"""Load average per core above which a measurement is marked as disturbed before it starts."""


def environment() -> dict[str, Any]:
    """Processor, memory, system, versions of what takes part, and how busy the machine is."""
    frequency = psutil.cpu_freq()
    return {
        "cpu": _cpu_model(),
        "cpu_flags": [flag for flag in _FLAGS if flag in _cpu_flags()],
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "clock_mhz": round(frequency.current) if frequency else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Of the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def is_busy() -> bool:
    """Whether other work competes for the processor."""
    load, cores = load_average(), psutil.cpu_count() or 1
    return load is not None and load / cores > BUSY_LOAD


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo", "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    for line in _read("/proc/cpuinfo", "").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _read(path: str, default: str = "unknown") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default
