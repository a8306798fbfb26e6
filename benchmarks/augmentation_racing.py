"""Does a race find the winner of the exhaustive ranking, and how much does it save?

    python benchmarks/augmentation_racing.py --out benchmarks/results/augmentation_racing.json

The digits teacher, its 1,077 training images, the sixteen candidates of the paper. A trial is a seed: of the order of images
and of all draws. Its exhaustive ranking scores every candidate on all images; its race stops as soon as the leader is alone.
Both see the same images with the same draws. Teacher forwards are compared with two full passes per candidate, which is what
computing the score by its definition takes: one pass for the centroids, one for the divergences.

Every trial is a file in --cells, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import page_tables
import torch
from torch import nn
from torch.utils.data import TensorDataset

from qakd_plugin import rank_augmentations
from qakd_plugin._common.console import track
from qakd_plugin._common.files import atomic_path, write_atomic
from qakd_plugin.augment.cmi import FORMS
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "augmentation_racing.json"
BAR, AGREEMENT = 10.0, 0.95


def digits_teacher(path: Path) -> nn.Module:
    """The network of the tests, trained once."""
    torch.manual_seed(0)
    network: nn.Module = DigitNet(width=8)
    if not path.is_file():
        train_float(network, load(seed=0).loader("train", shuffle=True), epochs=15, lr=1e-2)
        with atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def trial(teacher: nn.Module, seed: int) -> dict[str, Any]:
    """One exhaustive ranking and, for each form of the score, one race."""
    data = TensorDataset(*load(seed=0).train)
    whole = rank_augmentations(teacher, data, seed=seed, race=False)
    found: dict[str, Any] = {"seed": seed, "images": whole[0].num_samples, "candidates": len(whole)}
    for form in FORMS:
        part = {"centroid": "centroid_divergence", "ce": "cross_entropy"}[form]
        winner = max(whole, key=lambda record, part=part: record.cmi - getattr(record, part))  # type: ignore[misc]
        race = rank_augmentations(teacher, data, seed=seed, form=form)
        tied = [record.name for record in race if record.tied_with_best]
        found[form] = {"winner": winner.name, "race": race[0].name, "tied": tied, "forwards": race.teacher_forwards}
    return found


def summary(trials: list[dict[str, Any]], form: str) -> dict[str, Any]:
    """Agreement, and teacher forwards saved, over all trials."""
    agree = sum(found[form]["race"] == found[form]["winner"] for found in trials)
    ratios = sorted(2 * found["candidates"] * found["images"] / found[form]["forwards"] for found in trials)
    forwards = sum(found[form]["forwards"] for found in trials)
    passes = sum(2 * found["candidates"] * found["images"] for found in trials)
    return {
        "form": form,
        "trials": len(trials),
        "agree": agree,
        "ratio": passes / forwards,
        "lowest": ratios[0],
        "highest": ratios[-1],
        "winners": len({found[form]["winner"] for found in trials}),
        "tied": sum(bool(found[form]["tied"]) for found in trials),
    }


def make_table(document: dict[str, Any]) -> str:
    """Markdown: a row per form of the score."""
    rows = [
        [
            {"ce": "CMI - cross-entropy", "centroid": "CMI - centroid divergence"}[row["form"]],
            f"{row['agree']} of {row['trials']}",
            f"{row['ratio']:.1f}x ({row['lowest']:.1f} to {row['highest']:.1f})",
            f"{row['tied']} of {row['trials']}",
        ]
        for row in document["rows"]
    ]
    header = ["score", "race and exhaustive ranking agree", "fewer teacher forwards", "winner said to be tied"]
    return page_tables.markdown(header, rows)


def main() -> None:
    """Run the trials that are missing, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--cells", type=Path, default=Path("runs/augmentation_racing"), help="one file per trial (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; the table in docs/measured.md is written with the committed one")
    options = parser.parse_args()
    options.cells.mkdir(parents=True, exist_ok=True)
    teacher, trials = digits_teacher(options.cells / "teacher.pt"), []
    for seed in track(range(options.trials), "trials"):
        path = options.cells / f"{seed:03d}.json"
        if not path.is_file():
            write_atomic(path, json.dumps(trial(teacher, seed)) + "\n")
        trials.append(json.loads(path.read_text()))
    rows = [summary(trials, form) for form in FORMS]
    for row in rows:
        met = row["agree"] >= AGREEMENT * row["trials"] and row["ratio"] >= BAR
        print(
            f"{row['form']:10s} agreement {row['agree']} of {row['trials']}, {row['ratio']:.1f}x fewer teacher forwards "
            f"({row['lowest']:.1f} to {row['highest']:.1f}): {'met' if met else 'MISSED'}"
        )
    if options.out:
        document = {"environment": environment(), "rows": rows, "trials": trials}
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(options.out)
        if options.out.resolve() == RESULTS:
            page_tables.write_table("augmentation_racing", make_table(document))


if __name__ == "__main__":
    main()
