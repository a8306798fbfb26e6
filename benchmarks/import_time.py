"""What importing costs, beside ``import torch``.

    python benchmarks/import_time.py

Each line is a process of its own; they take turns, after one round that is not counted and fills the file cache. The bar:
``import qakd_plugin`` and ``qakd --help`` take at most half a second more than ``import torch``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

LINES = {
    "import torch": ["-c", "import torch"],
    "import qakd_plugin": ["-c", "import qakd_plugin"],
    "import torch, qakd_plugin": ["-c", "import torch, qakd_plugin"],
    "qakd --help": ["-m", "qakd_plugin.cli", "--help"],
    "qakd_plugin.distill": ["-c", "import qakd_plugin; qakd_plugin.distill"],
    "qakd_plugin.export_onnx": ["-c", "import qakd_plugin; qakd_plugin.export_onnx"],
    "qakd_plugin.benchmark": ["-c", "import qakd_plugin; qakd_plugin.benchmark"],
}
BASE = "import torch"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in LINES}
    for turn in range(options.rounds + 1):
        for name, arguments in LINES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds[BASE])
    print(f"{'':28}{'seconds':>8}{'x':>7}{'beyond':>9}   (x and beyond: of {BASE}; medians of {options.rounds})")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:28}{median:8.2f}{median / base:7.2f}{median - base:+9.2f}")


if __name__ == "__main__":
    main()
