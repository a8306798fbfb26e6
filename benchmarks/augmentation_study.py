"""Does a metric of the teacher predict which augmentation makes the best student?

    python benchmarks/augmentation_study.py --processes 2 --out benchmarks/results/augmentation_study.json
    python benchmarks/augmentation_study.py --processes 16 --full       # sixteen candidates, five seeds, larger sets: for a GPU

SQAKD students (ModelOpt, W2A2 and W4A4) are trained under each candidate in several regimes: data sets (handwritten digits, and
glyphs rendered from fonts), numbers of images and epochs, a teacher trained with and without a strong augmentation. Each metric
is computed once per regime on the student's training images, with the teacher only, and correlated with the students' accuracy
on test images over the candidates (mean over seeds): Spearman and Kendall, with p-values. Signs are such that a metric that
works is positive.

Every trained student is a file in --cells: a run that was stopped goes on. Students of a seed share initial weights, order of
batches and number of steps. The networks are residual with 8 channels in the first stage, images 24x24 (glyphs) and 32x32
(digits); the teacher saw more glyphs than the students do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import page_tables
import torch
from scipy.stats import kendalltau, spearmanr
from small_nets import BATCH, DEVICE, accuracy, data, teacher
from students import add_arguments, train_missing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qakd_plugin import SQAKD, distill, prepare, rank_augmentations
from qakd_plugin._common.files import write_atomic
from qakd_plugin.augment.candidates import default_candidates
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "augmentation_study.json"
SMALL = (
    "none", "cutmix", "augmix", "autoaugment-cifar10", "randaugment", "trivialaugment", "randomerasing",
    "trivialaugment+cutmix", "randomerasing+cutmix",
)  # fmt: skip
METRICS: dict[str, Callable[[dict[str, float]], float]] = {
    "CMI - CE": lambda r: r["cmi"] - r["cross_entropy"],
    "CMI - centroid": lambda r: r["cmi"] - r["centroid_divergence"],
    "CMI": lambda r: r["cmi"],
    "- centroid": lambda r: -r["centroid_divergence"],
    "- teacher loss": lambda r: -r["cross_entropy"],
    "- variance": lambda r: -r["variance"],
}
"""By name: what is made of a record; higher should mean a better student."""


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


def regime_teacher(regime: Regime, folder: Path) -> nn.Module:
    """Its full-precision network."""
    path = folder / f"teacher-{regime.data}{'-strong' if regime.strong_teacher else ''}.pt"
    strengthen = next(c for c in default_candidates() if c.name == ("trivialaugment" if regime.strong_teacher else "none"))
    return teacher(regime.data, path, strengthen)


def train(regime: Regime, name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one student under the candidate of that name; its accuracy on test images."""
    candidate = next(c for c in default_candidates() if c.name == name)
    (images, _), test = data(regime.data)
    images = images[: regime.images]
    network = regime_teacher(regime, folder)
    student = prepare(network, [images[:256]], "modelopt", weight_bits=regime.bits, activation_bits=regime.bits)
    order = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(images, BATCH, shuffle=True, generator=order)  # type: ignore[arg-type]
    result = distill(
        student, network, loader, method=SQAKD(), epochs=regime.epochs, lr=3e-3, seed=seed, augment=lambda x: candidate(x)[0]
    )
    return {"accuracy": accuracy(result.model, *test)}


def train_all(regimes: Sequence[Regime], names: Sequence[str], seeds: int, options: argparse.Namespace) -> None:
    """Train the students that are missing, as far as the time goes."""
    for regime in regimes:
        regime_teacher(regime, options.cells)
    students = {
        options.cells / f"{regime.slug}-{name}-{seed}.json": (regime, name, seed, options.cells)
        for seed in range(seeds)
        for regime in regimes
        for name in names
    }
    train_missing(train, students, processes=options.processes, minutes=options.minutes)


def records(regime: Regime, names: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Figures of every candidate on the student's training images, computed once per teacher and set of images."""
    path = folder / f"metrics-{regime.data}-{regime.images}{'-strong' if regime.strong_teacher else ''}.json"
    if not path.is_file():
        (images, labels), _ = data(regime.data)
        network = regime_teacher(regime, folder).to(DEVICE)
        pool = TensorDataset(images[: regime.images], labels[: regime.images])
        ranking = rank_augmentations(network, pool, names, race=False)
        parts = ("cmi", "centroid_divergence", "cross_entropy", "variance")
        write_atomic(path, json.dumps({r.name: {part: getattr(r, part) for part in parts} for r in ranking}, indent=1) + "\n")
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    return found


def evaluate(regime: Regime, names: Sequence[str], seeds: int, folder: Path) -> dict[str, Any] | None:
    """Correlations of a regime over the seeds that are complete; None where none is."""
    accuracies: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        paths = {name: folder / f"{regime.slug}-{name}-{seed}.json" for name in names}
        if all(path.is_file() for path in paths.values()):
            for name, path in paths.items():
                accuracies[name].append(json.loads(path.read_text())["accuracy"])
    count = len(accuracies[names[0]])
    if not count:
        return None
    means = {name: fmean(found) for name, found in accuracies.items()}
    figures = records(regime, names, folder)
    by_metric = {}
    for metric, value in METRICS.items():
        values = {name: value(figures[name]) for name in names}
        pick = max(values, key=values.__getitem__)
        pairs = [values[name] for name in names], [means[name] for name in names]
        spearman, kendall = spearmanr(*pairs), kendalltau(*pairs)
        by_metric[metric] = {
            "spearman": float(spearman.statistic),
            "spearman_p": float(spearman.pvalue),
            "kendall": float(kendall.statistic),
            "kendall_p": float(kendall.pvalue),
            "pick": pick,
            "over_none": means[pick] - means["none"],
            "over_random": means[pick] - fmean(means.values()),
        }
    return {
        "regime": regime.name,
        "seeds": count,
        "teacher": accuracy(regime_teacher(regime, folder), *data(regime.data)[1]),
        "accuracies": accuracies,
        "best": max(means, key=means.__getitem__),
        "best_over_none": max(means.values()) - means["none"],
        # What a perfect metric could reach: one half of the seeds predicting the other.
        "noise": _between_seeds(accuracies) if count > 1 else None,
        "records": figures,
        "metrics": by_metric,
    }


def _between_seeds(accuracies: dict[str, list[float]]) -> float:
    halves = [[fmean(found[start::2]) for found in accuracies.values()] for start in (0, 1)]
    return float(spearmanr(*halves).statistic)


def make_table(document: dict[str, Any]) -> str:
    """Markdown: a row per regime, and the mean over regimes."""
    shown = ("CMI - CE", "CMI - centroid", "- teacher loss", "- variance")
    rows = []
    for found in document["rows"]:
        metrics = found["metrics"]
        rows.append(
            [
                f"{found['regime']}, {found['seeds']} seed{'s' if found['seeds'] > 1 else ''}",
                *(_rho(metrics[name]["spearman"], metrics[name]["spearman_p"]) for name in shown),
                _points(found["best_over_none"]),
                _points(fmean(_over_none(found).values())),
                *(_points(metrics[name]["over_none"]) for name in shown[:2]),
            ]
        )
    means = {name: document["mean_spearman"][name] for name in shown}
    gains = [fmean(found["metrics"][name]["over_none"] for found in document["rows"]) for name in shown[:2]]
    best = fmean(found["best_over_none"] for found in document["rows"])
    random = fmean(fmean(_over_none(found).values()) for found in document["rows"])
    rows.append(["mean", *(f"{means[name]:.2f}" for name in shown), *map(_points, (best, random, *gains))])
    header = ["students", *shown, "best over none", "one at random over none", "CMI - CE over none", "CMI - centroid over none"]
    return page_tables.markdown(header, rows)


def make_candidates_table(document: dict[str, Any]) -> str:
    """Markdown: what each candidate gains over no augmentation, a row per regime."""
    names = list(dict.fromkeys(name for found in document["rows"] for name in found["accuracies"]))
    rows = []
    for found in document["rows"]:
        gains = _over_none(found)
        rows.append([found["regime"], *(_points(gains[name]) if name in gains else "" for name in names)])
    return page_tables.markdown(["students", *names], rows)


def _over_none(found: dict[str, Any]) -> dict[str, float]:
    """Of each candidate, "none" among them, the mean accuracy over that of "none"."""
    means = {name: fmean(accuracies) for name, accuracies in found["accuracies"].items()}
    return {name: mean - means["none"] for name, mean in means.items()}


def _rho(value: float, p: float) -> str:
    return f"{value:.2f}{'*' if p < 0.05 else ''}"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}" if not math.isclose(share, 0, abs_tol=5e-5) else "0"


def _print(found: dict[str, Any]) -> None:
    print(f"\n{found['regime']}: {found['seeds']} seeds, teacher {100 * found['teacher']:.2f} %, best {found['best']}")
    for name, accuracies in found["accuracies"].items():
        figures = "  ".join(f"{metric} {value(found['records'][name]):7.3f}" for metric, value in METRICS.items())
        print(f"  {name:24s} {100 * fmean(accuracies):6.2f} %   {figures}")
    for metric, row in found["metrics"].items():
        print(
            f"  {metric:16s} Spearman {row['spearman']:5.2f} (p {row['spearman_p']:.3f})  Kendall {row['kendall']:5.2f} "
            f"(p {row['kendall_p']:.3f})  picks {row['pick']}: {_points(row['over_none'])} points over none, "
            f"{_points(row['over_random'])} over a random pick"
        )


def main() -> None:
    """Train what is missing, correlate, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="students per candidate and regime (2; 5 with --full)")
    parser.add_argument("--full", action="store_true", help="the large study")
    add_arguments(parser, "runs/augmentation_study")
    parser.add_argument("--out", type=Path, help="JSON file; evidence_page.py makes tables and claims of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cells.mkdir(parents=True, exist_ok=True)
    regimes, names = (FULL_REGIMES, [c.name for c in default_candidates()]) if options.full else (REGIMES, list(SMALL))
    seeds = options.seeds or (5 if options.full else 2)
    train_all(regimes, names, seeds, options)
    rows = [found for regime in regimes if (found := evaluate(regime, names, seeds, options.cells)) is not None]
    for found in rows:
        _print(found)
    if not rows:
        print("No regime is complete yet: run the same command again.")
        return
    mean = {name: fmean(found["metrics"][name]["spearman"] for found in rows) for name in METRICS}
    print("\nmean Spearman:", ", ".join(f"{name} {value:.2f}" for name, value in mean.items()))
    if options.out:
        document = {"environment": environment(), "full": options.full, "mean_spearman": mean, "rows": rows}
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(options.out)


if __name__ == "__main__":
    main()
