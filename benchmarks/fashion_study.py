"""Which method, for how few bits, in which network? Fashion-MNIST, a residual and a depthwise network, 2 to 8 bits.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_study.py --processes 2 --minutes 90 --out benchmarks/results/fashion_study.json
    python benchmarks/fashion_study.py --full --device cuda        # all images, ResNet-20 at its own width, thirty epochs
    python benchmarks/fashion_study.py --brief --device cuda --processes 6 --minutes 2   # the same in few epochs

Networks in full precision are trained once, with labels, and every student starts from one of them: prepared by ModelOpt with a
learned quantizer, calibrated (that alone is post-training quantization, PTQ), then trained by ``distill``. Students of one seed
see the same images in the same order and number; they differ in the method. The epoch is chosen on held-out images of the
training split, accuracy is of the test split, which takes part in nothing else. Differences are tested in pairs over seeds and
corrected by Holm within the table. One rate for all students of as many bits, chosen before on held-out images with a seed that
is not among the study's (--rates). SQuaT is SQAKD that also matches the inputs of three layers through the student's quantizer.

The small study is meant for two cores: ResNet-20 has half its width, networks in full precision see all images six times,
students 12,000 of them. Every student is a file in --cells, the most telling come first: a run that was stopped goes on, and
rows say how many seeds they have.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import fashion
import page_tables
import paired
import torch
import torch.nn.functional as F
from small_nets import Split, accuracy
from students import add_arguments, train_missing
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from qakd_plugin import EWGS, KD, LSQ, PACT, QAT, QKD, SQAKD, DoReFa, Features, distill, prepare, use_quantizers
from qakd_plugin._common.files import atomic_path, write_atomic
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "fashion_study.json"
PAGE = page_tables.ROOT / "docs" / "evidence.md"
RESNET, MOBILENET = "ResNet-20", "MobileNetV2 0.5"
DEEPER = "ResNet-56"
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    RESNET: lambda width: fashion.ResNet(width=width),
    DEEPER: lambda width: fashion.ResNet(blocks=9, width=width),
    MOBILENET: lambda width: fashion.mobilenet(),
}
"""By the width of the residual ones; ResNet-56 is a teacher of qkd_study.py only."""
FEATURES = {
    RESNET: ("blocks.3.conv1", "blocks.6.conv1", "head"),
    MOBILENET: ("features.7.conv.0.0", "features.14.conv.0.0", "classifier.1"),
}
"""Layers whose inputs SQuaT compares."""

QUANTIZERS: dict[str, Any] = {"LSQ": LSQ(), "PACT": PACT(), "DoReFa": DoReFa(), "EWGS": EWGS()}
METHODS: dict[str, Callable[[str], Any]] = {
    "QAT": lambda network: QAT(),
    "SQAKD": lambda network: SQAKD(),
    "KD with labels": lambda network: KD(),
    "QKD": lambda network: QKD(),
    "SQuaT": lambda network: SQAKD(features=Features(FEATURES[network], through_quantizer=True)),
}
BATCH, LR = 64, 5e-3
RATES = {2: (LR / 4, LR, LR * 4), 4: (LR / 256, LR / 64, LR / 16, LR / 4, LR), 8: (1e-5, 1e-4, 1e-3)}
"""By bits of weights and activations."""
BEST = {2: LR, 3: LR, 4: LR / 64, 8: 1e-4}
"""Of RATES those with the best mean over the students of rate_cells(); with 3 bits that of 2."""

HELD_OUT, RATES_SEED, FIRST_SEED = 1000, 0, 1


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        images: that students are trained on.
        epoch: images in an epoch, drawn without replacement as far as they go.
        epochs: of each student.
        seeds: per combination.
        width: of ResNet-20.
        teacher_images: that networks in full precision are trained on, those of students among them.
        teacher_epochs: of their training.
        test_images: that accuracy is taken on.
    """

    images: int
    epoch: int
    epochs: int
    seeds: int
    width: int
    teacher_images: int
    teacher_epochs: int
    test_images: int


SMALL, FULL = Size(59_000, 2000, 6, 5, 8, 59_000, 6, 10_000), Size(59_000, 59_000, 30, 5, 16, 59_000, 60, 10_000)

BRIEF = replace(FULL, epoch=20_000, epochs=3, teacher_epochs=6)
"""The large study as far as it goes in minutes on a GPU: fewer epochs, nothing else."""
TINY = Size(64, 64, 1, 1, 4, 256, 1, 64)
"""One student: whether the study runs."""


@dataclass(frozen=True)
class Cell:
    """One student: keys of FEATURES, QUANTIZERS and METHODS, bits of weights and activations, seed, peak rate."""

    network: str
    quantizer: str
    bits: int
    method: str
    seed: int
    lr: float = LR

    @property
    def slug(self) -> str:
        parts = (self.network, self.quantizer, f"w{self.bits}", self.method, f"{self.lr:g}", str(self.seed))
        return "-".join(parts).replace(" ", "_")


def cells(size: Size) -> list[Cell]:
    """All students, the most telling first: QAT and SQAKD at 2 and 3 bits, then the other methods, widths, quantizers."""
    seeds = range(FIRST_SEED, FIRST_SEED + size.seeds)

    def some(quantizers: tuple[str, ...], widths: tuple[int, ...], methods: tuple[str, ...]) -> list[Cell]:
        return [
            Cell(network, quantizer, bits, method, seed, BEST[bits])
            for seed in seeds
            for bits in widths
            for network in FEATURES
            for quantizer in quantizers
            for method in methods
        ]

    others = tuple(name for name in METHODS if name not in ("QAT", "SQAKD"))
    found = some(("LSQ",), (2, 3), ("QAT", "SQAKD")) + some(("LSQ",), (2,), others) + some(("LSQ",), (4, 8), ("QAT", "SQAKD"))
    found += some(("PACT", "DoReFa", "EWGS"), (2, 3, 4), ("QAT", "SQAKD"))
    return found + some(("LSQ",), (3, 4, 8), others) + some(("PACT", "DoReFa", "EWGS"), (8,), ("QAT", "SQAKD"))


def rate_cells() -> list[Cell]:
    """The students that choose rates."""
    return [
        Cell(RESNET, "LSQ", bits, method, RATES_SEED, lr)
        for bits, rates in RATES.items()
        for lr in rates
        for method in ("QAT", "SQAKD")
    ]


class Study:
    """Data and networks of a study.

    Args:
        size: how large it is.
        folder: of its files.
        data: of the images.
        device: that is trained on.
        teacher_seconds: for each network in full precision, which is trained for fewer epochs where they would take longer.
    """

    def __init__(self, size: Size, folder: Path, data: Path, device: str, teacher_seconds: float = math.inf) -> None:
        self._size, self._folder, self._device, self._teacher_seconds = size, folder, device, teacher_seconds
        (images, labels), (test, answers) = fashion.load(data)
        self.test: Split = (test[: size.test_images], answers[: size.test_images])
        self.validation: Split = (images[-HELD_OUT:], labels[-HELD_OUT:])
        self.pool: Split = (images[: size.teacher_images], labels[: size.teacher_images])
        self.train: Split = (images[: size.images], labels[: size.images])

    def record(self, name: str) -> Path:
        """File of a network in full precision: the epochs of its training, seconds, and accuracy on the test split."""
        return self._folder / f"teacher-{name.replace(' ', '_')}.json"

    @cache  # noqa: B019 - a study lives as long as its process
    def teacher(self, name: str) -> nn.Module:
        """The network in full precision, trained once and kept."""
        torch.manual_seed(0)
        network = NETWORKS[name](self._size.width).to(memory_format=torch.channels_last)  # faster, the depthwise one above all
        path = self.record(name).with_suffix(".pt")
        if not path.is_file():
            started, epochs = time.perf_counter(), self._train(network.to(self._device))
            with atomic_path(path) as temporary:
                torch.save(network.state_dict(), temporary)
            found = {"epochs": epochs, "seconds": round(time.perf_counter() - started, 1)}
            found["accuracy"] = accuracy(network.eval(), *self.test)
            write_atomic(self.record(name), json.dumps(found) + "\n")
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        return network.to(self._device).eval()

    def _train(self, network: nn.Module) -> int:
        """Epochs that there was time for, at least one."""
        images, _ = self.pool
        epochs, steps = self._size.teacher_epochs, -(-len(images) // 128)
        if self._teacher_seconds < math.inf:
            seconds = steps * self._seconds_per_step(copy.deepcopy(network))
            epochs = max(1, min(epochs, int(self._teacher_seconds / seconds)))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(128):
                self._step(network, optimizer, rows)
                schedule.step()
        return epochs

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
        images, labels = self.pool
        F.cross_entropy(network(images[rows].to(self._device)), labels[rows].to(self._device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def _seconds_per_step(self, network: nn.Module) -> float:
        """Of a step of training, which ``network`` is lost to."""
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
        rows = torch.arange(min(128, len(self.pool[0])))

        def steps(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                self._step(network, optimizer, rows)
            float(next(network.parameters()).detach().flatten()[0])  # waits for a GPU
            return (time.perf_counter() - started) / count

        steps(5)  # the first are slower
        return steps(20)

    def student(self, network: str, quantizer: str, bits: int) -> nn.Module:
        """Prepared and calibrated, not trained."""
        batches = [self.train[0][:256].to(self._device)]
        student = prepare(self.teacher(network), batches, weight_bits=bits, activation_bits=bits)
        return use_quantizers(student, QUANTIZERS[quantizer])

    def trained(self, student: nn.Module, method: Any, seed: int, teacher: str | None, **rates: float) -> nn.Module:
        """A student after its training, with the weights of its best epoch.

        Args:
            student: that is trained.
            method: by which.
            seed: of images and their order.
            teacher: its name; None for none.
            rates: of ``distill``.
        """
        torch.manual_seed(seed)
        pool, draw = TensorDataset(*self.train), torch.Generator().manual_seed(seed)
        sampler = RandomSampler(pool, num_samples=self._size.epoch, generator=draw)
        return distill(
            student,
            None if teacher is None else self.teacher(teacher),
            DataLoader(pool, batch_size=None, sampler=BatchSampler(sampler, BATCH, drop_last=True)),
            method=method,
            epochs=self._size.epochs,
            val_loader=DataLoader(TensorDataset(*self.validation), 500),
            seed=seed,
            recalibrate_batches=8,
            **rates,  # type: ignore[arg-type]
        ).model

    def run(self, cell: Cell) -> dict[str, float]:
        """Accuracies of a cell's student: see :meth:`accuracies`."""
        student = self.student(cell.network, cell.quantizer, cell.bits)
        teacher = None if cell.method == "QAT" else cell.network
        return self.accuracies(
            self.trained(student, METHODS[cell.method](cell.network), cell.seed, teacher, lr=cell.lr), cell.seed
        )

    def accuracies(self, student: nn.Module, seed: int) -> dict[str, float]:
        """On held-out images, and but for students that choose a rate on the test split."""
        found = {"held_out": accuracy(student, *self.validation)}
        return found if seed == RATES_SEED else found | {"accuracy": accuracy(student, *self.test)}


@cache
def open_study(size: Size, folder: Path, data: Path, device: str, teacher_seconds: float = math.inf) -> Study:
    """Of this process."""
    return Study(size, folder, data, device, teacher_seconds)


def train(size: Size, folder: Path, data: Path, device: str, cell: Cell) -> dict[str, float]:
    """Train a cell's student and find what is asked of it."""
    return open_study(size, folder, data, device).run(cell)


def read(size: Size, folder: Path) -> list[dict[str, Any]]:
    """A row per combination of which there are students: seeds and accuracies."""
    rows: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for cell in cells(size):
        path = folder / f"{cell.slug}.json"
        if path.is_file():
            key = (cell.network, cell.quantizer, cell.bits, cell.method)
            names = ("network", "quantizer", "bits", "method")
            row = rows.setdefault(key, dict(zip(names, key, strict=True)) | {"accuracies": {}, "seconds": 0.0})
            run = json.loads(path.read_text())
            row["accuracies"][str(cell.seed)] = run["accuracy"]
            row["seconds"] += run["seconds"]
    return list(rows.values())


def read_rates(folder: Path) -> list[dict[str, Any]]:
    """Of each student that chooses a rate: its accuracy on held-out images."""
    return [
        {"bits": cell.bits, "lr": cell.lr, "method": cell.method, "held_out": json.loads(path.read_text())["held_out"]}
        for cell in rate_cells()
        if (path := folder / f"{cell.slug}.json").is_file()
    ]


def calibrated(study: Study, rows: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Accuracy of post-training quantization and full precision, by name; computed once."""
    path = folder / "calibrated.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    for row in rows:
        network, quantizer, bits = row["network"], row["quantizer"], row["bits"]
        if (name := f"{network}, {quantizer} W{bits}A{bits}") not in found:
            found[name] = accuracy(study.student(network, quantizer, bits), *study.test)
        if network not in found:
            found[network] = accuracy(study.teacher(network), *study.test)
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return found


def committed() -> dict[str, Any]:
    """The figures in benchmarks/results; without rows where there are none yet."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    return found


Key = tuple[str, str, int, str]
"""Network, quantizer, bits and method of a row."""


def over_qat(document: dict[str, Any]) -> dict[Key, dict[str, float]]:
    """Of every row that is not QAT: its accuracy over QAT's by seed, of the seeds that both have."""
    by_key = {_key(row): row["accuracies"] for row in document["rows"]}
    found: dict[Key, dict[str, float]] = {}
    for (network, quantizer, bits, method), own in by_key.items():
        control = by_key.get((network, quantizer, bits, "QAT"), {})
        differences = {seed: own[seed] - control[seed] for seed in own if seed in control}
        if method != "QAT" and differences:
            found[network, quantizer, bits, method] = differences
    return found


def _key(row: dict[str, Any]) -> Key:
    return row["network"], row["quantizer"], row["bits"], row["method"]


def make_table(document: dict[str, Any]) -> str:
    """Markdown: full precision, calibrated, QAT, the method, and the difference in pairs with what could have been found.

    A line that says so where there are no students.
    """
    if not document["rows"]:
        return "No student is trained yet: `python benchmarks/fashion_study.py`."
    by_key = {_key(row): row["accuracies"] for row in document["rows"]}
    pairs = sorted(over_qat(document).items())
    tests = [paired.compare(list(differences.values())) for _, differences in pairs]
    lines = []
    for ((network, quantizer, bits, method), differences), test, p in zip(
        pairs, tests, paired.holm([test.p for test in tests]), strict=True
    ):
        own, control = ([by_key[network, quantizer, bits, name][seed] for seed in differences] for name in (method, "QAT"))
        name = f"{network}, {quantizer} W{bits}A{bits}"
        lines.append(
            [
                f"{name} ({paired.percent(document['calibrated'][network])})",
                method,
                str(len(differences)),
                paired.percent(document["calibrated"][name]),
                paired.percent(fmean(control), paired.half_width(control)),
                paired.percent(fmean(own), paired.half_width(own)),
                paired.percent(test.estimate, test.half_width, "+"),
                paired.p_text(None if len(differences) == 1 else p),
                "-" if test.detectable is None else f"{100 * test.detectable:.2f}",
            ]
        )
    header = ["student (full precision)", "method", "seeds", "calibrated only", "QAT", "trained", "over QAT, points"]
    return page_tables.markdown([*header, "p, after Holm", "found with 80 % power"], lines)


def make_rates_table(document: dict[str, Any]) -> str:
    """Markdown: accuracy on held-out images by bits and rate; a line that says so where no student has chosen them."""
    if not document.get("rates"):
        return "The rates are not chosen yet: `python benchmarks/fashion_study.py --rates`."
    found = {(row["bits"], row["lr"], row["method"]): row["held_out"] for row in document["rates"]}
    methods = list(dict.fromkeys(method for *_, method in found))
    lines = [
        [f"W{bits}A{bits}", f"{lr:g}", *(paired.percent(found[bits, lr, method]) for method in methods)]
        for bits, lr in dict.fromkeys((bits, lr) for bits, lr, _ in found)
        if all((bits, lr, method) in found for method in methods)
    ]
    return page_tables.markdown(["students", "rate", *methods], lines)


def main() -> None:
    """Train what is missing, test, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.DEBIAN, help="folder of Fashion-MNIST (%(default)s)")
    parser.add_argument("--rates", action="store_true", help="train only the students that choose rates")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--full", dest="size", action="store_const", const=FULL, default=SMALL, help="the large study")
    sizes.add_argument("--brief", dest="size", action="store_const", const=BRIEF, help="the large study, in few epochs")
    sizes.add_argument("--tiny", dest="size", action="store_const", const=TINY, help="one student on a few images")
    parser.add_argument("--teacher-seconds", type=float, default=math.inf, help="for each network in full precision")
    parser.add_argument("--device", default="cpu", help="of training: cpu or cuda (%(default)s)")
    add_arguments(parser, "runs/fashion_study")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the tables too, if it is the default one")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    size = options.size
    folder = options.cells / {FULL: "full", BRIEF: "brief", TINY: "tiny"}.get(size, "")
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(size, folder, options.data, options.device, options.teacher_seconds)
    for name in FEATURES:
        study.teacher(name)  # before other processes want it
    wanted = rate_cells() if options.rates else cells(size)
    if size == TINY:
        wanted = wanted[:1]
    students = {folder / f"{cell.slug}.json": (size, folder, options.data, options.device, cell) for cell in wanted}
    minutes = options.minutes - (time.monotonic() - began) / 60
    train_missing(train, students, processes=options.processes, minutes=minutes)
    rows = read(size, folder)
    document = {
        "environment": environment(),
        "size": vars(size),
        "device": options.device,
        "teachers": {name: json.loads(study.record(name).read_text()) for name in FEATURES if study.record(name).is_file()},
        "rates": read_rates(folder),
        "calibrated": calibrated(study, rows, folder),
        "rows": rows,
    }
    tables = {"fashion_rates": make_rates_table(document), "fashion_study": make_table(document)}
    print(*tables.values(), sep="\n\n")
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, tables, PAGE)


if __name__ == "__main__":
    main()
