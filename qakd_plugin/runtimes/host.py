"""The machine and the versions that a measurement was made with; no host names, users or paths."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import psutil
from annotated_types import Ge, Le

from .._common.cpu_features import TOLD, cpu_flags

_PACKAGES = (
    "qakd-plugin", "torch", "torchvision", "timm", "nvidia-modelopt", "torchao", "onnx", "onnx-ir", "onnxscript", "onnxruntime",
    "openvino", "tensorrt", "tensorrt-rtx-cu13-bindings", "numpy",
)  # fmt: skip
BUSY_LOAD = 0.5
"""Load average per core above which a measurement is marked as disturbed before it starts."""
BUSY_SHARE = 0.1
"""Share of the processor that others may use during a measurement before it is marked as disturbed."""


_Load = Annotated[float, Ge(0), Le(1e9)]


@dataclass(frozen=True)
class Conditions:
    """How quiet the machine was while a row was measured.

    Attributes:
        load_before: load average of the last minute, before; None where the system has none.
        load_after: after; it counts the measurement itself.
        other_cores: processor cores that other processes used meanwhile, on average.
        clock_mhz: of the processor, after; None where it cannot be read.
        gpu_celsius: of the first NVIDIA GPU, after; None where there is none.
        busy: whether other work may have disturbed the figures.
    """

    load_before: _Load | None
    load_after: _Load | None
    other_cores: _Load
    clock_mhz: int | None
    gpu_celsius: int | None
    busy: bool


def environment() -> dict[str, Any]:
    """Processor, memory, system, versions of what takes part, and how busy the machine is."""
    return {
        "cpu": _cpu_model(),
        "cpu_flags": [flag for flag in TOLD if flag in cpu_flags()],
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "clock_mhz": _clock_mhz(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpu": _gpu("name,driver_version"),
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


class Watch:
    """Observes the machine from when it is made until :meth:`conditions` is asked for."""

    def __init__(self) -> None:
        self._busy, self._load = is_busy(), load_average()
        self._started, self._others = time.perf_counter(), _others_seconds()

    def conditions(self) -> Conditions:
        """What the machine did meanwhile."""
        wall = time.perf_counter() - self._started
        # Ticks are 10 ms: over less than a second their rounding would be a finding of its own. The load average, which also
        # counts what this process did before, has to do then.
        known = wall > 1
        others = max(0.0, _others_seconds() - self._others) / wall if known else 0.0
        temperature = _gpu("temperature.gpu")
        return Conditions(
            load_before=self._load,
            load_after=load_average(),
            other_cores=round(others, 3),
            clock_mhz=_clock_mhz(),
            gpu_celsius=int(temperature) if temperature and temperature.isdecimal() else None,
            busy=others / (psutil.cpu_count() or 1) > BUSY_SHARE if known else self._busy,
        )


def _others_seconds() -> float:
    """Processor time of the whole machine but this process, in seconds since it started."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)  # counted within user time as well
    return float(sum(machine) - idle - guests - own.user - own.system)


def _clock_mhz() -> int | None:
    frequency = psutil.cpu_freq()
    return round(frequency.current) if frequency else None


def _gpu(fields: str) -> str | None:
    """What NVIDIA's driver says of the first GPU; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


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


def _read(path: str, default: str = "unknown") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default
