"""Do the papers' claims hold here? Students of 2 to 8 bits, each method against its controls, several seeds.

    python benchmarks/evidence.py --processes 2 --rates --out benchmarks/results/evidence.json
    python benchmarks/evidence.py --processes 16 --full     # more images and seeds: for a GPU

The 62-class glyph set of glyphs.py, and a small residual network in full precision that was trained until it stopped to gain.
Every student starts from it, prepared by ModelOpt with a learned quantizer in its place, and is trained by
``qakd_plugin.distill`` at its defaults but for one learning rate: same images, same order, same number of steps, best epoch by
held-out images, accuracy on other images, which take part in nothing else. No number is tuned per cell: the rate is chosen
before, for all, on held-out images and a seed that is not among the study's. Students of a seed share everything but what is
compared, so differences are tested in pairs over seeds (t-test), and intervals are those of the mean over seeds (Student's t,
95 %).

The small study is of a case in which distillation has most to give: quantization-aware training on 4,000 images, for a network
that has seen 15,000. How much of the gain is owed to that, the students show that see all 15,000, in as many steps.

Questions: (1) SQAKD against QAT and against a fixed teacher with and without labels, for four quantizers; (2) QKD and its
phases; (3) QAT with 1, 10 and 100 % of the labels against SQAKD without any; (4) with all images of the teacher, and with
everything on; (5) what is gained from calibration only to the deployed file. What augmentation adds is asked in
augmentation_study.py.

Every student is a file in --cells: a run that was stopped goes on. --rates trains also the students by which the rate was
chosen; the study itself does not need them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import evidence_tables as tables
import glyphs
import page_tables
import torch
from paired import half_width
from scipy import stats
from small_nets import DEVICE, Split, accuracy, teacher
from students import add_arguments, train_missing
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from qakd_plugin import EWGS, KD, LSQ, PACT, QAT, QKD, SQAKD, CMISelector, DoReFa, distill, export_onnx, prepare, use_quantizers
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench.loading import make_runner
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "evidence.json"
QUANTIZERS: dict[str, Any] = {"LSQ": LSQ(), "PACT": PACT(), "DoReFa": DoReFa(), "EWGS": EWGS()}
EVERYTHING = "SQAKD, everything on"
"""No label needed, so all images of the teacher; the augmentation that CMI chooses; BatchNorm's statistics refreshed."""

METHODS: dict[str, Callable[[], Any]] = {
    "QAT": QAT,
    "SQAKD": SQAKD,
    "KD, T=1, no labels": lambda: SQAKD(temperature=1.0),
    "KD, T=4, labels": lambda: KD(temperature=4.0),
    "KD, T=1, labels": lambda: KD(temperature=1.0),
    "QKD": lambda: QKD(0.15, 0.5, 0.35),
    "QKD without self-studying": lambda: QKD(0, 0.6, 0.4),
    "QKD without co-studying": lambda: QKD(0.3, 0, 0.7),
    "QKD without tutoring": lambda: QKD(0.25, 0.75, 0),
    EVERYTHING: SQAKD,
}

HELD_OUT = 1000
"""Images that pick the best epoch; neither the teacher nor a student learns from them."""

BATCH, LR = 64, 2e-2
"""Of every student."""

RATES = (5e-3, LR, 8e-2)
"""Of which the study's has the best mean of the students in rate_cells()."""

RATES_SEED, FIRST_SEED = 0, 5
"""Of the students that choose the rate, and the first of the study's."""


@dataclass(frozen=True)
class Cell:
    """One student.

    Attributes:
        quantizer: a key of QUANTIZERS.
        bits: of weights and activations.
        method: a key of METHODS.
        labels: how many images the method sees, with their labels, as a share of the study's; more than 1 reaches into the
            rest of the teacher's. The number of steps is the same.
        seed: of order and training.
        lr: peak learning rate.
    """

    quantizer: str
    bits: int
    method: str
    labels: float
    seed: int
    lr: float = LR

    @property
    def slug(self) -> str:
        method = self.method.replace(" ", "-").replace(",", "").replace("=", "")
        return f"{self.quantizer}-w{self.bits}-{method}-{100 * self.labels:g}-{self.lr:g}-{self.seed}"


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Attributes:
        images: that students are trained on.
        epochs: of each student.
        seeds: per cell.
        teacher_images: that the teacher is trained on, those of students among them.
        teacher_epochs: of the teacher.
        test_images: that accuracy is taken on.
        rendered: images that all but those of the test are taken from.
    """

    images: int
    epochs: int
    seeds: int
    teacher_images: int = 15_000
    teacher_epochs: int = 20
    test_images: int = 8000
    rendered: int = 16_000


SMALL, FULL = Size(4000, 10, 5), Size(15_000, 4, 10)
"""For two cores and an hour; and for a GPU, on which a student's steps cost what their kernels' launches cost."""


def cells(size: Size) -> list[Cell]:
    """All students of a study, seed by seed, so that a run that was stopped has whole seeds."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + size.seeds):
        for bits in (2, 3, 4, 8):
            found += [Cell(name, bits, method, 1.0, seed) for name in QUANTIZERS for method in ("QAT", "SQAKD")]
        controls = [method for method in METHODS if method.startswith("KD")]
        found += [Cell("LSQ", bits, method, 1.0, seed) for bits in (2, 3, 4) for method in controls]
        found += [Cell("LSQ", 2, method, 1.0, seed) for method in METHODS if method.startswith("QKD")]
        found += [Cell("LSQ", 2, "QAT", share, seed) for share in (0.01, 0.1)]
        whole = max(1.0, size.teacher_images / size.images)
        methods = (EVERYTHING,) if whole == 1 else ("QAT", "SQAKD", EVERYTHING)
        found += [Cell("LSQ", bits, method, whole, seed) for bits in (2, 3, 4) for method in methods]
    return found


def rate_cells() -> list[Cell]:
    """The students that choose the rate."""
    return [
        Cell(name, bits, method, 1.0, RATES_SEED, lr)
        for bits in (2, 4)
        for lr in RATES
        for method in ("QAT", "SQAKD")
        for name in QUANTIZERS
    ]


@dataclass
class Study:
    """Data and teacher of a study.

    Args:
        size: how large it is.
        folder: of its files.
    """

    size: Size
    folder: Path

    def __post_init__(self) -> None:
        images, labels = glyphs.load(self.size.rendered, seed=0)
        self.test: Split = glyphs.load(self.size.test_images, seed=2)
        self.validation: Split = (images[-HELD_OUT:], labels[-HELD_OUT:])
        self.pool: Split = (images[: self.size.teacher_images], labels[: self.size.teacher_images])
        self.train: Split = (images[: self.size.images], labels[: self.size.images])
        path = self.folder / "teacher-glyphs.pt"
        self.teacher = teacher("glyphs", path, train=self.pool, epochs=self.size.teacher_epochs)
        self._calibrated: dict[tuple[str, int], float] = {}

    def student(self, quantizer: str, bits: int) -> nn.Module:
        """Prepared and calibrated, not trained: what post-training quantization gives."""
        student = prepare(self.teacher, [self.train[0][:256]], "modelopt", weight_bits=bits, activation_bits=bits)
        return use_quantizers(student, QUANTIZERS[quantizer])

    def calibrated(self, quantizer: str, bits: int) -> float:
        """Accuracy of what post-training quantization gives."""
        if (quantizer, bits) not in self._calibrated:
            self._calibrated[quantizer, bits] = accuracy(self.student(quantizer, bits), *self.test)
        return self._calibrated[quantizer, bits]

    def held_out(self, cell: Cell) -> dict[str, float]:
        """Train a cell's student. Accuracy on held-out images only: what the rate is chosen by."""
        return {"held_out": accuracy(self.trained(cell), *self.validation)}

    def run(self, cell: Cell) -> dict[str, float]:
        """Train a cell's student. Accuracies before and after, on held-out images, and of the deployed file."""
        trained = self.trained(cell)
        return {
            "before": self.calibrated(cell.quantizer, cell.bits),
            "held_out": accuracy(trained, *self.validation),
            "accuracy": accuracy(trained, *self.test),
            "deployed": self._deployed(trained),
        }

    def trained(self, cell: Cell) -> nn.Module:
        """A cell's student, with the weights of its best epoch."""
        torch.manual_seed(cell.seed)
        student = self.student(cell.quantizer, cell.bits)
        count = round(cell.labels * len(self.train[0]))
        pool = TensorDataset(self.pool[0][:count], self.pool[1][:count])
        draw = torch.Generator().manual_seed(cell.seed)
        # As many images per epoch whatever the share; without replacement as far as they go.
        sampler = RandomSampler(pool, num_samples=len(self.train[0]), generator=draw)
        method, options = METHODS[cell.method](), {}
        if cell.method == EVERYTHING:
            options = {"augment": CMISelector(), "recalibrate_batches": 32}
        elif cell.method != "QAT" and not isinstance(method, QKD) and cell.labels == 1:
            options = {"cache_teacher": self.folder / "teacher-logits.pt"}
        result = distill(
            student.to(DEVICE),
            None if cell.method == "QAT" else self.teacher.to(DEVICE),
            DataLoader(pool, batch_size=None, sampler=BatchSampler(sampler, BATCH, drop_last=False)),
            method=method,
            epochs=self.size.epochs,
            val_loader=DataLoader(TensorDataset(*self.validation), 500),
            seed=cell.seed,
            lr=cell.lr,
            **options,
        )
        return result.model.cpu()

    def _deployed(self, student: nn.Module) -> float:
        """Accuracy of the exported file in ONNX Runtime."""
        images, labels = self.test
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(student, images[:32], Path(folder) / "student.onnx", target="onnxruntime")
            runner = make_runner(path, "onnxruntime", 1)
            logits = [next(iter(runner.run({"0": x.numpy()}).values())) for x in images.split(500)]
            answers = torch.cat([torch.from_numpy(part).argmax(1) for part in logits])
        return int((answers == labels).sum()) / len(labels)


@cache
def open_study(size: Size, folder: Path) -> Study:
    """Of this process."""
    return Study(size, folder)


def train(size: Size, folder: Path, cell: Cell) -> dict[str, float]:
    """Train a cell's student and find what is asked of it."""
    study = open_study(size, folder)
    return study.held_out(cell) if cell.seed == RATES_SEED else study.run(cell)


Results = dict[tuple[str, int, str, float], list[dict[str, float]]]


def read(size: Size, folder: Path) -> Results:
    """What was found, by (quantizer, bits, method, share of labels), over the seeds that are whole."""
    every = cells(size)
    missing = {cell.seed for cell in every if not (folder / f"{cell.slug}.json").is_file()}
    found: Results = {}
    for cell in every:
        if cell.seed not in missing:
            key = (cell.quantizer, cell.bits, cell.method, cell.labels)
            found.setdefault(key, []).append(json.loads((folder / f"{cell.slug}.json").read_text()))
    return found


def read_rates(folder: Path) -> list[dict[str, Any]]:
    """Per rate, bits and method: mean accuracy over quantizers, on held-out images. Empty while a student is missing."""
    if not all((folder / f"{cell.slug}.json").is_file() for cell in rate_cells()):
        return []
    found: dict[tuple[float, int, str], list[float]] = {}
    for cell in rate_cells():
        run = json.loads((folder / f"{cell.slug}.json").read_text())
        found.setdefault((cell.lr, cell.bits, cell.method), []).append(run["held_out"])
    return [
        {"lr": lr, "bits": bits, "method": method, "held_out": fmean(shares)} for (lr, bits, method), shares in found.items()
    ]


def summary(found: Results) -> list[dict[str, Any]]:
    """A row per combination: mean and interval, and the difference to QAT with all labels, tested in pairs."""
    rows = []
    for (quantizer, bits, method, labels), runs in found.items():
        accuracies = [run["accuracy"] for run in runs]
        control = [run["accuracy"] for run in found[quantizer, bits, "QAT", 1.0]]
        row = {
            "quantizer": quantizer,
            "bits": bits,
            "method": method,
            "labels": labels,
            "seeds": len(runs),
            "before": fmean(run["before"] for run in runs),
            "accuracy": fmean(accuracies),
            "interval": half_width(accuracies),
            "deployed": fmean(run["deployed"] for run in runs),
            "accuracies": accuracies,
        }
        if (method, labels) != ("QAT", 1.0):
            differences = [a - b for a, b in zip(accuracies, control, strict=True)]
            row |= {"over_qat": fmean(differences), "over_qat_interval": half_width(differences)}
            row["p"] = float(stats.ttest_rel(accuracies, control).pvalue) if len(runs) > 1 else None
        rows.append(row)
    return rows


def main() -> None:
    """Train what is missing, test, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", dest="size", action="store_const", const=FULL, default=SMALL, help="the large study")
    parser.add_argument("--rates", action="store_true", help="train also the students that the rate was chosen by")
    add_arguments(parser, "runs/evidence")
    parser.add_argument("--out", type=Path, help="JSON file; evidence_page.py makes tables, figure and page of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = options.size
    folder = options.cells / "full" if size == FULL else options.cells
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(size, folder)  # trains the teacher, if that is missing
    wanted = cells(size) + (rate_cells() if options.rates else [])
    students = {folder / f"{cell.slug}.json": (size, folder, cell) for cell in wanted}
    train_missing(train, students, processes=options.processes, minutes=options.minutes)
    found = read(size, folder)
    if not found:
        print("No seed is whole yet: run the same command again.")
        return
    document = {
        "environment": environment(),
        "size": vars(size),
        "teacher": accuracy(study.teacher.cpu(), *study.test),
        "hours": sum(run["seconds"] for runs in found.values() for run in runs) / 3600,
        "rates": read_rates(folder),
        "rows": summary(found),
    }
    print(tables.make_table(document), tables.make_controls_table(document), *tables.verdicts(document), sep="\n")
    if options.out:
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(options.out)


if __name__ == "__main__":
    main()
