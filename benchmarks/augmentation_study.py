"""Does a metric of the teacher foretell which augmentation makes the best student?

    python benchmarks/augmentation_study.py --out benchmarks/results/augmentation_study.json
    python benchmarks/augmentation_study.py --full      # sixteen candidates, five seeds, larger sets: for a GPU

SQAKD students (ModelOpt, W2A2 and W4A4) are trained under each candidate in several regimes: data sets (handwritten digits, and
glyphs rendered from fonts), numbers of images and epochs, a teacher trained with and without a strong augmentation. Each metric
is computed once per regime on the student's training images, with the teacher only, and correlated with the students' accuracy
on test images over the candidates (mean over seeds): Spearman and Kendall, with p-values. Signs are such that a metric that
works is positive.

Every trained student is a file in --cells: a run that was stopped goes on, and several processes (--part 0/2, --part 1/2) share
the work. Students of a seed share initial weights, order of batches and number of steps. The networks are residual with 8
channels in the first stage, images 24x24 (glyphs) and 32x32 (digits); the teacher saw more glyphs than the students do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import glyphs
import readme_tables
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qakd_plugin import SQAKD, distill, prepare
from qakd_plugin._files import atomic_path, write_atomic
from qakd_plugin.augment.candidates import Candidate, default_candidates
from qakd_plugin.bench.environment import environment
from qakd_plugin.demo.data import load as load_digits
from qakd_plugin.demo.net import DigitNet
from qakd_plugin.progress import track

RESULTS = readme_tables.RESULTS / "augmentation_study.json"
SMALL = (
    "none", "cutmix", "augmix", "autoaugment-cifar10", "randaugment", "trivialaugment", "randomerasing",
    "trivialaugment+cutmix", "randomerasing+cutmix",
)  # fmt: skip
BATCH = 128


@dataclass(frozen=True)
class Regime:
    """What is held fixed while candidates compete.

    Attributes:
        data: "glyphs" or "digits".
        images: for the students.
        epochs: of each student.
        bits: of weights and activations.
        strong_teacher: whether the teacher was trained with TrivialAugmentWide.
    """

    data: str
    images: int
    epochs: int
    bits: int
    strong_teacher: bool = False

    @property
    def name(self) -> str:
        teacher = ", strong teacher" if self.strong_teacher else ""
        return f"{self.data} {self.images} x {self.epochs}, W{self.bits}A{self.bits}{teacher}"

    @property
    def slug(self) -> str:
        return f"{self.data}-{self.images}-{self.epochs}-w{self.bits}{'-strong' if self.strong_teacher else ''}"


REGIMES = (
    Regime("glyphs", 3000, 6, 2),
    Regime("glyphs", 3000, 6, 2, strong_teacher=True),
    Regime("glyphs", 500, 36, 2),
    Regime("digits", 1078, 12, 2),
    Regime("glyphs", 3000, 6, 4),
    Regime("glyphs", 3000, 24, 2),
    Regime("digits", 1078, 12, 4),
)
FULL_REGIMES = (
    *(Regime("glyphs", n, e, b, s) for n, e in ((16000, 8), (16000, 64), (4000, 32), (1000, 128)) for b in (2, 4) for s in
    (False, True)), *(Regime("digits", 1078, e, b) for e in (20, 100) for b in (2, 4)),
)  # fmt: skip


def data(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test split: (images, labels) each."""
    if name == "glyphs":
        return glyphs.load(16_000, seed=0), glyphs.load(4000, seed=1)
    digits = load_digits(seed=0)
    return digits.train, digits.test


def teacher(name: str, strong: bool, folder: Path) -> nn.Module:
    """The full-precision network of a data set, trained once."""
    path = folder / f"teacher-{name}{'-strong' if strong else ''}.pt"
    classes = len(glyphs.CLASSES) if name == "glyphs" else 10
    torch.manual_seed(0)
    network = DigitNet(width=8)
    network.head = nn.Linear(32, classes)
    if not path.is_file():
        (images, labels), _ = data(name)
        strengthen = next(c for c in default_candidates() if c.name == ("trivialaugment" if strong else "none"))
        _train_teacher(network, images, labels, strengthen, epochs=6 if name == "glyphs" else 15)
        with atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def _train_teacher(network: nn.Module, images: Tensor, labels: Tensor, augment: Candidate, epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            F.cross_entropy(network(augment(images[rows])[0]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of correct answers."""
    correct = [(network(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return int(torch.stack(correct).sum()) / len(labels)


def student_accuracy(regime: Regime, candidate: Candidate, seed: int, folder: Path) -> float:
    """Train one student under a candidate; its accuracy on test images."""
    (images, _), test = data(regime.data)
    images = images[: regime.images]
    network = teacher(regime.data, regime.strong_teacher, folder)
    student = prepare(network, [images[:256]], "modelopt", weight_bits=regime.bits, activation_bits=regime.bits)
    order = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(images, BATCH, shuffle=True, generator=order)  # type: ignore[arg-type]
    result = distill(
        student, network, loader, method=SQAKD(), epochs=regime.epochs, lr=3e-3, seed=seed, augment=lambda x: candidate(x)[0]
    )
    return accuracy(result.model, *test)


def _train_all(regimes: Sequence[Regime], names: Sequence[str], seeds: int, folder: Path, part: tuple[int, int]) -> None:
    candidates = [candidate for candidate in default_candidates() if candidate.name in names]
    cells = [(seed, regime, candidate) for seed in range(seeds) for regime in regimes for candidate in candidates]
    for index, (seed, regime, candidate) in enumerate(track(cells, "students")):
        path = folder / f"{regime.slug}-{candidate.name}-{seed}.json"
        if index % part[1] != part[0] or path.is_file():
            continue
        started = time.perf_counter()
        found = student_accuracy(regime, candidate, seed, folder)
        write_atomic(path, json.dumps({"accuracy": found, "seconds": round(time.perf_counter() - started, 1)}) + "\n")
        print(f"{regime.name}  {candidate.name:24s} seed {seed}  {100 * found:.2f} %", flush=True)


def main() -> None:
    """Train what is missing, correlate, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="students per candidate and regime (2; 5 with --full)")
    parser.add_argument("--full", action="store_true", help="the large study")
    parser.add_argument(
        "--cells", type=Path, default=Path("runs/augmentation_study"), help="one file per student (%(default)s)"
    )
    parser.add_argument("--part", default="0/1", help="which share of the students to train, e.g. 0/2; only 0/1 evaluates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cells.mkdir(parents=True, exist_ok=True)
    index, _, count = options.part.partition("/")
    regimes, names = (FULL_REGIMES, [c.name for c in default_candidates()]) if options.full else (REGIMES, list(SMALL))
    seeds = options.seeds or (5 if options.full else 2)
    _train_all(regimes, names, seeds, options.cells, (int(index), int(count)))


if __name__ == "__main__":
    main()
