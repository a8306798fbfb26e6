"""This package beside other tools on real images: Fashion-MNIST and ResNet-20, at 8, 4 and 2 bits, every tool at its own rate.

    apt-get install dataset-fashion-mnist
    python benchmarks/peers_fashion.py --processes 2 --minutes 90 --out benchmarks/results/peers_fashion.json

The code of each peer is that of peers.py, in peer_code/; network, images, epochs and splits are those of the small study in
fashion_study.py. All start from one teacher, see the same images in the same order, with AdamW, the same schedule and the same
loss (KL to the teacher at T=4, no labels), and keep the epoch that is best on held-out images. Peak rates are tried for every
tool and number of bits alike, on held-out images with a seed that is not among the study's. What a tool refuses is told in its
own words.

Accuracy is of test images: of the trained network in PyTorch, and of its file in each runtime. Processor time is that of
training on one thread, calibration and selection included, after a warm-up; where processes share a machine they slow each
other down. Differences are tested in pairs over seeds and corrected by Holm within the table.

Every peer and seed is trained in a process of its own, since some toolkits patch PyTorch. Students are files in --cells: a run
that was stopped goes on. NNCF compiles an extension when it is used for the first time: a minute or two, which do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fashion
import fashion_study
import page_tables
import paired
import peers
import torch
from fashion_study import BATCH, RESNET, SMALL, Size
from peers import PEERS, RUNTIMES, Peer
from small_nets import Split
from students import best_rates
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from qakd_plugin._common.console import track
from qakd_plugin._common.files import write_atomic
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "peers_fashion.json"
PAGE = page_tables.ROOT / "docs" / "evidence.md"
RATES: dict[int, tuple[float, ...]] = {
    8: (1e-5, 1e-4, 1e-3),
    4: (1.25e-3, 5e-3, 2e-2),
    2: (1.25e-3, 5e-3, 2e-2),
}
"""Peak rates that each tool is given a choice of, by bits of weights and activations; 8 bits first."""

RATES_SEED, FIRST_SEED = 0, 1
TINY = Size(256, 128, 2, 1, 4, 256, 1, 64)
"""Whether every tool runs; a schedule of several steps, which tools' own schedules need."""


@dataclass(frozen=True)
class Cell:
    """One student: whose code makes it (a name of PEERS), bits of weights and activations, seed, and peak rate."""

    peer: str
    bits: int
    seed: int
    lr: float

    @property
    def slug(self) -> str:
        return f"{self.peer}-w{self.bits}-{self.lr:g}-{self.seed}"


class Garments:
    """What students are trained and judged on: a setting of peers.run.

    Args:
        size: of the study.
        folder: of its files.
        data: of Fashion-MNIST.
    """

    def __init__(self, size: Size, folder: Path, data: Path) -> None:
        self._study, self._size = fashion_study.Study(size, folder, data, "cpu"), size
        self.train, self.validation, self.test = self._study.train, self._study.validation, self._study.test

    @property
    def epochs(self) -> int:
        return self._size.epochs

    @cached_property
    def teacher(self) -> nn.Module:
        return self._study.teacher(RESNET)

    def loader(self, split: Split, seed: int) -> DataLoader[Any]:
        """Batches of an epoch."""
        images, draw = TensorDataset(*split), torch.Generator().manual_seed(seed)
        sampler = RandomSampler(images, num_samples=min(self._size.epoch, len(images)), generator=draw)
        return DataLoader(images, batch_size=None, sampler=BatchSampler(sampler, BATCH, drop_last=True))


def installed() -> list[Peer]:
    """Peers whose package is there."""
    return [peer for peer in PEERS if peer.version]


def rate_cells(peer: Peer) -> list[Cell]:
    """A peer's students that choose its rates."""
    return [Cell(peer.name, bits, RATES_SEED, lr) for bits in RATES for lr in RATES[bits]]


def cells(size: Size, peer: Peer, rates: Mapping[tuple[str, int], float]) -> list[Cell]:
    """A peer's students of the study, as far as its rates are chosen."""
    return [
        Cell(peer.name, bits, seed, rates[peer.name, bits])
        for seed in range(FIRST_SEED, FIRST_SEED + size.seeds)
        for bits in RATES
        if (peer.name, bits) in rates
    ]


def read(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """What was found of a student; None where it is not trained yet."""
    path = folder / f"{cell.slug}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_rates(folder: Path) -> list[dict[str, Any]]:
    """Of each student that chooses a rate: its accuracy on held-out images, or the error."""
    rows = []
    for cell in (cell for peer in installed() for cell in rate_cells(peer)):
        if (found := read(folder, cell)) is not None:
            kept = {name: found[name] for name in ("held_out", "error") if name in found}
            rows.append({"peer": cell.peer, "bits": cell.bits, "lr": cell.lr} | kept)
    return rows


def chosen(rates: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """The best rate by peer and bits."""
    return best_rates(rates, ("peer", "bits"), lambda peer, bits: RATES[bits])  # type: ignore[return-value]


def train(setting: Garments, folder: Path, wanted: Sequence[Cell], until: float) -> None:
    """Train the students that are missing, in this process, and begin none after the time ``until``."""
    warnings.simplefilter("ignore")  # of the toolkits, about themselves
    for cell in wanted:
        path = folder / f"{cell.slug}.json"
        if path.is_file() or time.time() > until:
            continue
        peer = next(peer for peer in PEERS if peer.name == cell.peer)
        deploy = cell.seed != RATES_SEED
        found = peers.run(peer, cell.bits, setting, cell.seed, path.with_suffix(""), cell.lr, deploy=deploy)
        write_atomic(path, json.dumps(found, indent=1) + "\n")
        print(f"{path.stem}: {found}", flush=True)


def train_missing(
    command: Sequence[str], folder: Path, wanted: Mapping[tuple[str, int], Sequence[Cell]], *, processes: int, until: float
) -> None:
    """Train the students that are missing, those of each peer and seed in a process of its own.

    Args:
        command: that trains them, given a peer, a seed and minutes.
        folder: of the students.
        wanted: by peer and seed.
        processes: at a time.
        until: the time after which no student is begun.
    """
    missing = [key for key, own in wanted.items() if any(read(folder, cell) is None for cell in own)]
    # Where NNCF compiles its extension on a slow machine, its own limit of a minute is too short.
    surroundings = {"NNCF_EXTENSION_LOAD_TIMEOUT": "600", **os.environ}

    def start(peer: str, seed: int) -> None:
        minutes = (until - time.time()) / 60
        if minutes > 0:
            asked = ["--peer", peer, "--seed", str(seed), "--minutes", str(minutes)]
            subprocess.run([*command, *asked], check=True, env=surroundings)

    with ThreadPoolExecutor(processes) as pool:
        started = [pool.submit(start, *key) for key in missing]
        try:
            for one in track(started, "students"):
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summary(size: Size, folder: Path, rates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry per peer and number of bits, with what was found for each seed, or the error."""
    best, entries = chosen(rates), []
    for bits in RATES:
        for peer in installed():
            entry = {"peer": peer.name, "label": peer.label, "package": f"{peer.package} {peer.version}", "bits": bits}
            own = [cell for cell in cells(size, peer, best) if cell.bits == bits]
            found = {str(cell.seed): run for cell in own if (run := read(folder, cell)) is not None}
            failed = [row for row in rates if (row["peer"], row["bits"]) == (peer.name, bits) and "error" in row]
            if found or failed:
                entries.append(entry | {"lr": best.get((peer.name, bits)), "cells": found or {"0": failed[0]}})
    return entries


def committed() -> dict[str, Any]:
    """The figures in benchmarks/results; without students where there are none yet."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"students": [], "rates": []}
    return found


def over(document: Mapping[str, Any]) -> dict[tuple[str, int], list[float]]:
    """By peer and bits: how much more accurate the first of PEERS is, over the seeds that both have."""
    runs = {(entry["peer"], entry["bits"]): entry["cells"] for entry in document["students"]}
    found = {}
    for (peer, bits), other in runs.items():
        own = runs.get((PEERS[0].name, bits), {})
        both = [seed for seed in other if "accuracy" in other[seed] and "accuracy" in own.get(seed, {})]
        if peer != PEERS[0].name and both:
            found[peer, bits] = [own[seed]["accuracy"] - other[seed]["accuracy"] for seed in both]
    return found


def make_table(document: Mapping[str, Any]) -> str:
    """Markdown: a row per peer and number of bits; errors as notes below it."""
    if not document["students"]:
        return "No student is trained yet: `python benchmarks/peers_fashion.py`."
    differences = over(document)
    tests = {key: paired.compare(values) for key, values in differences.items()}
    p_values = dict(zip(tests, paired.holm([test.p for test in tests.values()]), strict=True))
    lines = [["FP32 teacher", "", "", paired.percent(document["teacher"]), *[""] * 6]]
    notes: list[str] = []
    for entry in document["students"]:
        key, found = (entry["peer"], entry["bits"]), list(entry["cells"].values())
        line = [f"{entry['label']}, W{entry['bits']}A{entry['bits']}"]
        if (error := peers.first_error(found)) is not None:
            lines.append([*line, "", str(len(found)), peers.noted(error, notes), *[""] * 6])
            continue
        accuracies = [run["accuracy"] for run in found]
        line += [f"{entry['lr']:g}", str(len(found))]
        line.append(paired.percent(peers.mean("accuracy", found), paired.half_width(accuracies)))
        if key in tests:
            test, alone = tests[key], len(differences[key]) == 1
            line += [paired.percent(test.estimate, test.half_width, "+"), paired.p_text(None if alone else p_values[key])]
            line.append("-" if test.detectable is None else f"{100 * test.detectable:.2f}")
        else:
            line += [""] * 3
        for runtime in RUNTIMES:
            deployed = [run["deployed"][runtime] for run in found if runtime in run["deployed"]]
            line.append(peers.deployed_shown(deployed, None, notes))
        lines.append([*line, f"{peers.mean('cpu_seconds', found):.1f}"])
    header = ["student", "rate", "seeds", "accuracy in PyTorch, %", "ours, ModelOpt, over it, points", "p, after Holm"]
    header += ["found with 80 % power", *(f"its file in {name}, %" for name in RUNTIMES.values()), "training, processor s"]
    return "\n".join([page_tables.markdown(header, lines), *(f"\n{note}" for note in notes)])


def make_rates_table(document: Mapping[str, Any]) -> str:
    """Markdown: accuracy on held-out images by rate; the chosen one stands out."""
    if not document["rates"]:
        return "No rate is chosen yet."
    best, labels = chosen(document["rates"]), {peer.name: peer.label for peer in PEERS}
    found = {(row["peer"], row["bits"], row["lr"]): row["held_out"] for row in document["rates"] if "held_out" in row}
    lines = []
    for peer, bits in dict.fromkeys((row["peer"], row["bits"]) for row in document["rates"]):
        shown = []
        for lr in RATES[bits]:
            share = found.get((peer, bits, lr))
            cell = "-" if share is None else f"{lr:g}: {paired.percent(share)}"
            shown.append(f"**{cell}**" if best.get((peer, bits)) == lr else cell)
        lines.append([f"{labels[peer]}, W{bits}A{bits}", *shown])
    return page_tables.markdown(["student", "low", "middle", "high"], lines)


def main() -> None:
    """Train what is missing, test, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.DEBIAN, help="folder of Fashion-MNIST (%(default)s)")
    parser.add_argument("--tiny", dest="size", action="store_const", const=TINY, default=SMALL, help="one seed, few images")
    parser.add_argument("--cells", type=Path, default=Path("runs/peers_fashion"), help="one file per student (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that share the work, on one core each (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no student after so long; what is complete is evaluated"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the tables too, if it is the default one")
    parser.add_argument("--peer", choices=[peer.name for peer in PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    until = time.time() + 60 * options.minutes
    torch.set_num_threads(1)
    size: Size = options.size
    folder = options.cells / "tiny" if size == TINY else options.cells
    folder.mkdir(parents=True, exist_ok=True)
    setting = Garments(size, folder, options.data)
    teacher = setting.teacher  # before other processes want it
    if options.peer:
        peer = next(peer for peer in PEERS if peer.name == options.peer)
        every = rate_cells(peer) + cells(size, peer, chosen(read_rates(folder)))
        train(setting, folder, [cell for cell in every if cell.seed == options.seed], until)
        return

    command = [sys.executable, __file__, "--data", str(options.data), "--cells", str(options.cells)]
    command += ["--tiny"] if size == TINY else []

    def complete(wanted: Mapping[tuple[str, int], Sequence[Cell]]) -> None:
        train_missing(command, folder, wanted, processes=options.processes, until=until)

    complete({(peer.name, RATES_SEED): rate_cells(peer) for peer in installed()})
    rates = read_rates(folder)
    wanted: dict[tuple[str, int], list[Cell]] = {}
    for cell in (cell for peer in installed() for cell in cells(size, peer, chosen(rates))):
        wanted.setdefault((cell.peer, cell.seed), []).append(cell)
    complete(dict(sorted(wanted.items(), key=lambda own: own[0][1])))  # seed by seed
    document = {
        "environment": environment(),
        "size": vars(size),
        "teacher": peers.accuracy(teacher, setting.test),
        "rates": rates,
        "students": summary(size, folder, rates),
        "missing": [peer.name for peer in PEERS if not peer.version],
    }
    tables = {"peers_fashion": make_table(document), "peers_rates": make_rates_table(document)}
    print(*tables.values(), sep="\n\n")
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, tables, PAGE)


if __name__ == "__main__":
    main()
