"""What a large run costs, hours and memory, before it is begun: a model fitted to measured steps of small networks.

    python benchmarks/scale.py                      # one CPU thread, minutes
    python benchmarks/scale.py --device cuda        # your GPU: hours on it

A step is that of distillation: the frozen teacher's forward pass, the student's forward and backward pass, AdamW. What it does
is counted by running it on the meta device, which computes shapes alone: floating-point operations of convolutions and of
matrix products, bytes that all other operators read and write, and how many operators there are. Its seconds are taken to be a
sum of these four, each times a number >= 0 that is fitted to steps measured here, of networks and batches small enough to be
measured (least squares of relative errors). Every measured step is also predicted by a fit without its network: that error is
what a prediction is worth. On a CPU, seconds are processor time of one thread, which other work on the machine disturbs less
than the clock.

Memory is not fitted but counted: parameters, gradients, AdamW's two moments, the teacher, and every tensor that autograd keeps
for the backward pass, once each. What allocators waste and what an operator needs meanwhile comes on top.

Large language models are traced at one and two blocks, and at two sizes of the vocabulary, of which their counts are linear
functions. Counts of the large runs do not depend on the device: they are read from benchmarks/results/scale.json where they are
there, unless --count.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import page_tables
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import nnls
from step_time import ResNet20
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qakd_plugin import KL, LSQ, SQAKD, attach, prepare, use_quantizers
from qakd_plugin._common.console import track
from qakd_plugin._common.files import write_atomic
from qakd_plugin.runtimes.host import environment, is_busy
from qakd_plugin.toolkits import adapter_for

RESULTS = page_tables.RESULTS / "scale.json"
PAGE = page_tables.ROOT / "docs" / "scale.md"
GIB = 2**30
BYTES_A_PARAMETER = {"weights": 4, "gradients": 4, "AdamW's moments": 8}
"""In float32, as students are trained."""


@dataclass(frozen=True)
class Counts:
    """What a step does.

    Attributes:
        convolutions: their floating-point operations.
        products: those of matrix products and attention.
        moved: bytes that other operators read and write.
        operators: how many there are.
        kept: bytes that autograd keeps for the backward pass, parameters apart.
        parameters: of the student.
        teacher: parameters of the teacher.
    """

    convolutions: float
    products: float
    moved: float
    operators: float
    kept: float
    parameters: float
    teacher: float

    @property
    def features(self) -> tuple[float, float, float, float]:
        return self.convolutions, self.products, self.moved, self.operators

    @property
    def memory(self) -> float:
        """Bytes."""
        return sum(BYTES_A_PARAMETER.values()) * self.parameters + 4 * self.teacher + self.kept

    def plus(self, other: Counts, times: float) -> Counts:
        """These, and so many times others."""
        return Counts(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Decoder(nn.Module):
    """A language model: embedding, blocks of causal attention and a four times wider MLP, head; (N, T) token ids."""

    def __init__(self, width: int, depth: int, vocabulary: int, heads: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.gelu = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(self.gelu(self.up(self.second(x))))


@dataclass(frozen=True)
class Case:
    """A network with its input.

    Attributes:
        name: of the network.
        make: it, with random weights.
        shape: of one sample: an image, or the length of a sequence of token ids.
        vocabulary: of the tokens; 0 for images.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def batch(self, size: int) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        shape = (size, *self.shape)
        if self.vocabulary:
            return torch.randint(self.vocabulary, shape, generator=draw)
        return torch.randn(shape, generator=draw)

    @property
    def method(self) -> SQAKD:
        return SQAKD(match={"logits": KL(dim=-1)}) if self.vocabulary else SQAKD()


def _vision(name: str, size: int) -> Case:
    return Case(name, lambda: torchvision.models.get_model(name), (3, size, size))


def _language(width: int, depth: int, vocabulary: int, length: int, heads: int = 8) -> Case:
    return Case(f"decoder of {width}", lambda: Decoder(width, depth, vocabulary, heads), (length,), vocabulary)


MEASURED = (
    (Case("ResNet-20", ResNet20, (3, 32, 32)), (16, 64)),
    (_vision("resnet18", 112), (2, 8)),
    (_vision("mobilenet_v2", 112), (2, 8)),
    (_language(128, 2, 500, 64), (4, 16)),
    (_language(256, 2, 500, 64), (2, 8)),
)
TINY = ((Case("ResNet-20", ResNet20, (3, 32, 32)), (1,)), (_language(16, 1, 50, 8, 2), (1,)))
"""To see whether everything runs."""


def step_of(case: Case, size: int, *, quantized: bool) -> tuple[Callable[[Tensor], None], nn.Module, nn.Module | None, Tensor]:
    """A step, its student, its teacher and a batch, on the CPU; without quantizers and teacher a plain step of FP32."""
    torch.manual_seed(0)
    network, x = case.make(), case.batch(size)
    if not case.vocabulary:
        _fill_statistics(network, case.batch(4))
    network.eval()
    if not quantized:
        optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-5)

        def plain(images: Tensor) -> None:
            F.log_softmax(network(images), -1).select(-1, 0).mean().neg().backward()
            optimizer.step()
            optimizer.zero_grad()

        return plain, network, None, x
    student = use_quantizers(prepare(network, [case.batch(2)], "modelopt", weight_bits=4, activation_bits=4), LSQ())
    adapter_for(student).set_mode(student, True)
    teacher = copy.deepcopy(network).requires_grad_(False)
    kd, adamw = attach(student, teacher, case.method), torch.optim.AdamW(student.parameters(), lr=1e-5)

    def distilled(images: Tensor) -> None:
        student(images)
        kd.loss().backward()
        adamw.step()
        adamw.zero_grad()

    return distilled, student, teacher, x


@torch.no_grad()
def _fill_statistics(network: nn.Module, x: Tensor) -> None:
    """BatchNorm's, of one batch: with those that it starts with, random weights let a deep network's activations die away."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(x)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


class _Moved(TorchDispatchMode):
    """Counts operators that are neither views nor products, and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operators = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._overloadpacket not in _PRODUCTS:
            self.operators += 1
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.convolution, _aten.convolution_backward, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm,
    _aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention, _aten._scaled_dot_product_efficient_attention_backward,
}  # fmt: skip
_CONVOLUTIONS = {_aten.convolution, _aten.convolution_backward}


@contextlib.contextmanager
def kept_tensors(student: nn.Module) -> Iterator[dict[int, int]]:
    """Within the block, bytes of every storage that autograd keeps, by its address; those of parameters apart."""
    own = {tensor.untyped_storage()._cdata for tensor in student.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def counts(case: Case, size: int, *, quantized: bool) -> Counts:
    """What a step does, counted on the meta device."""
    step, student, teacher, x = step_of(case, size, quantized=quantized)
    step(case.batch(2))  # what is checked once; AdamW's moments
    parameters = sum(p.numel() for p in student.parameters())
    student.to("meta")
    if teacher is not None:
        teacher.to("meta")
    x = x.to("meta")
    with _no_autocast(), FlopCounterMode(display=False) as flops, _Moved() as moved, kept_tensors(student) as kept:
        step(x)
    total = flops.get_total_flops()
    convolutions = sum(count for packet, count in flops.get_flop_counts()["Global"].items() if packet in _CONVOLUTIONS)
    return Counts(
        convolutions,
        total - convolutions,
        moved.bytes,
        moved.operators,
        sum(kept.values()),
        parameters,
        0 if teacher is None else sum(p.numel() for p in teacher.parameters()),
    )


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """The meta device knows no autocast, which quantizers switch off."""
    autocast = torch.autocast
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def seconds(case: Case, size: int, device: str, rounds: int, *, quantized: bool) -> float:
    """Median of a step: by events of the device, or processor time of this process."""
    step, student, teacher, x = step_of(case, size, quantized=quantized)
    step(x)
    for network in (student, teacher):
        if network is not None:
            network.to(device)
    x = x.to(device)
    times = []
    for index in range(rounds + 2):
        started = _now(device)
        step(x)
        if index >= 2:
            times.append(_now(device) - started)
    return statistics.median(times)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def fitted(rows: list[dict[str, Any]]) -> np.ndarray:
    """Seconds an operation of either kind, a byte and an operator: least squares of relative errors, none negative."""
    features = np.array([row["features"] for row in rows], dtype=float)
    measured = np.array([row["seconds"] for row in rows])
    found, _ = nnls(features / measured[:, None], np.ones(len(rows)))
    return found


def with_errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with what a fit to the other networks predicts for it."""
    for row in rows:
        others = [other for other in rows if other["network"] != row["network"]]
        row["predicted"] = float(np.dot(fitted(others), row["features"]))
    return rows


def large_language(width: int, depth: int, vocabulary: int, length: int, size: int, heads: int) -> Counts:
    """Counts of a decoder too large to be prepared here: linear in its blocks, and in its vocabulary."""
    small, step = min(1000, vocabulary), min(1000, vocabulary)
    base = counts(_language(width, 1, small, length, heads), size, quantized=True)
    deeper = counts(_language(width, 2, small, length, heads), size, quantized=True)
    wider = counts(_language(width, 1, small + step, length, heads), size, quantized=True)
    found = base.plus(deeper.plus(base, -1), depth - 1)
    return found.plus(wider.plus(base, -1), (vocabulary - small) / step)


@dataclass(frozen=True)
class Plan:
    """A large run.

    Attributes:
        name: for people.
        batch: samples in a step.
        samples: in an epoch: images, or sequences.
        count: counts its step.
    """

    name: str
    batch: int
    samples: int
    count: Callable[[int], Counts]


IMAGENET = 1_281_167
PLANS = (
    Plan("ResNet-50, ImageNet, an epoch", 256, IMAGENET, lambda n: counts(_vision("resnet50", 224), n, quantized=True)),
    Plan("MobileNetV2, ImageNet, an epoch", 256, IMAGENET, lambda n: counts(_vision("mobilenet_v2", 224), n, quantized=True)),
    Plan(
        "decoder of 1.1 G parameters, 1 G tokens",
        8,
        10**9 // 2048,
        lambda n: large_language(2048, 20, 32_000, 2048, n, heads=16),
    ),
)
TINY_PLANS = (Plan("a tiny decoder", 1, 1000, lambda n: large_language(16, 3, 90, 8, n, heads=2)),)


def make_table(document: dict[str, Any]) -> str:
    """Markdown: hours and memory of each plan."""
    rows = []
    for plan in document["plans"]:
        found = Counts(**plan["counts"])
        memory = [plan["memory_gib"], found.kept / GIB, (sum(BYTES_A_PARAMETER.values()) * found.parameters) / GIB]
        rows.append([plan["name"], str(plan["batch"]), f"{plan['hours']:,.1f}", *(f"{value:,.1f}" for value in memory)])
    header = ["run", "batch", f"hours, {document['unit']}", "memory GiB", "of these kept for backward", "student and AdamW"]
    return page_tables.markdown(header, rows)


def main() -> None:
    """Measure, fit, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", action="store_true", help="count the large runs anew: minutes, and 10 GiB of memory")
    parser.add_argument("--tiny", action="store_true", help="two small networks, one small plan: whether it runs")
    parser.add_argument("--out", type=Path, help="JSON file; the table in docs/scale.md is written with the committed one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    busy, cases, plans = is_busy(), TINY if options.tiny else MEASURED, TINY_PLANS if options.tiny else PLANS
    rows = []
    for case, sizes in track(cases, "measured"):
        for size in sizes:
            for quantized in (False, True):
                found = counts(case, size, quantized=quantized)
                took = seconds(case, size, options.device, options.rounds, quantized=quantized)
                row = {"network": case.name, "batch": size, "quantized": quantized, "seconds": took}
                rows.append(row | {"features": found.features})
    for row in with_errors(rows):
        kind = "SQAKD, LSQ" if row["quantized"] else "FP32"
        print(
            f"{row['network']:16s} batch {row['batch']:3d}  {kind:10s}  {1e3 * row['seconds']:8.1f} ms  predicted without it "
            f"{1e3 * row['predicted']:8.1f}  ({row['predicted'] / row['seconds'] - 1:+.0%})"
        )
    coefficients = fitted(rows)
    rates = [f"{1e-9 / c:,.1f}" if c else "-" for c in coefficients[:3]]
    print(
        f"convolutions {rates[0]} GFLOP/s, products {rates[1]} GFLOP/s, other {rates[2]} GB/s, "
        f"{1e6 * coefficients[3]:.1f} us an operator"
    )
    unit = "one CPU thread" if options.device == "cpu" else torch.cuda.get_device_name(0)
    document: dict[str, Any] = {"environment": environment(), "busy": busy, "unit": unit, "rows": rows}
    document["coefficients"] = coefficients.tolist()
    document["error"] = statistics.median(abs(row["predicted"] / row["seconds"] - 1) for row in rows)
    document["plans"] = []
    if options.out:  # what was measured, should counting be cut
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
    known = {} if options.count or not RESULTS.is_file() else json.loads(RESULTS.read_text())
    counted = {(plan["name"], plan["batch"]): Counts(**plan["counts"]) for plan in known.get("plans", [])}
    for plan in track(plans, "plans"):
        found = counted.get((plan.name, plan.batch)) or plan.count(plan.batch)
        step = float(np.dot(coefficients, found.features))
        parts = {"hours": step * plan.samples / plan.batch / 3600, "step_seconds": step, "memory_gib": found.memory / GIB}
        document["plans"].append({"name": plan.name, "batch": plan.batch, **parts, "counts": asdict(found)})
    print(f"median error of a prediction: {document['error']:.0%}", make_table(document), sep="\n")
    if options.out:
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        if options.out.resolve() == RESULTS:
            page_tables.write_table("scale", make_table(document), PAGE)


if __name__ == "__main__":
    main()
