"""What does a detector lose by quantization, and what brings it back? Garments on canvases, mean average precision.

    apt-get install dataset-fashion-mnist
    python benchmarks/detection_study.py --processes 2 --minutes 90 --out benchmarks/results/detection_study.json
    python benchmarks/detection_study.py --full --device cuda        # ten times the canvases, twice the channels and the epochs

Canvases are made from Fashion-MNIST (canvases.py): those that networks learn from hold garments of the training split; those
that pick the epoch and the rate hold others of that split; mAP (COCO's, over overlaps of 0.5 to 0.95) is taken on canvases with
garments of the test split. The detector (detector.py) is trained once in full precision. Every student starts from it, prepared
by ModelOpt with LSQ in its quantizers' place and the last layer of each head in floating point, as docs/tasks.md advises, and
calibrated: that alone is post-training quantization, PTQ. QAT learns from boxes, by the detector's own loss; SQAKD learns what
the heads in full precision output, from images alone. Students of one seed share the canvases, their order and the number of
steps. Every method at every number of bits has a rate of its own, the best of as many on held-out canvases with a seed that is
not among the study's. mAP of the file for ONNX Runtime is taken as well.

Differences are tested in pairs over seeds and corrected by Holm within the table. All seeds share the network in full precision
and the canvases of the test. Every student is a file in --cells: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import canvases
import detector
import fashion
import page_tables
import paired
import torch
from canvases import Canvases
from students import add_arguments, best_rates, train_missing
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchmetrics.detection import MeanAveragePrecision

from qakd_plugin import LSQ, QAT, SQAKD, BinaryKL, SmoothL1, distill, export_onnx, prepare, use_quantizers
from qakd_plugin._common.files import atomic_path, write_atomic
from qakd_plugin.bench.loading import make_runner
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "detection_study.json"
PAGE = page_tables.ROOT / "docs" / "evidence.md"
BATCH, CALIBRATION = 32, 128
HELD_OUT_GARMENTS = 5000
"""Of the training split, for canvases that pick the epoch and the rate."""

BITS = (4, 8)
"""Of weights and activations, the most telling first."""

RATES: dict[int, tuple[float, ...]] = {4: (2e-5, 1e-4, 5e-4, 2.5e-3), 8: (1e-5, 1e-4, 1e-3)}
"""Peak rates that each method is given a choice of, by bits of weights and activations."""

RATES_SEED, FIRST_SEED = 0, 1
PTQ, TRAINED = "PTQ", ("QAT", "SQAKD")
COMPARISONS = (("QAT", PTQ), ("SQAKD", PTQ), ("SQAKD", "QAT"))

Answer = Callable[[Tensor], Mapping[str, Tensor]]
"""Normalised images -> what the heads output: a network, or a file in its runtime."""


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        canvases: that students are trained on.
        epoch: canvases in an epoch, drawn without replacement as far as they go.
        epochs: of each student.
        seeds: per combination.
        width: of the detector.
        teacher_canvases: that the network in full precision is trained on, those of students among them.
        teacher_epochs: of its training.
        held_out: canvases that pick the epoch and the rate.
        test: canvases that mAP is taken on.
    """

    canvases: int
    epoch: int
    epochs: int
    seeds: int
    width: int
    teacher_canvases: int
    teacher_epochs: int
    held_out: int
    test: int


SMALL = Size(4000, 2000, 6, 5, 12, 12_000, 12, 300, 1000)
FULL = Size(40_000, 40_000, 12, 5, 24, 120_000, 16, 1000, 5000)
TINY = Size(64, 64, 1, 1, 4, 64, 1, 16, 16)
"""A student of each method: whether the study runs."""


@dataclass(frozen=True)
class Cell:
    """One student: bits of weights and activations, method (PTQ or one of TRAINED), seed, and peak rate; 0 of PTQ."""

    bits: int
    method: str
    seed: int
    lr: float = 0.0

    @property
    def slug(self) -> str:
        return f"w{self.bits}-{self.method}-{self.lr:g}-{self.seed}"


def rate_cells() -> list[Cell]:
    """The students that choose the rates."""
    return [Cell(bits, method, RATES_SEED, lr) for bits in BITS for method in TRAINED for lr in RATES[bits]]


def cells(size: Size, rates: Mapping[tuple[int, str], float]) -> list[Cell]:
    """Of the study, seed by seed; those whose rates are chosen, and PTQ, which has none."""
    return [
        Cell(bits, method, seed, rates.get((bits, method), 0.0))
        for seed in range(FIRST_SEED, FIRST_SEED + size.seeds)
        for bits in BITS
        for method in (PTQ, *TRAINED)
        if method == PTQ or (bits, method) in rates
    ]


def split(batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch of canvases -> inputs and targets."""
    images, boxes, labels = batch
    return canvases.normalized(images), {"boxes": boxes, "labels": labels}


def counted(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """What the metric takes."""
    return detector.detections(outputs), canvases.targets_of(targets["boxes"], targets["labels"])


def foreground(inputs: Tensor, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Places (N, places) at which the teacher sees something: only there boxes mean anything."""
    return other["classes"].sigmoid().amax(-1) > 0.1


MATCH = {
    "classes": BinaryKL(),
    "sides": SmoothL1(beta=0.1, where=foreground),
    "centres": BinaryKL(where=foreground),
}
"""What SQAKD compares."""


@torch.no_grad()
def mean_precision(answer: Answer, found: Canvases, device: str = "cpu") -> dict[str, float]:
    """mAP over overlaps of 0.5 to 0.95, and at 0.5."""
    metric = MeanAveragePrecision(backend="pycocotools")
    for rows in torch.arange(len(found)).split(100):
        part = found[rows]
        outputs = answer(canvases.normalized(part.images).to(device))
        outputs = {name: output.cpu() for name, output in outputs.items()}
        metric.update(*counted(outputs, {"boxes": part.boxes, "labels": part.labels}))
    numbers = metric.compute()
    return {name: float(numbers[name]) for name in ("map", "map_50")}


class Study:
    """Canvases and the network in full precision.

    Args:
        size: how large the study is.
        folder: of its files.
        data: of Fashion-MNIST.
        device: that is trained on.
    """

    def __init__(self, size: Size, folder: Path, data: Path, device: str) -> None:
        self._size, self._folder, self._device = size, folder, device
        (images, kinds), (test, answers) = fashion.load(data)
        garments, others = (part * fashion.STD + fashion.MEAN for part in (images, test))
        held_out = min(HELD_OUT_GARMENTS, len(garments) // 10)
        self.pool = canvases.paste(garments[:-held_out], kinds[:-held_out], size.teacher_canvases, seed=0)
        self.train = self.pool[: size.canvases]
        self.validation = canvases.paste(garments[-held_out:], kinds[-held_out:], size.held_out, seed=1)
        self.test = canvases.paste(others, answers, size.test, seed=2)

    @property
    def record(self) -> Path:
        """File of the network in full precision: seconds of its training, and mAP on the canvases of the test."""
        return self._folder / "teacher.json"

    @cache  # noqa: B019 - a study lives as long as its process
    def teacher(self) -> nn.Module:
        """The network in full precision, trained once and kept."""
        torch.manual_seed(0)
        network = detector.Detector(self._size.width)
        path = self.record.with_suffix(".pt")
        if not path.is_file():
            started = time.perf_counter()
            self._train(network.to(self._device))
            with atomic_path(path) as temporary:
                torch.save(network.state_dict(), temporary)
            found = {"seconds": round(time.perf_counter() - started, 1)}
            write_atomic(self.record, json.dumps(found | self._precision(network.eval())) + "\n")
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        return network.to(self._device).eval()

    def _train(self, network: nn.Module) -> None:
        steps = self._size.teacher_epochs * -(-len(self.pool) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for _ in range(self._size.teacher_epochs):
            for rows in torch.randperm(len(self.pool)).split(BATCH):
                part = self.pool[rows]
                images, targets = split([tensor.to(self._device) for tensor in (part.images, part.boxes, part.labels)])
                detector.loss(network(images), targets).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    def _precision(self, network: nn.Module) -> dict[str, float]:
        return mean_precision(network, self.test, self._device)

    def student(self, cell: Cell) -> nn.Module:
        """Prepared and calibrated on canvases of the cell's seed, not trained."""
        rows = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(cell.seed))[:CALIBRATION]
        batches = canvases.normalized(self.train.images[rows]).to(self._device).split(BATCH)
        student = prepare(self.teacher(), batches, weight_bits=cell.bits, activation_bits=cell.bits, keep=detector.HEADS)
        return use_quantizers(student, LSQ())

    def trained(self, cell: Cell) -> nn.Module:
        """A cell's student, with the weights of its best epoch."""
        torch.manual_seed(cell.seed)
        pool = TensorDataset(self.train.images, self.train.boxes, self.train.labels)
        held_out = TensorDataset(self.validation.images, self.validation.boxes, self.validation.labels)
        draw = torch.Generator().manual_seed(cell.seed)
        sampler = RandomSampler(pool, num_samples=self._size.epoch, generator=draw)
        labels = cell.method == "QAT"
        return distill(
            self.student(cell),
            None if labels else self.teacher(),
            DataLoader(pool, batch_size=None, sampler=BatchSampler(sampler, BATCH, drop_last=True)),
            method=QAT() if labels else SQAKD(match=MATCH),
            task_loss=detector.loss if labels else None,
            batch_fn=split,
            epochs=self._size.epochs,
            val_loader=DataLoader(held_out, 100),
            metric=MeanAveragePrecision(backend="pycocotools"),
            metric_fn=counted,
            monitor="map",
            seed=cell.seed,
            lr=cell.lr,
            recalibrate_batches=8,
        ).model

    def run(self, cell: Cell) -> dict[str, float]:
        """mAP of a cell's student: on held-out canvases where it chooses a rate, else on the test's, and its file's."""
        student = self.student(cell) if cell.method == PTQ else self.trained(cell)
        if cell.seed == RATES_SEED:
            return {"held_out": mean_precision(student, self.validation, self._device)["map"]}
        found = self._precision(student)
        with tempfile.TemporaryDirectory() as folder:
            images = canvases.normalized(self.validation.images[:BATCH]).to(self._device)
            file = export_onnx(student, images, Path(folder) / "student.onnx", target="onnxruntime")
            runner = make_runner(file, "onnxruntime", 1)

            def answer(x: Tensor) -> dict[str, Tensor]:
                return {name: torch.from_numpy(output) for name, output in runner.run({"0": x.numpy()}).items()}

            return found | {"deployed": mean_precision(answer, self.test)["map"]}


@cache
def open_study(size: Size, folder: Path, data: Path, device: str) -> Study:
    """Of this process."""
    return Study(size, folder, data, device)


def train(size: Size, folder: Path, data: Path, device: str, cell: Cell) -> dict[str, float]:
    """Train a cell's student and find what is asked of it."""
    return open_study(size, folder, data, device).run(cell)


def read_rates(folder: Path) -> list[dict[str, Any]]:
    """Of each student that chooses a rate: its mAP on held-out canvases."""
    return [
        {"bits": cell.bits, "method": cell.method, "lr": cell.lr, "held_out": json.loads(path.read_text())["held_out"]}
        for cell in rate_cells()
        if (path := folder / f"{cell.slug}.json").is_file()
    ]


def chosen(rates: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """The best rate by bits and method."""
    return best_rates(rates, ("bits", "method"), lambda bits, method: RATES[bits])  # type: ignore[return-value]


def read(size: Size, folder: Path, rates: Mapping[tuple[int, str], float]) -> list[dict[str, Any]]:
    """A row per bits and method of which there are students: what was found for each seed."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for cell in cells(size, rates):
        path = folder / f"{cell.slug}.json"
        if path.is_file():
            row = rows.setdefault(
                (cell.bits, cell.method), {"bits": cell.bits, "method": cell.method, "lr": cell.lr, "runs": {}}
            )
            row["runs"][str(cell.seed)] = _precisions(path)
    return list(rows.values())


def _precisions(path: Path) -> dict[str, float]:
    """What a file says of accuracy; how long training took depends on what else the machine did."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


def committed() -> dict[str, Any]:
    """The figures in benchmarks/results; without rows where there are none yet."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": [], "rates": []}
    return found


def make_table(document: Mapping[str, Any]) -> str:
    """Markdown: mAP of full precision and of every kind of student."""
    if not document["rows"]:
        return "No student is trained yet: `python benchmarks/detection_study.py`."
    full = document["teacher"]
    lines = [["full precision", "", "", "", paired.percent(full["map"]), paired.percent(full["map_50"]), "", ""]]
    for row in sorted(document["rows"], key=lambda row: -row["bits"]):
        found = {name: [run[name] for run in row["runs"].values()] for name in ("map", "map_50", "deployed")}
        lines.append(
            [
                _student(row["bits"]),
                row["method"],
                f"{row['lr']:g}" if row["lr"] else "",
                str(len(row["runs"])),
                paired.percent(fmean(found["map"]), paired.half_width(found["map"])),
                paired.percent(fmean(found["map_50"])),
                paired.percent(fmean(found["deployed"])),
                paired.percent(fmean(found["map"]) - full["map"], sign="+"),
            ]
        )
    header = ["student", "method", "rate", "seeds", "mAP, %", "at an overlap of 0.5", "mAP of its file"]
    return page_tables.markdown([*header, "over full precision, points"], lines)


def comparisons(document: Mapping[str, Any]) -> dict[tuple[int, str, str], list[float]]:
    """By bits, method and control: differences of mAP over the seeds that both have."""
    by_key = {(row["bits"], row["method"]): row["runs"] for row in document["rows"]}
    found = {}
    for bits in sorted(BITS, reverse=True):
        for method, control in COMPARISONS:
            own, other = by_key.get((bits, method), {}), by_key.get((bits, control), {})
            differences = [own[seed]["map"] - other[seed]["map"] for seed in own if seed in other]
            if differences:
                found[bits, method, control] = differences
    return found


def make_tests_table(document: Mapping[str, Any]) -> str:
    """Markdown: methods against each other, in pairs over seeds."""
    found = comparisons(document)
    if not found:
        return "Nothing can be compared yet."
    tests = [paired.compare(differences) for differences in found.values()]
    lines = [
        [
            _student(bits),
            f"{method} over {control}",
            str(len(differences)),
            paired.percent(test.estimate, test.half_width, "+"),
            paired.p_text(None if len(differences) == 1 else p),
            "-" if test.detectable is None else f"{100 * test.detectable:.2f}",
        ]
        for ((bits, method, control), differences), test, p in zip(
            found.items(), tests, paired.holm([test.p for test in tests]), strict=True
        )
    ]
    header = ["student", "comparison", "seeds", "mAP, points", "p, after Holm", "found with 80 % power"]
    return page_tables.markdown(header, lines)


def make_rates_table(document: Mapping[str, Any]) -> str:
    """Markdown: mAP on held-out canvases by rate, in the order of the grid; the chosen one stands out."""
    if not document["rates"]:
        return "No rate is chosen yet."
    best = chosen(document["rates"])
    found = {(row["bits"], row["method"], row["lr"]): row["held_out"] for row in document["rates"]}
    lines, most = [], max(map(len, RATES.values()))
    for bits in sorted(BITS, reverse=True):
        for method in TRAINED:
            shown = []
            for lr in RATES[bits]:
                share = found.get((bits, method, lr))
                cell = "-" if share is None else f"{lr:g}: {paired.percent(share)}"
                shown.append(f"**{cell}**" if best.get((bits, method)) == lr else cell)
            lines.append([_student(bits), method, *shown, *[""] * (most - len(shown))])
    return page_tables.markdown(["student", "method", *["rate: mAP, %"] * most], lines)


def _student(bits: int) -> str:
    return f"W{bits}A{bits}"


def main() -> None:
    """Train what is missing, test, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.DEBIAN, help="folder of Fashion-MNIST (%(default)s)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--full", dest="size", action="store_const", const=FULL, default=SMALL, help="the large study")
    sizes.add_argument("--tiny", dest="size", action="store_const", const=TINY, help="one seed on a few canvases")
    parser.add_argument("--device", default="cpu", help="of training: cpu or cuda (%(default)s)")
    add_arguments(parser, "runs/detection_study")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the tables too, if it is the default one")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    size = options.size
    folder = options.cells / {FULL: "full", TINY: "tiny"}.get(size, "")
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(size, folder, options.data, options.device)
    study.teacher()  # before other processes want it

    def complete(wanted: Sequence[Cell]) -> None:
        students = {folder / f"{cell.slug}.json": (size, folder, options.data, options.device, cell) for cell in wanted}
        minutes = options.minutes - (time.monotonic() - began) / 60
        train_missing(train, students, processes=options.processes, minutes=minutes)

    complete(cells(size, {}))  # PTQ needs no rate, and little time
    for bits in BITS:
        complete([cell for cell in rate_cells() if cell.bits == bits])
        best = chosen(read_rates(folder))
        complete([cell for cell in cells(size, best) if cell.bits == bits])
    rates = read_rates(folder)
    document = {
        "environment": environment(),
        "size": vars(size),
        "device": options.device,
        "teacher": _precisions(study.record),
        "rates": rates,
        "rows": read(size, folder, chosen(rates)),
    }
    tables = {
        "detection_study": make_table(document),
        "detection_tests": make_tests_table(document),
        "detection_rates": make_rates_table(document),
    }
    print(*tables.values(), sep="\n\n")
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, tables, PAGE)


if __name__ == "__main__":
    main()
