"""Peak resident memory of running a file: a process of its own loads it, runs ten calls, and says how large it became.

    python -m qakd_plugin.bench.peak_memory model.onnx onnxruntime float32 1 '{"input": ["float32", [1, 3, 224, 224]]}'

prints how many MiB it took with one thread and one image of 3x224x224. The process is fresh, because what another one allocated
and gave back before would count as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import QakdError
from ..runtimes.base import Array
from .loading import make_runner

CALLS = 10
TIMEOUT_S = 600.0
"""A runtime that has neither loaded a file nor run it ten times by then hangs."""
_WITHOUT = "Leave this runtime out (runtimes=...)."

_STATUS = Path("/proc/self/status")


def peak_rss_mib(
    path: str | os.PathLike[str], runtime: str, precision: str, threads: int, inputs: Mapping[str, Array]
) -> float | None:
    """Measure in a process of its own.

    Args:
        path: ONNX file.
        runtime: "onnxruntime" or "openvino".
        precision: of what is not quantized.
        threads: of the runtime.
        inputs: one batch, by name; the process runs zeros of the same types and shapes.

    Returns:
        MiB, Python and the runtime's library included; None where the system does not tell (it is read from Linux's /proc).

    Raises:
        QakdError: the process failed, took longer than :data:`TIMEOUT_S`, or said no figure; carries the end of what it said.
    """
    if _high_water_mib() is None:
        return None
    shapes = json.dumps({name: (str(array.dtype), array.shape) for name, array in inputs.items()})
    command = [sys.executable, "-m", __name__, os.fspath(path), runtime, precision, str(threads), shapes]
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": root if not known else f"{root}{os.pathsep}{known}"}
    about = f"{path}: running it in a process of its own failed in {runtime}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_S)
    except OSError as error:
        raise QakdError(f"{about}: it cannot be started: {error.strerror or error}. {_WITHOUT}") from error
    except subprocess.TimeoutExpired as error:
        raise QakdError(f"{about}: it was not done after {TIMEOUT_S:.0f} seconds. {_WITHOUT}") from error
    if done.returncode:
        raise QakdError(f"{about}: {' '.join(done.stderr[-300:].split())}. {_WITHOUT}")
    found = re.findall(r"^([0-9.]+) MiB$", done.stdout, re.MULTILINE)  # a runtime may print lines of its own
    if len(found) != 1:
        raise QakdError(f"{about}: expected one line with its memory, got {done.stdout[-300:]!r}.")
    return float(found[0])


def _main(arguments: Sequence[str]) -> None:
    path, runtime, precision, threads, shapes = arguments
    runner = make_runner(path, runtime, int(threads), precision)
    inputs = {name: np.zeros(shape, dtype) for name, (dtype, shape) in json.loads(shapes).items()}
    for _ in range(CALLS):
        runner.run(inputs)
    print(f"{_high_water_mib()} MiB")


def _high_water_mib() -> float | None:
    """Of this process. Not from getrusage: Linux hands its maximum down from the process that started this one."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    return None if found is None else int(found[1]) / 1024


if __name__ == "__main__":
    _main(sys.argv[1:])
