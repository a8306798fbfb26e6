"""Do the papers' claims hold here? Students of 2 to 8 bits, each method against its controls, several seeds.

    python benchmarks/evidence.py --out benchmarks/results/evidence.json
    python benchmarks/evidence.py --full        # more images, epochs and seeds: for a GPU

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

Every student is a file in --cells: a run that was stopped goes on, and several processes (--part 0/2, --part 1/2) share the
work.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import glyphs
import readme_tables
import torch
from scipy import stats
from small_nets import DEVICE, Split, accuracy, data, teacher
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from qakd_plugin import EWGS, KD, LSQ, PACT, QAT, QKD, SQAKD, CMISelector, DoReFa, distill, export_onnx, prepare, use_quantizers
from qakd_plugin._files import write_atomic
from qakd_plugin.bench.environment import environment
from qakd_plugin.bench.runners import make_runner
from qakd_plugin.progress import track

RESULTS = readme_tables.RESULTS / "evidence.json"
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

RATES = (3e-3, 1e-2, LR)
"""Of which the study's has the best mean of the students in rate_cells()."""

RATES_SEED, FIRST_SEED = 0, 5
"""Of the students that choose the rate, and the first of the study's."""

BARS = {4: 0.005, 3: 0.015}
"""Bits: largest loss of accuracy against full precision that the project aims at."""


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
    """

    images: int
    epochs: int
    seeds: int
    teacher_images: int = 15_000
    teacher_epochs: int = 20
    test_images: int = 8000


SMALL, FULL = Size(4000, 10, 5), Size(15_000, 40, 10)


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
        (images, labels), _ = data("glyphs")
        self.test: Split = glyphs.load(self.size.test_images, seed=2)
        self.validation: Split = (images[-HELD_OUT:], labels[-HELD_OUT:])
        self.pool: Split = (images[: self.size.teacher_images], labels[: self.size.teacher_images])
        self.train: Split = (images[: self.size.images], labels[: self.size.images])
        path = self.folder / "teacher-glyphs.pt"
        self.teacher = teacher("glyphs", path, train=self.pool, epochs=self.size.teacher_epochs)

    def student(self, quantizer: str, bits: int) -> nn.Module:
        """Prepared and calibrated, not trained: what post-training quantization gives."""
        student = prepare(self.teacher, [self.train[0][:256]], "modelopt", weight_bits=bits, activation_bits=bits)
        return use_quantizers(student, QUANTIZERS[quantizer])

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train a cell's student. Accuracies before and after, on held-out images, and of the deployed file."""
        torch.manual_seed(cell.seed)
        student = self.student(cell.quantizer, cell.bits)
        before = accuracy(student, *self.test)
        count = round(cell.labels * len(self.train[0]))
        pool = TensorDataset(self.pool[0][:count], self.pool[1][:count])
        draw = torch.Generator().manual_seed(cell.seed)
        # As many images per epoch whatever the share; without replacement as far as they go.
        sampler = RandomSampler(pool, num_samples=len(self.train[0]), generator=draw)
        everything = {"augment": CMISelector(), "recalibrate_batches": 32} if cell.method == EVERYTHING else {}
        result = distill(
            student.to(DEVICE),
            None if cell.method == "QAT" else self.teacher.to(DEVICE),
            DataLoader(pool, BATCH, sampler=sampler),
            method=METHODS[cell.method](),
            epochs=self.size.epochs,
            val_loader=DataLoader(TensorDataset(*self.validation), 500),
            seed=cell.seed,
            lr=cell.lr,
            **everything,
        )
        trained = result.model.cpu()
        return {
            "before": before,
            "held_out": accuracy(trained, *self.validation),
            "accuracy": accuracy(trained, *self.test),
            "deployed": self._deployed(trained),
        }

    def _deployed(self, student: nn.Module) -> float:
        """Accuracy of the exported file in ONNX Runtime."""
        images, labels = self.test
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(student, images[:32], Path(folder) / "student.onnx", target="onnxruntime")
            runner = make_runner(path, "onnxruntime", 1)
            answers = torch.cat([torch.from_numpy(runner.run(x.numpy())).argmax(1) for x in images.split(500)])
        return int((answers == labels).sum()) / len(labels)


def train_all(study: Study, options: argparse.Namespace) -> None:
    """Train the students that are missing, as far as the time goes."""
    index, count = (int(number) for number in options.part.split("/"))
    begun = time.perf_counter()
    for number, cell in enumerate(track(rate_cells() + cells(study.size), "students")):
        path = options.cells / f"{cell.slug}.json"
        late = options.minutes is not None and time.perf_counter() - begun > 60 * options.minutes
        if number % count != index or late or path.is_file():
            continue
        started = time.perf_counter()
        found = study.run(cell)
        write_atomic(path, json.dumps(found | {"seconds": round(time.perf_counter() - started, 1)}) + "\n")
        print(f"{cell.slug:40s} {100 * found['before']:6.2f} -> {100 * found['accuracy']:6.2f} %", flush=True)


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
            "interval": _half_width(accuracies),
            "deployed": fmean(run["deployed"] for run in runs),
            "accuracies": accuracies,
        }
        if (method, labels) != ("QAT", 1.0):
            differences = [a - b for a, b in zip(accuracies, control, strict=True)]
            row |= {"over_qat": fmean(differences), "over_qat_interval": _half_width(differences)}
            row["p"] = float(stats.ttest_rel(accuracies, control).pvalue) if len(runs) > 1 else None
        rows.append(row)
    return rows


def _half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of the mean."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def make_table(document: dict[str, Any]) -> str:
    """Markdown: SQAKD against QAT for every quantizer and width."""
    by_key = {(row["quantizer"], row["bits"], row["method"], row["labels"]): row for row in document["rows"]}
    rows = []
    for quantizer in QUANTIZERS:
        for bits in (2, 3, 4, 8):
            qat, sqakd = by_key[quantizer, bits, "QAT", 1.0], by_key[quantizer, bits, "SQAKD", 1.0]
            rows.append(
                [
                    f"{quantizer} W{bits}A{bits}",
                    _percent(qat["before"]),
                    _percent(qat["accuracy"], qat["interval"]),
                    _percent(sqakd["accuracy"], sqakd["interval"]),
                    f"{100 * sqakd['over_qat']:+.2f} (p {_p(sqakd['p'])})",
                    _percent(sqakd["deployed"]),
                ]
            )
    header = ["student", "calibrated only", "QAT", "SQAKD, no labels", "SQAKD over QAT, points", "SQAKD, deployed file"]
    return readme_tables.markdown(header, rows)


def make_controls_table(document: dict[str, Any]) -> str:
    """Markdown: LSQ under every method, against QAT with all labels."""
    rows = []
    for row in document["rows"]:
        if row["quantizer"] != "LSQ" or row["bits"] == 8:
            continue
        labels = "" if row["labels"] == 1 else f", {_share(row['labels'])}"
        against = f"{100 * row['over_qat']:+.2f} (p {_p(row['p'])})" if "over_qat" in row else ""
        rows.append(
            [f"W{row['bits']}A{row['bits']}", row["method"] + labels, _percent(row["accuracy"], row["interval"]), against]
        )
    rows.sort(key=lambda row: row[0])
    return readme_tables.markdown(["student", "method", "accuracy", "over QAT, points"], rows)


def make_rates_table(document: dict[str, Any]) -> str:
    """Markdown: accuracy on held-out images by rate, mean over quantizers."""
    columns = list(dict.fromkeys((row["bits"], row["method"]) for row in document["rates"]))
    shares = {(row["lr"], row["bits"], row["method"]): row["held_out"] for row in document["rates"]}
    rows = []
    for lr in dict.fromkeys(row["lr"] for row in document["rates"]):
        found = [shares[lr, *column] for column in columns]
        rows.append([f"{lr:g}", *map(_percent, found), _percent(fmean(found))])
    return readme_tables.markdown(["rate", *(f"W{bits}A{bits}, {method}" for bits, method in columns), "mean"], rows)


def _share(labels: float) -> str:
    return f"{100 * labels:g} % of the labels" if labels < 1 else f"{labels:g} times the images, all that the teacher saw"


def _percent(share: float, half_width: float | None = None) -> str:
    return f"{100 * share:.2f}" + ("" if half_width is None else f" ± {100 * half_width:.2f}")


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def verdicts(document: dict[str, Any]) -> list[str]:
    """The project's aims, and whether they are met."""
    lines = []
    for row in document["rows"]:
        if row["method"] == "SQAKD" and row["bits"] < 8 and row["labels"] == 1:
            ahead = row["over_qat"] > 0 and row["p"] is not None and row["p"] < 0.05
            name = f"{row['quantizer']} W{row['bits']}A{row['bits']}"
            lines.append(
                f"{name}: SQAKD over QAT {100 * row['over_qat']:+.2f} (p {_p(row['p'])}): {'met' if ahead else 'MISSED'}"
            )
            if row["bits"] in BARS:
                loss = document["teacher"] - row["accuracy"]
                met = loss <= BARS[row["bits"]]
                lines.append(f"{name}: {100 * loss:.2f} points below full precision: {'met' if met else 'MISSED'}")
    return lines


def main() -> None:
    """Train what is missing, test, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the large study")
    parser.add_argument("--cells", type=Path, help="one file per student (runs/evidence, or runs/evidence-full)")
    parser.add_argument("--part", default="0/1", help="which share of the students to train, e.g. 0/2")
    parser.add_argument("--minutes", type=float, help="begin no student after so long; seeds that are whole are evaluated")
    parser.add_argument("--out", type=Path, help="JSON file; the README's tables are written with the committed one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cells = options.cells or Path("runs/evidence-full" if options.full else "runs/evidence")
    options.cells.mkdir(parents=True, exist_ok=True)
    study = Study(FULL if options.full else SMALL, options.cells)
    train_all(study, options)
    found = read(study.size, options.cells)
    if not found:
        print("No seed is whole yet: run the same command again.")
        return
    document = {
        "environment": environment(),
        "size": vars(study.size),
        "teacher": accuracy(study.teacher.cpu(), *study.test),
        "rates": read_rates(options.cells),
        "rows": summary(found),
    }
    print(make_table(document), make_controls_table(document), *verdicts(document), sep="\n")
    if options.out:
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(options.out)
        if options.out.resolve() == RESULTS:
            readme_tables.write_table("evidence", make_table(document))
            readme_tables.write_table("evidence_controls", make_controls_table(document))


if __name__ == "__main__":
    main()
