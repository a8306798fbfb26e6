"""The students of a study: each is a file, several processes train them, and a run that was stopped goes on."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qakd_plugin._common.console import track
from qakd_plugin._common.files import write_atomic

Train = Callable[..., dict[str, float]]
"""Trains one student and says what was found; a function of a module, so that other processes find it."""


def add_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """``--cells``, ``--processes`` and ``--minutes``."""
    parser.add_argument("--cells", type=Path, default=Path(folder), help="one file per student (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that share the work, on one core each (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no student after so long; what is complete is evaluated"
    )


def train_missing(train: Train, wanted: Mapping[Path, tuple[Any, ...]], *, processes: int, minutes: float) -> None:
    """Train the students whose files are missing, as far as the time goes.

    Args:
        train: called with a student's arguments.
        wanted: file of each student, and its arguments.
        processes: that share the work; with one it is done here.
        minutes: after which no student is begun.
    """
    missing = {path: arguments for path, arguments in wanted.items() if not path.is_file()}
    until = time.time() + 60 * minutes
    if processes == 1:
        for path, arguments in track(list(missing.items()), "students"):
            print(keep(path, until, train, *arguments), flush=True)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        students = [pool.submit(keep, path, until, train, *arguments) for path, arguments in missing.items()]
        try:
            for student in track(students, "students"):
                print(student.result(), flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def keep(path: Path, until: float, train: Train, *arguments: Any) -> str:
    """Train one student on one core and keep what was found, unless it is later than ``until``. A line that says so."""
    if time.time() > until:
        return f"{path.stem}: left for later"
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = train(*arguments)
    write_atomic(path, json.dumps(found | {"seconds": round(time.perf_counter() - started, 1)}) + "\n")
    return f"{path.stem}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def best_rates(
    tried: Iterable[Mapping[str, Any]], names: Sequence[str], grid: Callable[..., Sequence[float]]
) -> dict[tuple[Any, ...], float]:
    """The rate that was best on held-out data, of every kind of student of which all rates of its grid were tried.

    Args:
        tried: a row per student, with its "lr" and what it reached, "held_out"; one that failed reached nothing.
        names: what tells kinds of students apart.
        grid: of those, by position -> the rates.
    """
    kinds: dict[tuple[Any, ...], dict[float, float]] = {}
    for row in tried:
        if "held_out" in row:
            kinds.setdefault(tuple(row[name] for name in names), {})[row["lr"]] = row["held_out"]
    return {kind: max(found, key=found.__getitem__) for kind, found in kinds.items() if set(found) == set(grid(*kind))}
