"""Does a metric of the teacher predict which augmentation makes the best student?

    python benchmarks/augmentation_study.py --processes 2 --out benchmarks/results/augmentation_study.json
    python benchmarks/augmentation_study.py --processes 16 --full       # sixteen candidates, five seeds, larger sets: for a GPU
    python benchmarks/augmentation_study.py --fashion --processes 2 --out benchmarks/results/augmentation_fashion.json

SQAKD students (ModelOpt, W2A2 and W4A4) are trained under each candidate in several regimes: data sets (handwritten digits, and
glyphs rendered from fonts), numbers of images and epochs, a teacher trained with and without a strong augmentation. Each metric
is computed once per regime on the student's training images, with the teacher only, and correlated with the students' accuracy
on test images over the candidates (mean over seeds): Spearman and Kendall, with p-values. Signs are such that a metric that
works is positive.

Every trained student is a file in --cells: a run that was stopped goes on. Students of a seed share initial weights, order of
batches and number of steps. The networks are residual with 8 channels in the first stage, images 24x24 (glyphs) and 32x32
(digits); the teacher saw more glyphs than the students do.

--fashion asks the same of Fashion-MNIST with the networks of fashion_study.py, and of the pair form as well, which looks at the
calibrated student beside the teacher: sixteen candidates, three seeds, two networks, images seen once or many times, each
network at the fewest bits at which such short training learns.
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

import fashion
import fashion_study
import page_tables
import paired
import torch
from scipy.stats import kendalltau, norm, spearmanr
from small_nets import BATCH, DEVICE, Split, accuracy, data, teacher
from students import add_arguments, train_missing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qakd_plugin import SQAKD, distill, prepare, rank_augmentations
from qakd_plugin._common.files import write_atomic
from qakd_plugin.augment.candidates import default_candidates
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "augmentation_study.json"
FASHION_RESULTS = page_tables.RESULTS / "augmentation_fashion.json"
FASHION_PAGE = page_tables.ROOT / "docs" / "augmentation.md"
SMALL = (
    "none", "cutmix", "augmix", "autoaugment-cifar10", "randaugment", "trivialaugment", "randomerasing",
    "trivialaugment+cutmix", "randomerasing+cutmix",
)  # fmt: skip
Metrics = dict[str, Callable[[dict[str, float]], float]]
METRICS: Metrics = {
    "CMI - CE": lambda r: r["cmi"] - r["cross_entropy"],
    "CMI - centroid": lambda r: r["cmi"] - r["centroid_divergence"],
    "CMI": lambda r: r["cmi"],
    "- centroid": lambda r: -r["centroid_divergence"],
    "- teacher loss": lambda r: -r["cross_entropy"],
    "- variance": lambda r: -r["variance"],
}
"""By name: what is made of a record; higher should mean a better student."""
PAIR_METRICS: Metrics = {
    "CMI - student's divergence": lambda r: r["cmi"] - r["student_divergence"],
    "- student's divergence": lambda r: -r["student_divergence"],
    "CMI - CE of both": lambda r: r["cmi"] - r["cross_entropy"] + r["student_cmi"] - r["student_cross_entropy"],
}
"""Of records that know the calibrated student: the pair form, what it subtracts, and the other form taken on both networks."""
STATS = {"fashion": ((fashion.MEAN,), (fashion.STD,))}
"""Mean and deviation of images that are normalised."""
RANKED = 2000
"""Images of Fashion-MNIST that candidates are scored on, as CMISelector does."""


@dataclass(frozen=True)
class Regime:
    """What is held fixed while candidates compete.

    Attributes:
        data: "glyphs", "digits" or "fashion".
        images: for the students.
        epochs: of each student.
        bits: of weights and activations.
        strong_teacher: whether the teacher was trained with TrivialAugmentWide.
        network: of Fashion-MNIST: a key of fashion_study.FEATURES.
    """

    data: str
    images: int
    epochs: int
    bits: int
    strong_teacher: bool = False
    network: str = ""

    @property
    def name(self) -> str:
        teacher = ", strong teacher" if self.strong_teacher else ""
        return f"{self.network or self.data} {self.images} x {self.epochs}, W{self.bits}A{self.bits}{teacher}"

    @property
    def slug(self) -> str:
        network = f"-{self.network.replace(' ', '_')}" if self.network else ""
        return f"{self.data}{network}-{self.images}-{self.epochs}-w{self.bits}{'-strong' if self.strong_teacher else ''}"


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
FASHION_REGIMES = tuple(
    Regime("fashion", images, epochs, bits, network=network)
    for images, epochs in ((4000, 1), (500, 8))
    for network, bits in ((fashion_study.RESNET, 2), (fashion_study.MOBILENET, 3))
)


def regime_study(folder: Path) -> fashion_study.Study:
    """Data and networks of Fashion-MNIST."""
    return fashion_study.open_study(fashion_study.SMALL, folder, fashion.DEBIAN, DEVICE)


def regime_data(regime: Regime, folder: Path) -> tuple[Split, Split]:
    """What its students are trained on, and the test split."""
    if regime.data == "fashion":
        study = regime_study(folder)
        (images, labels), test = study.train, study.test
    else:
        (images, labels), test = data(regime.data)
    return (images[: regime.images], labels[: regime.images]), test


def regime_teacher(regime: Regime, folder: Path) -> nn.Module:
    """Its full-precision network."""
    if regime.data == "fashion":
        return regime_study(folder).teacher(regime.network)
    path = folder / f"teacher-{regime.data}{'-strong' if regime.strong_teacher else ''}.pt"
    strengthen = next(c for c in default_candidates() if c.name == ("trivialaugment" if regime.strong_teacher else "none"))
    return teacher(regime.data, path, strengthen)


def regime_student(regime: Regime, folder: Path) -> nn.Module:
    """Prepared and calibrated, not trained."""
    if regime.data == "fashion":
        return regime_study(folder).student(regime.network, "LSQ", regime.bits)
    (images, _), _ = regime_data(regime, folder)
    network = regime_teacher(regime, folder)
    return prepare(network, [images[:256]], "modelopt", weight_bits=regime.bits, activation_bits=regime.bits)


def train(regime: Regime, name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train one student under the candidate of that name; its accuracy on test images."""
    candidate = next(c for c in default_candidates() if c.name == name)
    (images, _), test = regime_data(regime, folder)
    is_fashion = regime.data == "fashion"
    student, order = regime_student(regime, folder), torch.Generator().manual_seed(seed)
    batch = fashion_study.BATCH if is_fashion else BATCH
    loader: Any = DataLoader(images, batch, shuffle=True, generator=order)  # type: ignore[arg-type]
    result = distill(
        student,
        regime_teacher(regime, folder),
        loader,
        method=SQAKD(),
        epochs=regime.epochs,
        lr=fashion_study.LR if is_fashion else 3e-3,
        seed=seed,
        augment=lambda x: candidate(x)[0],
        input_stats=STATS.get(regime.data),
        recalibrate_batches=8 if is_fashion else 0,
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


def pair_records(regime: Regime, names: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Figures of every candidate by teacher and calibrated student, and those of the student alone; computed once."""
    path = folder / f"metrics-{regime.slug}.json"
    if not path.is_file():
        pool = TensorDataset(*regime_data(regime, folder)[0])
        network, student = regime_teacher(regime, folder), regime_student(regime, folder)
        options: dict[str, Any] = {"race": False, "max_samples": RANKED, "input_stats": STATS.get(regime.data)}
        ranking = rank_augmentations(network, pool, names, form="pair", student=student, **options)
        alone = {record.name: record for record in rank_augmentations(student, pool, names, **options)}
        parts = ("cmi", "centroid_divergence", "cross_entropy", "variance", "student_divergence")
        by_name = {
            record.name: {part: getattr(record, part) for part in parts}
            | {"student_cmi": alone[record.name].cmi, "student_cross_entropy": alone[record.name].cross_entropy}
            for record in ranking
        }
        write_atomic(path, json.dumps(by_name, indent=1) + "\n")
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    return found


def records(regime: Regime, names: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Figures of every candidate on the student's training images, computed once per teacher and set of images."""
    if regime.data == "fashion":
        return pair_records(regime, names, folder)
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
    for metric, value in metrics_of(regime).items():
        values = {name: value(figures[name]) for name in names}
        pick = max(values, key=values.__getitem__)
        pairs = [values[name] for name in names], [means[name] for name in names]
        spearman, kendall = spearmanr(*pairs), kendalltau(*pairs)
        by_metric[metric] = {
            "spearman": float(spearman.statistic),
            "spearman_p": float(spearman.pvalue),
            "spearman_interval": spearman_interval(float(spearman.statistic), len(names)),
            "kendall": float(kendall.statistic),
            "kendall_p": float(kendall.pvalue),
            "pick": pick,
            "over_none": means[pick] - means["none"],
            "over_random": means[pick] - fmean(means.values()),
        }
    return {
        "regime": regime.name,
        "seeds": count,
        "teacher": accuracy(regime_teacher(regime, folder), *regime_data(regime, folder)[1]),
        "accuracies": accuracies,
        "best": max(means, key=means.__getitem__),
        "best_over_none": max(means.values()) - means["none"],
        # What a perfect metric could reach: one half of the seeds predicting the other.
        "noise": _between_seeds(accuracies) if count > 1 else None,
        "records": figures,
        "metrics": by_metric,
    }


def metrics_of(regime: Regime) -> Metrics:
    """What is correlated with accuracy in a regime."""
    return METRICS | PAIR_METRICS if regime.data == "fashion" else METRICS


def spearman_interval(rho: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Of a rank correlation over ``count`` candidates: Fisher's z with the variance of Bonett and Wright (2000)."""
    z = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, rho)))
    width = float(norm.isf((1 - confidence) / 2)) * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(z - width), math.tanh(z + width)


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


FASHION_SHOWN = ("CMI - CE", "CMI - centroid", "CMI - student's divergence", "CMI - CE of both", "- teacher loss", "- variance")
"""Rivals in the table of Fashion-MNIST, and the forms of the score first."""


def make_fashion_table(document: dict[str, Any]) -> str:
    """Markdown: a row per regime of Fashion-MNIST, correlations with their intervals, and what each pick gains over none.

    A line that says so where there are no students.
    """
    rows = document["rows"]
    if not rows:
        return "No student is trained yet: `python benchmarks/augmentation_study.py --fashion`."
    lines = []
    for found in rows:
        metrics = found["metrics"]
        correlations = [
            f"{metrics[name]['spearman']:.2f} ({low:.2f} to {high:.2f})"
            for name in FASHION_SHOWN
            for low, high in [metrics[name]["spearman_interval"]]
        ]
        gains = [_points(metrics[name]["over_none"]) for name in FASHION_SHOWN[:3]]
        seeds = f"{found['regime']}, {found['seeds']} seed{'s' if found['seeds'] > 1 else ''}"
        lines.append([seeds, *correlations, _points(found["best_over_none"]), *gains])
    means = [[found["metrics"][name]["spearman"] for found in rows] for name in FASHION_SHOWN]
    widths = [paired.half_width(values) for values in means]
    lines.append(
        [
            "mean",
            *(f"{fmean(v):.2f}" + ("" if w is None else f" ± {w:.2f}") for v, w in zip(means, widths, strict=True)),
            _points(fmean(found["best_over_none"] for found in rows)),
            *(_points(fmean(found["metrics"][name]["over_none"] for found in rows)) for name in FASHION_SHOWN[:3]),
        ]
    )
    header = ["students", *FASHION_SHOWN, "best over none", *(f"{name} over none" for name in FASHION_SHOWN[:3])]
    return page_tables.markdown(header, lines)


def fashion_committed() -> dict[str, Any]:
    """The figures of Fashion-MNIST in benchmarks/results; without rows where there are none yet."""
    found: dict[str, Any] = json.loads(FASHION_RESULTS.read_text()) if FASHION_RESULTS.is_file() else {"rows": []}
    return found


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
        record = found["records"][name]
        known = METRICS | PAIR_METRICS if "student_divergence" in record else METRICS
        figures = "  ".join(f"{metric} {value(record):7.3f}" for metric, value in known.items())
        print(f"  {name:24s} {100 * fmean(accuracies):6.2f} %   {figures}")
    for metric, row in found["metrics"].items():
        print(
            f"  {metric:26s} Spearman {row['spearman']:5.2f} (p {row['spearman_p']:.3f})  Kendall {row['kendall']:5.2f} "
            f"(p {row['kendall_p']:.3f})  picks {row['pick']}: {_points(row['over_none'])} points over none, "
            f"{_points(row['over_random'])} over a random pick"
        )


def main() -> None:
    """Train what is missing, correlate, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="students per candidate and regime (2; 3 with --fashion, 5 with --full)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the large study")
    which.add_argument("--fashion", action="store_true", help="the study on Fashion-MNIST, with the pair form")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="nine; all sixteen with --fashion or --full")
    add_arguments(parser, "runs/augmentation_study")
    parser.add_argument("--out", type=Path, help="JSON file; evidence_page.py makes tables and claims of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cells.mkdir(parents=True, exist_ok=True)
    sixteen = [candidate.name for candidate in default_candidates()]
    regimes: Sequence[Regime]
    regimes, names, seeds = (REGIMES, list(SMALL), 2)
    if options.full or options.fashion:
        regimes, names, seeds = (FULL_REGIMES, sixteen, 5) if options.full else (FASHION_REGIMES, sixteen, 3)
    names, seeds = options.candidates or names, options.seeds or seeds
    if "none" not in names or len(names) < 4:
        parser.error('--candidates needs "none", which the others are compared with, and three more.')
    train_all(regimes, names, seeds, options)
    rows = [found for regime in regimes if (found := evaluate(regime, names, seeds, options.cells)) is not None]
    for found in rows:
        _print(found)
    if not rows:
        print("No regime is complete yet: run the same command again.")
        return
    mean = {name: fmean(found["metrics"][name]["spearman"] for found in rows) for name in rows[0]["metrics"]}
    print("\nmean Spearman:", ", ".join(f"{name} {value:.2f}" for name, value in mean.items()))
    if options.out:
        document = {"environment": environment(), "full": options.full, "mean_spearman": mean, "rows": rows}
        table = {"augmentation_fashion": make_fashion_table(document)} if options.fashion else {}
        page_tables.write_results(options.out, document, FASHION_RESULTS, table, FASHION_PAGE)
        print(options.out)


if __name__ == "__main__":
    main()
