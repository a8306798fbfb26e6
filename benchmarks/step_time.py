"""What one training step costs with each quantizer, against the same step in FP32, interleaved in one run.

    python benchmarks/step_time.py --out benchmarks/results/step_time.json

CIFAR ResNet-20, batch 128, two threads, W4A4 as qakd_plugin.prepare makes it (first and last layer at 8 bits, a quantizer on
each residual branch). A step is forward, cross-entropy, backward and SGD with momentum. Every round runs each variant once, in
turn; ratios are medians over rounds of (variant / FP32 of the same round). Memory is the growth of a fresh process's peak over
what it held before the first step, the median of three such processes.

By default glibc gives memory back to the kernel after each step and gets it again, page by page, in the next, which costs a
variant the more, the more memory it needs. The script therefore tells it not to (for all
variants alike; ``--allocator default`` leaves it alone). Whoever trains on a CPU gains by the same settings.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import page_tables
import torch
import torch.nn.functional as F
from torch import nn

from qakd_plugin import EWGS, LSQ, PACT, DoReFa, prepare, use_quantizers
from qakd_plugin._common.console import track
from qakd_plugin.demo.net import Block
from qakd_plugin.quantizers.compiled import compiled_kernels
from qakd_plugin.runtimes.host import environment, is_busy
from qakd_plugin.toolkits import adapter_for

BARS = {
    "ModelOpt LSQ": 1.30,
    "ModelOpt LSQ, channels_last": 1.30,
    "ModelOpt EWGS": 1.40,
    "ModelOpt EWGS, channels_last": 1.40,
}
MEMORY_BAR = 1.25
RESULTS = page_tables.RESULTS / "step_time.json"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the largest that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
CHANNELS_LAST, COMPILED = ", channels_last", ", compiled"
"""In a variant's name: the network and its input lie in memory that way; learned quantizers run in compiled kernels."""
VARIANTS: dict[str, tuple[str | None, Any]] = {
    "FP32": (None, None),
    "FP32, channels_last": (None, None),
    "ModelOpt, its own": ("modelopt", None),
    "ModelOpt LSQ": ("modelopt", LSQ()),
    "ModelOpt LSQ, channels_last": ("modelopt", LSQ()),
    "ModelOpt LSQ, compiled": ("modelopt", LSQ()),
    "ModelOpt LSQ, channels_last, compiled": ("modelopt", LSQ()),
    "ModelOpt PACT": ("modelopt", PACT()),
    "ModelOpt DoReFa": ("modelopt", DoReFa()),
    "ModelOpt EWGS": ("modelopt", EWGS()),
    "ModelOpt EWGS, channels_last": ("modelopt", EWGS()),
    "PT2E, its own": ("pt2e", None),
    "PT2E LSQ": ("pt2e", LSQ()),
    "torch.ao FX, its own": ("torch_ao", None),
    "torch.ao FX LSQ": ("torch_ao", LSQ()),
}


def keep_memory() -> None:
    """Start this script again, unless it runs already with an allocator that keeps what it has."""
    if any(os.environ.get(key) != value for key, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})  # glibc reads them at the start


class ResNet20(nn.Sequential):
    """He et al., 2015, for 32x32 images and ten classes."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        width = 16
        for stage, outputs in enumerate((16, 32, 64)):
            for index in range(3):
                blocks.append(Block(width, outputs, 2 if stage and not index else 1))
                width = outputs
        stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def make_step(variant: str, batch: int) -> Callable[[], None]:
    """One training step of a variant, ready to be called."""
    toolkit, quantizer = VARIANTS[variant]
    torch.manual_seed(0)
    model: nn.Module = ResNet20().eval()
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    if toolkit is None:
        model.train()
    else:
        model = prepare(model, [x[:32]], toolkit, weight_bits=4, activation_bits=4)
        if quantizer is not None:
            use_quantizers(model, quantizer)
        adapter_for(model).set_mode(model, True)
    if CHANNELS_LAST in variant:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if COMPILED in variant:
        with compiled_kernels(x.device):
            pass  # what compiling takes is no part of a step

    def step() -> None:
        with compiled_kernels(x.device) if COMPILED in variant else nullcontext():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak_growth(make: Callable[..., Callable[[], None]], arguments: tuple[Any, ...], queue: Any) -> None:
    torch.set_num_threads(2)
    step = make(*arguments)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what preparing freed must not hide what a step takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mib("VmRSS")
    for _ in range(4):
        step()
    queue.put(memory_mib("VmHWM") - before)


def memory_mib(key: str) -> float:
    """Of this process, from Linux's /proc: "VmRSS" now, "VmHWM" at its largest."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def peak_growth_mib(make: Callable[..., Callable[[], None]], *arguments: Any, processes: int = 3) -> float:
    """Peak resident memory of four steps in a fresh process, above what was there before the first.

    Args:
        make: a function of a module, which makes a step.
        *arguments: for it.
        processes: whose median it is; what the allocator keeps differs by a tenth from one to the next.
    """
    context = multiprocessing.get_context("spawn")
    queue, grown = context.Queue(), []
    for _ in range(processes):
        process = context.Process(target=_peak_growth, args=(make, arguments, queue))
        process.start()
        grown.append(float(queue.get(timeout=600)))
        process.join()
    return statistics.median(grown)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS)[1:], help="may be repeated; all by default")
    parser.add_argument("--out", type=Path, help="JSON file; docs/measured.md is written with the committed one")
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep", help="what glibc does with freed memory")
    options = parser.parse_args()
    if options.allocator == "keep":
        keep_memory()
    torch.set_num_threads(options.threads)
    busy = is_busy()
    names = ["FP32", *(options.variant or list(VARIANTS)[1:])]
    steps = {name: make_step(name, options.batch) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_index in track(range(options.rounds + 3), "rounds"):
        for name in names[round_index % len(names) :] + names[: round_index % len(names)]:
            started = time.perf_counter()
            steps[name]()
            if round_index >= 3:
                times[name].append(time.perf_counter() - started)
    del steps
    memory = {name: peak_growth_mib(make_step, name, options.batch) for name in track(names, "memory")}
    rows = []
    for name in names:
        ratios = sorted(t / base for t, base in zip(times[name], times["FP32"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(
            {
                "variant": name,
                "step_ms": 1e3 * statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "peak_growth_mib": memory[name],
                "memory_ratio": memory[name] / memory["FP32"],
            }
        )
        row = rows[-1]
        print(
            f"{name:22s} {row['step_ms']:7.1f} ms   {row['ratio']:.2f}x ({quartiles[0]:.2f}..{quartiles[2]:.2f})   "
            f"{row['peak_growth_mib']:6.0f} MiB   {row['memory_ratio']:.2f}x"
        )
        if name in BARS:
            time_met, memory_met = row["ratio"] <= BARS[name], row["memory_ratio"] <= MEMORY_BAR
            print(f"    time bar {BARS[name]:.2f}x {_verdict(time_met)}, memory bar {MEMORY_BAR}x {_verdict(memory_met)}")
    if busy:
        print("The machine was busy when this began: take the ratios with care.")
    if options.out:
        document = {
            "environment": environment(),
            "settings": {k: v for k, v in vars(options).items() if k != "out"},
            "rows": rows,
        }
        page_tables.write_results(options.out, document, RESULTS, {"step_time": make_table(document)})
        print(options.out)


def make_table(document: dict[str, Any]) -> str:
    """Markdown: time and memory of each variant over FP32."""
    rows = [
        [row["variant"], f"{row['ratio']:.2f}", f"{row['memory_ratio']:.2f}"]
        for row in document["rows"]
        if row["variant"] != "FP32"
    ]
    return page_tables.markdown(["quantizers", "time", "peak memory"], rows)


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
