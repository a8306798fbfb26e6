"""What a step of distillation costs against a plain FP32 training step, and whether bfloat16 costs accuracy.

    python benchmarks/distill_step.py --out benchmarks/results/distill_step.json

CIFAR ResNet-20, batch 128, two threads (or ``--device cuda``), W4A4 with LSQ as qakd_plugin.prepare makes it, against
what a user would write by hand: torch.ao FX quantization and a plain loop with a KL loss. A step is the teacher's forward pass
without gradients, the student's forward and backward pass, and SGD with momentum. Every round runs each variant once, in turn;
ratios are medians over rounds of (variant / FP32 of the same round). As in step_time.py, glibc keeps its memory. Peak memory is
that of fresh processes, on the CPU. On a GPU the script also counts how often the host waits for it in a step, replays whole
steps as CUDA graphs, and asks whether the best of ours is twice as fast as the loop written by hand.

``--loop`` trains through ``qakd_plugin.distill`` for so many steps: what the loop around a step costs. The last part trains
students on scikit-learn's digits in either precision, three seeds each, and prints accuracies.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import page_tables
import torch
import torch.nn.functional as F
from step_time import ResNet20, keep_memory, peak_growth_mib
from torch import nn

from qakd_plugin import EWGS, LSQ, QKD, SQAKD, attach, distill, prepare, use_quantizers
from qakd_plugin._common.console import track
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float
from qakd_plugin.quantizers.compiled import compiled_kernels
from qakd_plugin.runtimes.host import environment, is_busy
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.tasks.evaluation import evaluate
from qakd_plugin.toolkits import adapter_for

RESULTS = page_tables.RESULTS / "distill_step.json"
BARS = {
    "SQAKD, LSQ": 1.50,
    "SQAKD, LSQ, channels_last": 1.25,
    "SQAKD, LSQ, bf16": 1.00,
    "SQAKD, LSQ, bf16, channels_last": 0.80,
}
"""Of time over FP32's; that of the last was set with AMX in mind."""
MEMORY_BAR = 1.35
"""Of peak memory over FP32's."""
OVER_BY_HAND = 2.0
"""Bar on a GPU: the fastest of ours against the loop written by hand, in images per second."""
BY_HAND = "by hand: torch.ao FX, KL"
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


_LSQ = LSQ()


def ours(
    batch: int,
    device: str,
    *,
    quantizers: Any = _LSQ,
    bf16: bool = False,
    compiled: bool = False,
    compiled_student: bool = False,
    compiled_quantizers: bool = False,
    cached: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> Step:
    """SQAKD, prepared by ModelOpt, with learned quantizers, or its own where ``quantizers`` is None."""
    x, _ = _batch(batch, device)
    x = x.contiguous(memory_format=layout)
    student = _prepared("modelopt", x, device)
    if quantizers is not None:
        use_quantizers(student, quantizers)
    student = student.to(memory_format=layout)  # type: ignore[call-overload]
    teacher: nn.Module = _resnet(device).eval().to(memory_format=layout)  # type: ignore[call-overload]
    if cached:
        with torch.no_grad():
            teacher = _Recalled(teacher(x))
    if compiled:
        teacher = torch.compile(teacher)
    optimizer = _sgd(student)
    called = torch.compile(student) if compiled_student else student
    kd = attach(called, teacher, SQAKD(temperature=4.0))

    def step() -> None:
        with compiled_kernels(torch.device(device)) if compiled_quantizers else nullcontext(), _autocast(device, bf16):
            called(x)
        kd.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def captured(make: Callable[[int, str], Step], batch: int, device: str) -> Step:
    """A step as a CUDA graph: the host launches it as one, whatever it is made of. It must never wait for the device."""
    step, stream = make(batch, device), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


VARIANTS: dict[str, Callable[[int, str], Step]] = {
    "FP32": fp32,
    "FP32, channels_last": partial(fp32, layout=torch.channels_last),
    BY_HAND: by_hand,
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
ON_REQUEST: dict[str, Callable[[int, str], Step]] = {
    "SQAKD, EWGS": partial(ours, quantizers=EWGS()),
    "SQAKD, ModelOpt's own": partial(ours, quantizers=None),
    "SQAKD, LSQ, compiled quantizers": partial(ours, compiled_quantizers=True),
    "SQAKD, LSQ, bf16, channels_last, compiled quantizers": partial(
        ours, bf16=True, layout=torch.channels_last, compiled_quantizers=True
    ),
}
"""Not in the table of docs/measured.md."""
COMPILED: dict[str, Callable[[int, str], Step]] = {
    "SQAKD, LSQ, compiled": partial(ours, compiled=True, compiled_student=True),
    "SQAKD, LSQ, bf16, channels_last, compiled": partial(
        ours, bf16=True, layout=torch.channels_last, compiled=True, compiled_student=True
    ),
}
"""Both networks by torch.compile: minutes before the first step."""
GRAPHS: dict[str, Callable[[int, str], Step]] = {
    "FP32, CUDA graph": partial(captured, fp32),
    "SQAKD, LSQ, CUDA graph": partial(captured, ours),
    "SQAKD, EWGS, CUDA graph": partial(captured, partial(ours, quantizers=EWGS())),
    "SQAKD, LSQ, bf16, channels_last, CUDA graph": partial(captured, partial(ours, bf16=True, layout=torch.channels_last)),
}
"""Where there is a GPU."""
EVERY = VARIANTS | ON_REQUEST | GRAPHS | COMPILED


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
    adapter_for(student).freeze_ranges(student, False)  # a plain loop of torch.ao's pays for its observers
    return student


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _autocast(device: str, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype=torch.bfloat16) if bf16 else nullcontext()


def measure(names: list[str], batch: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Medians over interleaved rounds."""
    steps = {name: EVERY[name](batch, device) for name in names}
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
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "variant": name,
                "step_ms": 1e3 * median,
                "images_per_second": batch / median,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [low, high],
                "waits": waits(steps[name]) if device == "cuda" else None,
            }
        )
    return rows


def waits(step: Step) -> int:
    """How often the host waits for the GPU in a step, by torch's own count."""
    with counted_waits() as found:
        step()
    return len(found)


@contextmanager
def counted_waits() -> Iterator[list[warnings.WarningMessage]]:
    """Within the block every wait of the host for the GPU is listed; nothing on machines without one."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation.*")
        mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
        if mode is not None:
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if mode is not None:
                torch.cuda.set_sync_debug_mode(mode)
                torch.set_warn_always(False)


class _Counted:
    """A callback of ``distill``: waits of one step, the tenth or the last of at least two."""

    def __init__(self, steps: int) -> None:
        self.at, self.found, self._counting = min(10, steps), 0, ExitStack()

    def on_step_end(self, step: int, _: dict[str, float]) -> None:
        if step == self.at - 1:
            self._list = self._counting.enter_context(counted_waits())
        elif step == self.at:
            self.found = len(self._list)
            self._counting.close()


def through_distill(batch: int, device: str, steps: int) -> dict[str, Any]:
    """So many steps of SQAKD with LSQ in ``qakd_plugin.distill``, of batches that lie on the device: the whole loop."""
    x, _ = _batch(batch, device)
    student = use_quantizers(_prepared("modelopt", x, device), LSQ())
    counted, sgd = _Counted(2 * steps), partial(torch.optim.SGD, momentum=0.9)
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-3, "optimizer": sgd, "callbacks": [counted], "seed": 0}
    result = distill(student, _resnet(device).eval(), [x] * steps, **options)
    return {"images_per_second": result.history[-1]["images_per_second"], "waits_a_step": counted.found, "steps": steps}


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
    parser.add_argument("--loop", type=int, default=0, help="steps through qakd_plugin.distill; 0 leaves them out")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory, on a CPU")
    parser.add_argument("--variant", action="append", choices=list(EVERY)[1:], help="may be repeated; the table's by default")
    parser.add_argument("--out", type=Path, help="JSON file; the table in docs/measured.md is written with the committed one")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    busy = is_busy()
    wanted = options.variant or [*list(VARIANTS)[1:], *([*ON_REQUEST, *GRAPHS] if options.device == "cuda" else [])]
    rows = measure(["FP32", *wanted], options.batch, options.device, options.rounds)
    if options.device == "cpu" and options.memory:
        for row in track(rows, "memory"):
            row["peak_growth_mib"] = peak_growth_mib(EVERY[row["variant"]], options.batch, options.device)
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['variant']:36s} {row['step_ms']:7.1f} ms  {row['images_per_second']:8,.0f} images/s  {row['ratio']:.2f}x "
            f"({low:.2f}..{high:.2f})  "
            + (f"waits {row['waits']}" if row["waits"] is not None else f"{row.get('peak_growth_mib', math.nan):5.0f} MiB")
            + _verdict(row, rows[0], options.device)
        )
    if busy:
        print("The machine was busy when this began: take the ratios with care.")
    document: dict[str, Any] = {
        "environment": environment(),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "rows": rows,
    }
    if (verdict := against_by_hand(rows)) is not None and options.device == "cuda":
        print(verdict)
    if options.loop:
        document["distill"] = through_distill(options.batch, options.device, options.loop)
        print(f"through distill: {document['distill']}")
    if options.seeds:
        document["accuracy"] = accuracies(options.seeds, options.device)
        for precision, values in document["accuracy"].items():
            listed = ", ".join(f"{100 * value:.2f}" for value in values)
            print(f"mixed_precision={precision!r}: {listed}; mean {100 * statistics.mean(values):.2f} %")
    if options.out:
        tables = {"distill_step": make_table(document)} if options.memory else {}
        page_tables.write_results(options.out, document, RESULTS, tables)
        print(options.out)


def against_by_hand(rows: list[dict[str, Any]]) -> str | None:
    """The fastest of ours against the loop written by hand; None where one of them was not measured."""
    rates = {row["variant"]: row["images_per_second"] for row in rows}
    own = {name: rate for name, rate in rates.items() if name.startswith("SQAKD") and "cached" not in name}
    if BY_HAND not in rates or not own:
        return None
    best = max(own, key=lambda name: own[name])
    ratio = own[best] / rates[BY_HAND]
    met = "met" if ratio >= OVER_BY_HAND else "MISSED"
    return f"{best}: {ratio:.2f} times the images of the loop written by hand; bar {OVER_BY_HAND:.1f} {met}"


def _verdict(row: dict[str, Any], fp32: dict[str, Any], device: str) -> str:
    """Bars of ratios are the CPU's."""
    if row["variant"] not in BARS or device != "cpu":
        return ""
    found = [(row["ratio"], BARS[row["variant"]], "time")]
    if "peak_growth_mib" in row:
        found.append((row["peak_growth_mib"] / fp32["peak_growth_mib"], MEMORY_BAR, "memory"))
    return "".join(f"   {what} {it:.2f}x, bar {bar:.2f}x {'met' if it <= bar else 'MISSED'}" for it, bar, what in found)


if __name__ == "__main__":
    main()
