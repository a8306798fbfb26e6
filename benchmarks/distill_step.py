"""What a step of distillation costs against a plain FP32 training step, and whether bfloat16 costs accuracy.

    python benchmarks/distill_step.py --out benchmarks/results/distill_step.json

CIFAR ResNet-20, batch 128, two threads (or ``--device cuda``), W4A4 with LSQ as qakd_plugin.prepare makes it, against
what a user would write by hand: torch.ao FX quantization and a plain loop with a KL loss. A step is the teacher's forward pass
without gradients, the student's forward and backward pass, and SGD with momentum. Every round runs each variant once, in turn;
ratios are medians over rounds of (variant / FP32 of the same round). As in step_time.py, glibc keeps its memory. Peak memory is
that of fresh processes, on the CPU.

The second part trains students on scikit-learn's digits in either precision, three seeds each, and prints accuracies.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import page_tables
import torch
import torch.nn.functional as F
from step_time import ResNet20, keep_memory, peak_growth_mib
from torch import nn

from qakd_plugin import LSQ, QKD, SQAKD, attach, distill, prepare, use_quantizers
from qakd_plugin._common.console import track
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float
from qakd_plugin.runtimes.host import environment, is_busy
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.tasks.evaluation import evaluate
from qakd_plugin.toolkits import adapter_for

RESULTS = page_tables.RESULTS / "distill_step.json"
BARS = {
    "SQAKD, LSQ": 1.50,
    "SQAKD, LSQ, channels_last": 1.50,
    "SQAKD, LSQ, bf16": 1.00,
    "SQAKD, LSQ, bf16, channels_last": 1.00,
}
Step = Callable[[], None]


def fp32(batch: int, device: str, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """The yardstick: labels, no quantizer, no teacher."""
    return _supervised(_resnet(device).train().to(memory_format=layout), batch, device, layout)  # type: ignore[call-overload]


def by_hand(batch: int, device: str) -> Step:
    """torch.ao FX with its own fake-quantizers, and a KL loss in a plain loop."""
    x, _ = _batch(batch, device)
    student = _prepared("torch_ao", x, device)
    teacher = _resnet(device).eval()
    optimizer = _sgd(student)

    def step() -> None:
        with torch.no_grad():
            target = F.softmax(teacher(x) / 4, dim=1)
        loss = 16 * F.kl_div(F.log_softmax(student(x) / 4, dim=1), target, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def labels_only(batch: int, device: str) -> Step:
    """The same student without a teacher: what the teacher adds is the difference to this."""
    x, _ = _batch(batch, device)
    return _supervised(use_quantizers(_prepared("modelopt", x, device), LSQ()), batch, device, torch.contiguous_format)


def _supervised(model: nn.Module, batch: int, device: str, layout: torch.memory_format) -> Step:
    x, y = _batch(batch, device)
    x = x.contiguous(memory_format=layout)
    optimizer = _sgd(model)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def co_studying(batch: int, device: str) -> Step:
    """QKD's second phase: both networks learn."""
    x, y = _batch(batch, device)
    student = use_quantizers(_prepared("modelopt", x, device), LSQ())
    teacher = _resnet(device).train()
    optimizers = [_sgd(student), _sgd(teacher)]
    kd = attach(student, teacher, QKD(0, 1, 1))

    def step() -> None:
        student(x)
        kd.loss(y).backward()
        kd.teacher_loss(y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def ours(
    batch: int,
    device: str,
    *,
    bf16: bool = False,
    compiled: bool = False,
    cached: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> Step:
    """SQAKD with LSQ, prepared by ModelOpt."""
    x, _ = _batch(batch, device)
    x = x.contiguous(memory_format=layout)
    student = use_quantizers(_prepared("modelopt", x, device), LSQ()).to(memory_format=layout)  # type: ignore[call-overload]
    teacher: nn.Module = _resnet(device).eval().to(memory_format=layout)  # type: ignore[call-overload]
    if cached:
        with torch.no_grad():
            teacher = _Recalled(teacher(x))
    if compiled:
        teacher = torch.compile(teacher)
    optimizer = _sgd(student)
    kd = attach(student, teacher, SQAKD(temperature=4.0))

    def step() -> None:
        with _autocast(device, bf16):
            student(x)
        kd.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


VARIANTS: dict[str, Callable[[int, str], Step]] = {
    "FP32": fp32,
    "FP32, channels_last": partial(fp32, layout=torch.channels_last),
    "by hand: torch.ao FX, KL": by_hand,
    "QAT, LSQ": labels_only,
    "SQAKD, LSQ": ours,
    "SQAKD, LSQ, cached teacher": partial(ours, cached=True),
    "SQAKD, LSQ, channels_last": partial(ours, layout=torch.channels_last),
    "SQAKD, LSQ, bf16": partial(ours, bf16=True),
    "SQAKD, LSQ, bf16, channels_last": partial(ours, bf16=True, layout=torch.channels_last),
    "SQAKD, LSQ, bf16, cached teacher": partial(ours, bf16=True, cached=True),
    "SQAKD, LSQ, bf16, compiled teacher": partial(ours, bf16=True, compiled=True),
    "QKD co-studying, LSQ": co_studying,
}


class _Recalled(nn.Module):
    """A teacher whose logits are known: what distill(cache_teacher=...) leaves of it."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def _resnet(device: str) -> nn.Module:
    torch.manual_seed(0)
    return ResNet20().to(device)


def _batch(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 32, 32).to(device), torch.randint(0, 10, (batch,)).to(device)


def _prepared(toolkit: str, x: torch.Tensor, device: str) -> nn.Module:
    student = prepare(_resnet("cpu").eval(), [x[:32].cpu()], toolkit, weight_bits=4, activation_bits=4).to(device)
    adapter_for(student).set_mode(student, True)
    return student


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _autocast(device: str, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype=torch.bfloat16) if bf16 else nullcontext()


def measure(names: list[str], batch: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Medians over interleaved rounds."""
    steps = {name: VARIANTS[name](batch, device) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds + 3), "rounds"):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            started = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= 3:
                times[name].append(time.perf_counter() - started)
    rows = []
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times["FP32"], strict=True)]
        median = statistics.median(times[name])
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "variant": name,
                "step_ms": 1e3 * median,
                "images_per_second": batch / median,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [low, high],
            }
        )
    return rows


def accuracies(seeds: int, device: str) -> dict[str, list[float]]:
    """Held-out accuracy of W4A4 students on digits, trained in float32 and in bfloat16."""
    digits = load(seed=0)
    torch.manual_seed(0)
    teacher = train_float(DigitNet(width=8), digits.loader("train", shuffle=True), epochs=15, lr=1e-2).to(device)
    calibration = [digits.train[0][start : start + 64] for start in range(0, 256, 64)]
    found: dict[str, list[float]] = {"no": [], "bf16": []}
    for seed in track(range(seeds), "seeds"):
        for precision, values in found.items():
            student = prepare(copy.deepcopy(teacher).cpu(), calibration, "modelopt", weight_bits=4, activation_bits=4)
            use_quantizers(student, LSQ())
            result = distill(
                student.to(device),
                teacher,
                digits.loader("train", shuffle=True, seed=seed),
                epochs=8,
                seed=seed,
                mixed_precision=precision,
                val_loader=digits.loader("validation"),
            )
            scores = evaluate(result.model, None, digits.loader("test"), default_batch, torch.device(device))
            values.append(scores["val_accuracy"])
    return found


def make_table(document: dict[str, Any]) -> str:
    """Markdown: time of each variant over FP32."""
    base = document["rows"][0]["peak_growth_mib"]
    rows = [
        [row["variant"], f"{row['ratio']:.2f}", f"{row['images_per_second']:.0f}", f"{row['peak_growth_mib'] / base:.2f}"]
        for row in document["rows"]
    ]
    return page_tables.markdown(["step", "time", "images/s", "peak memory"], rows)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="of the second part; 0 leaves it out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS)[1:], help="may be repeated; all by default")
    parser.add_argument("--out", type=Path, help="JSON file; the table in docs/measured.md is written with the committed one")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    busy = is_busy()
    rows = measure(["FP32", *(options.variant or list(VARIANTS)[1:])], options.batch, options.device, options.rounds)
    if options.device == "cpu":
        for row in track(rows, "memory"):
            row["peak_growth_mib"] = peak_growth_mib(VARIANTS[row["variant"]], options.batch, options.device)
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['variant']:36s} {row['step_ms']:7.1f} ms  {row['images_per_second']:8,.0f} images/s  {row['ratio']:.2f}x "
            f"({low:.2f}..{high:.2f})  {row.get('peak_growth_mib', math.nan):5.0f} MiB" + _verdict(row)
        )
    if busy:
        print("The machine was busy when this began: take the ratios with care.")
    document: dict[str, Any] = {
        "environment": environment(),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "rows": rows,
    }
    if options.seeds:
        document["accuracy"] = accuracies(options.seeds, options.device)
        for precision, values in document["accuracy"].items():
            listed = ", ".join(f"{100 * value:.2f}" for value in values)
            print(f"mixed_precision={precision!r}: {listed}; mean {100 * statistics.mean(values):.2f} %")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(options.out)
        if options.out.resolve() == RESULTS:
            page_tables.write_table("distill_step", make_table(document))


def _verdict(row: dict[str, Any]) -> str:
    bar = BARS.get(row["variant"])
    return "" if bar is None else f"   bar {bar:.2f}x {'met' if row['ratio'] <= bar else 'MISSED'}"


if __name__ == "__main__":
    main()
