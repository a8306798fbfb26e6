"""Does a teacher that learns too teach better? QKD beside its controls, with a deeper teacher and every rate tuned alike.

    apt-get install dataset-fashion-mnist
    python benchmarks/qkd_study.py --processes 2 --out benchmarks/results/qkd_study.json

As in QKD's paper (arXiv 1911.12491) the teacher is deeper than the student, ResNet-56 for ResNet-20, and the phases take 3/20,
10/20 and 7/20 of the epochs. Fashion-MNIST; students are prepared by ModelOpt with LSQ and start from the same ResNet-20 in
full precision. Each method has the rate at which it alone is best on held-out images at 2 bits, with a seed that is not among
the study's: three rates of the student for each, three of the teacher where it learns. The paper trains far longer, on CIFAR.
Every student is a file in --cells: a run that was stopped goes on, and rows say how many seeds they have.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import fashion
import page_tables
import paired
import torch
from fashion_study import DEEPER, FIRST_SEED, PAGE, RATES_SEED, RESNET, Size, open_study
from students import add_arguments, train_missing

from qakd_plugin import KD, QAT, QKD, SQAKD
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "qkd_study.json"
SIZE = Size(59_000, 1000, 20, 5, 8, 59_000, 6, 10_000)
CONTROL, STUDIED = "QAT", "QKD"
METHODS: dict[str, Any] = {
    "QAT": QAT(),
    "KD with labels": KD(),
    "SQAKD": SQAKD(),
    "QKD": QKD(0.15, 0.5, 0.35),
    "QKD, the teacher frozen": QKD(0.15, 0, 0.85),
    "QKD without self-studying": QKD(0, 0.6, 0.4),
}
LEARNS = tuple(name for name, method in METHODS.items() if getattr(method, "co_studying", 0))
"""Methods whose teacher learns too."""
BITS, CHOOSING = (2, 3), 2
RATES, TEACHER_RATES = (1.25e-3, 5e-3, 2e-2), (1e-4, 5e-4, 2.5e-3)


@dataclass(frozen=True)
class Cell:
    """One student: bits of weights and activations, a key of METHODS, peak rates of student and teacher, seed."""

    bits: int
    method: str
    lr: float
    teacher_lr: float
    seed: int

    @property
    def slug(self) -> str:
        parts = (f"w{self.bits}", self.method.replace(",", ""), f"{self.lr:g}", f"{self.teacher_lr:g}", str(self.seed))
        return "-".join(parts).replace(" ", "_")


def rate_cells() -> list[Cell]:
    """The students that choose rates; where the teacher is frozen its rate is not used, and the first stands for it."""
    return [
        Cell(CHOOSING, method, lr, teacher_lr, RATES_SEED)
        for method in METHODS
        for lr in RATES
        for teacher_lr in (TEACHER_RATES if method in LEARNS else TEACHER_RATES[:1])
    ]


def read_rates(folder: Path) -> dict[str, list[dict[str, float]]]:
    """By method: rates, and accuracy on held-out images with them."""
    found: dict[str, list[dict[str, float]]] = {}
    for cell in rate_cells():
        path = folder / f"{cell.slug}.json"
        if path.is_file():
            row = {"lr": cell.lr, "teacher_lr": cell.teacher_lr, "held_out": json.loads(path.read_text())["held_out"]}
            found.setdefault(cell.method, []).append(row)
    return found


def best(rates: list[dict[str, float]]) -> dict[str, float]:
    """The rates to take: of equally good ones the first, which are the lowest."""
    return max(rates, key=lambda row: row["held_out"])


def cells(size: Size, rates: dict[str, list[dict[str, float]]]) -> Iterator[Cell]:
    """The study's students, seed by seed, of the methods that rates were tried for."""
    for seed in range(FIRST_SEED, FIRST_SEED + size.seeds):
        for bits in BITS:
            for method, tried in rates.items():
                yield Cell(bits, method, best(tried)["lr"], best(tried)["teacher_lr"], seed)


def train(size: Size, folder: Path, data: Path, device: str, cell: Cell) -> dict[str, float]:
    """Train a cell's student and find what is asked of it."""
    study = open_study(size, folder, data, device)
    teacher = None if cell.method == "QAT" else DEEPER
    student = study.student(RESNET, "LSQ", cell.bits)
    rates = {"lr": cell.lr, "teacher_lr": cell.teacher_lr}
    return study.accuracies(study.trained(student, METHODS[cell.method], cell.seed, teacher, **rates), cell.seed)


def read(size: Size, folder: Path, rates: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per method and width of which there are students: accuracies by seed."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for cell in cells(size, rates):
        path = folder / f"{cell.slug}.json"
        if path.is_file():
            empty = {"bits": cell.bits, "method": cell.method, "accuracies": {}, "seconds": 0.0}
            row, run = rows.setdefault((cell.bits, cell.method), empty), json.loads(path.read_text())
            row["accuracies"][str(cell.seed)] = run["accuracy"]
            row["seconds"] += run["seconds"]
    return list(rows.values())


def committed() -> dict[str, Any]:
    """The figures in benchmarks/results; without rows where there are none yet."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": [], "rates": {}}
    return found


def make_table(document: dict[str, Any]) -> str:
    """Markdown: each method, over QAT and, but for QAT and QKD, QKD over it, tested in pairs over the seeds both have.

    A line that says so where there are no students.
    """
    if not document["rows"]:
        return "No student is trained yet: `python benchmarks/qkd_study.py`."
    by_key = {(row["bits"], row["method"]): row["accuracies"] for row in document["rows"]}

    def over(bits: int, method: str, control: str) -> list[float]:
        own, other = by_key.get((bits, method), {}), by_key.get((bits, control), {})
        return [own[seed] - other[seed] for seed in own if seed in other]

    pairs = [(bits, method, CONTROL) for bits, method in by_key if method != CONTROL]
    pairs += [(bits, STUDIED, method) for bits, method in by_key if method not in (CONTROL, STUDIED)]
    pairs = [pair for pair in pairs if over(*pair)]
    tests = {pair: paired.compare(over(*pair)) for pair in pairs}
    ps = dict(zip(pairs, paired.holm([test.p for test in tests.values()]), strict=True))

    def cell(*pair: Any) -> str:
        if pair not in tests:
            return "-"
        test = tests[pair]
        found = paired.percent(test.estimate, test.half_width, "+")
        if test.detectable is None:
            return found
        return f"{found} (p {paired.p_text(ps[pair])}; {100 * test.detectable:.2f})"

    lines = [
        [
            f"W{bits}A{bits}",
            method,
            str(len(accuracies)),
            paired.percent(fmean(accuracies.values()), paired.half_width(list(accuracies.values()))),
            cell(bits, method, CONTROL),
            cell(bits, STUDIED, method) if method != CONTROL else "-",
        ]
        for (bits, method), accuracies in sorted(by_key.items(), key=lambda item: (item[0][0], list(METHODS).index(item[0][1])))
    ]
    return page_tables.markdown(["student", "method", "seeds", "accuracy", "over QAT, points", "QKD over it, points"], lines)


def make_rates_table(document: dict[str, Any]) -> str:
    """Markdown: accuracy on held-out images, a line per method and teacher's rate; a line that says so where there are none."""
    if not document["rates"]:
        return "No rate is chosen yet: `python benchmarks/qkd_study.py`."
    lines = []
    for method, tried in document["rates"].items():
        for teacher_lr in dict.fromkeys(row["teacher_lr"] for row in tried):
            found = {row["lr"]: row for row in tried if row["teacher_lr"] == teacher_lr}
            shown = [paired.percent(found[lr]["held_out"]) if lr in found else "-" for lr in RATES]
            chosen = [f"**{text}**" if found.get(lr) is best(tried) else text for lr, text in zip(RATES, shown, strict=True)]
            lines.append([method, f"{teacher_lr:g}" if method in LEARNS else "-", *chosen])
    return page_tables.markdown(["method", "teacher's rate", *(f"{lr:g}" for lr in RATES)], lines)


def main() -> None:
    """Choose the rates, train what is missing, test, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.DEBIAN, help="folder of Fashion-MNIST (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of training: cpu or cuda (%(default)s)")
    add_arguments(parser, "runs/qkd_study")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the tables too, if it is the default one")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    options.cells.mkdir(parents=True, exist_ok=True)
    study = open_study(SIZE, options.cells, options.data, options.device)
    networks = (RESNET, DEEPER)
    for name in networks:
        study.teacher(name)  # before other processes want it
    for choosing in (True, False):
        wanted = rate_cells() if choosing else list(cells(SIZE, read_rates(options.cells)))
        files = {
            options.cells / f"{cell.slug}.json": (SIZE, options.cells, options.data, options.device, cell) for cell in wanted
        }
        minutes = options.minutes - (time.monotonic() - began) / 60
        train_missing(train, files, processes=options.processes, minutes=minutes)
        if choosing and not all(path.is_file() for path in files):
            print("Not all rates are tried yet: run the same command again.")
            return
    rates = read_rates(options.cells)
    document = {
        "environment": environment(),
        "size": vars(SIZE),
        "device": options.device,
        "networks": {name: json.loads(study.record(name).read_text()) for name in networks},
        "rates": rates,
        "rows": read(SIZE, options.cells, rates),
    }
    tables = {"qkd_rates": make_rates_table(document), "qkd_study": make_table(document)}
    print(*tables.values(), sep="\n\n")
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, tables, PAGE)


if __name__ == "__main__":
    main()
