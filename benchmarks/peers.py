"""This package beside what a user would write today with other tools: same network, data, budget, loss and machine.

    python benchmarks/peers.py --out benchmarks/results/peers.json

Each peer is a file in peer_code/ with the code that a user of that tool writes, as its documentation says: ``train`` and
``export``. All start from the same teacher, the demo's residual network on the 62-class glyphs of glyphs.py, and see the same
images in the same order, for as many epochs, with AdamW, the same learning rates, the same loss (KL to the teacher at T=4, no
labels), and keep the epoch that is best on held-out images. Lines of user code are those of its file without blank lines,
comments, docstrings and imports; all files are formatted alike.

Reported on test images: accuracy of the trained network in PyTorch, and of the deployed file through its runtime; processor
time of training (one thread, calibration and selection included, after a warm-up), and that of a call at batch 1 on one thread,
all files of the first seed interleaved in one run. Times by the clock are among the figures, too. Where a tool cannot do a
step, its error stands below the table.

Intel Neural Compressor is not among them: quantization-aware training in its version 3.10 takes linear layers only, in MX
formats, and this network is convolutional.

Every peer and seed is trained in a process of its own, since some toolkits patch PyTorch. Students are files in --cells: a run
that was stopped goes on. NNCF compiles an extension when it is used for the first time: a minute or two, which do not count.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import time
import tokenize
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, Protocol

import page_tables
import torch
from evidence import SMALL, Size, Study
from small_nets import BATCH, Split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qakd_plugin import export_float
from qakd_plugin._common.console import track
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench import Candidate, benchmark
from qakd_plugin.bench.loading import make_runner
from qakd_plugin.runtimes.base import FILE_RUNTIMES
from qakd_plugin.runtimes.host import environment, is_busy

RESULTS = page_tables.RESULTS / "peers.json"
CODE = Path(__file__).resolve().parent / "peer_code"
LR = 1e-3
"""Peak rate of every student here; peers_fashion.py gives each tool its own."""
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Peer:
    """A way to the same student.

    Attributes:
        name: of its file in peer_code.
        label: for tables.
        package: distribution that its file needs.
        bits: of weights and activations that it can train.
    """

    name: str
    label: str
    package: str
    bits: tuple[int, ...]

    @property
    def lines(self) -> int:
        """Lines of user code."""
        return count_lines((CODE / f"{self.name}.py").read_text())

    @property
    def version(self) -> str | None:
        """Of its package; None where it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


PEERS = (
    Peer("ours_modelopt", "ours, ModelOpt", "nvidia-modelopt", (8, 4)),
    Peer("ours_torch_ao", "ours, torch.ao FX", "torch", (8, 4)),
    Peer("modelopt_distill", "ModelOpt QAT + distill", "nvidia-modelopt", (8, 4)),
    Peer("torch_ao_kd_loop", "torch.ao FX + KD loop", "torch", (8,)),
    Peer("nncf_qat", "NNCF QAT + KD loop", "nncf", (8,)),
)
"""The first is the one that others are compared with."""

_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def count_lines(source: str) -> int:
    """Lines with code, without imports and docstrings."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - left_out)


def cell(cells: Path, peer: Peer, bits: int, size: Size, seed: int) -> Path:
    """Where a student's figures are; its files lie in a folder of that name."""
    return cells / f"{peer.name}-w{bits}-{size.images}x{size.epochs}-{seed}.json"


class Setting(Protocol):
    """What students are trained and judged on.

    Attributes:
        teacher: that they start from, in full precision.
        train: images and labels.
        validation: of which the best epoch is picked.
        test: that accuracy is taken on.
        epochs: of each student.
    """

    teacher: nn.Module
    train: Split
    validation: Split
    test: Split

    @property
    def epochs(self) -> int: ...

    def loader(self, split: Split, seed: int) -> DataLoader[Any]:
        """Batches of an epoch."""


class Glyphs(Study):
    """The study of evidence.py."""

    @property
    def epochs(self) -> int:
        return self.size.epochs

    def loader(self, split: Split, seed: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*split), BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))


def run(
    peer: Peer, bits: int, setting: Setting, seed: int, folder: Path, lr: float = LR, *, deploy: bool = True
) -> dict[str, Any]:
    """Train, export and score one student.

    Args:
        peer: whose code runs.
        bits: of weights and activations.
        setting: data and teacher.
        seed: of the order of images and of training.
        folder: of the exported files.
        lr: peak rate.
        deploy: whether files are exported and scored.

    Returns:
        Accuracy on held-out and on test images, seconds by the clock and of the processor, and for each runtime the file and
        its accuracy, or an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = setting.train[0]
    val_loader = DataLoader(TensorDataset(*setting.validation), 500)

    def train(code: ModuleType, split: Split, epochs: int) -> nn.Module:
        torch.manual_seed(seed)
        batches, loader = list(images[:256].split(64)), setting.loader(split, seed)
        return code.train(copy.deepcopy(setting.teacher), batches, loader, val_loader, epochs, bits, lr)

    try:
        code = importlib.import_module(f"peer_code.{peer.name}")
        train(code, (images[: 2 * BATCH], setting.train[1][: 2 * BATCH]), 1)  # lazy imports and compilations do not count
        started, started_cpu = time.perf_counter(), time.process_time()
        student = train(code, setting.train, setting.epochs)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    except Exception as error:  # another tool's failure is a result  # noqa: BLE001
        return {"error": _message(error, folder)}
    found: dict[str, Any] = {
        "held_out": accuracy(student, setting.validation),
        "accuracy": accuracy(student, setting.test),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
    }
    if not deploy:
        return found
    try:
        files = code.export(student, images[:32], folder)
    except Exception as error:  # noqa: BLE001
        return {**found, "deployed": {runtime: {"error": _message(error, folder)} for runtime in FILE_RUNTIMES}}
    return {**found, "deployed": {runtime: _deployed(path, runtime, setting.test, folder) for runtime, path in files.items()}}


def _deployed(path: Path, runtime: str, test: Split, folder: Path) -> dict[str, Any]:
    """Name and accuracy of a file through its runtime, or the runtime's error."""
    try:
        runner = make_runner(path, runtime, 1)
        return {
            "file": path.name,
            "accuracy": accuracy(lambda x: torch.from_numpy(next(iter(runner.run({"0": x.numpy()}).values()))), test),
        }
    except Exception as error:  # noqa: BLE001
        return {"error": _message(error, folder)}


@torch.no_grad()
def accuracy(network: Callable[[Tensor], Tensor], test: Split) -> float:
    """Share of correct answers, of a network or a runtime; a converted network of torch.ao has no parameters."""
    images, labels = test
    answers = torch.cat([network(x).argmax(1) for x in images.split(500)])
    return int((answers == labels).sum()) / len(labels)


def _message(error: Exception, folder: Path) -> str:
    """In one line, without paths of this machine."""
    text = " ".join(str(error).replace(f"{folder}/", "").split())
    return f"{type(error).__name__}: {text}"[:300]


def train_all(size: Size, seeds: int, cells: Path) -> None:
    """Train the students that are missing, seed by seed, each peer in a process of its own."""
    todo = [(seed, peer) for seed in range(seeds) for peer in PEERS if peer.version]
    for seed, peer in track(todo, "students"):
        if all(cell(cells, peer, bits, size, seed).is_file() for bits in peer.bits):
            continue
        sizes = ["--images", str(size.images), "--epochs", str(size.epochs)]
        command = [sys.executable, __file__, "--peer", peer.name, "--seed", str(seed), "--cells", str(cells), *sizes]
        # Where NNCF compiles its extension on a slow machine, its own limit of a minute is too short.
        subprocess.run(command, check=True, env={"NNCF_EXTENSION_LOAD_TIMEOUT": "600", **os.environ})


def train_peer(peer: Peer, study: Glyphs, seed: int, cells: Path) -> None:
    """The students of one peer and seed that are missing."""
    warnings.simplefilter("ignore")  # of the toolkits, about themselves
    for bits in peer.bits:
        path = cell(cells, peer, bits, study.size, seed)
        if not path.is_file():
            found = run(peer, bits, study, seed, path.with_suffix(""))
            write_atomic(path, json.dumps(found, indent=1) + "\n")
            print(f"{path.stem:40s} {found}", flush=True)


def latencies(study: Glyphs, cells: Path, calls: int) -> list[dict[str, Any]]:
    """Rows of the teacher in float and of all files of the first seed, interleaved."""
    float_file = export_float(study.teacher, study.train[0][:32], cells / "fp32.onnx")
    candidates = [Candidate(float_file, "FP32")]
    for peer, bits in _students():
        path = cell(cells, peer, bits, study.size, 0)
        for runtime, one in json.loads(path.read_text()).get("deployed", {}).items():
            if "file" in one:
                file = path.with_suffix("") / one["file"]
                candidates.append(Candidate(file, peer.name, weight_bits=bits, activation_bits=bits, runtime=runtime))
    loader = DataLoader(TensorDataset(*study.test), 500)
    rows = benchmark(candidates, loader=loader, runtimes=tuple(RUNTIMES), calls=calls)
    return [row.as_dict() for row in rows if row.precision != "bfloat16"]


def _students() -> Iterable[tuple[Peer, int]]:
    """Of peers that are installed: 8 bits first."""
    found = [(peer, bits) for peer in PEERS for bits in peer.bits if peer.version]
    return sorted(found, key=lambda student: -student[1])


def summary(size: Size, seeds: int, cells: Path) -> list[dict[str, Any]]:
    """An entry per peer and number of bits, with one cell per seed."""
    return [
        {
            "peer": peer.name,
            "label": peer.label,
            "package": f"{peer.package} {peer.version}",
            "bits": bits,
            "lines": peer.lines,
            "cells": [json.loads(cell(cells, peer, bits, size, seed).read_text()) for seed in range(seeds)],
        }
        for peer, bits in _students()
    ]


def make_table(document: dict[str, Any]) -> str:
    """Markdown: a row per peer and number of bits, means over seeds; errors as notes below it."""
    rows = {(row["method"], row["weight_bits"], row["runtime"]): row for row in document["rows"]}
    trained = [student for student in document["students"] if first_error(student["cells"]) is None]
    reference = {
        student["bits"]: mean("cpu_seconds", student["cells"]) for student in trained if student["peer"] == PEERS[0].name
    }
    table = [["FP32 teacher", "", "", f"{100 * document['teacher']:.2f}"]]
    table[0] += [_shown(rows.get(("FP32", 32, runtime)), document["teacher"]) for runtime in RUNTIMES]
    notes: list[str] = []
    for student in document["students"]:
        cells, bits = student["cells"], student["bits"]
        line = [f"{student['label']}, W{bits}A{bits}", str(student["lines"])]
        if student in trained:
            seconds = mean("cpu_seconds", cells)
            line.append(f"{seconds:.1f}" + (f" ({seconds / reference[bits]:.2f}x)" if bits in reference else ""))
            line.append(f"{100 * mean('accuracy', cells):.2f}")
            for runtime in RUNTIMES:
                deployed = [found["deployed"][runtime] for found in cells if runtime in found["deployed"]]
                line.append(deployed_shown(deployed, rows.get((student["peer"], bits, runtime)), notes))
        else:
            line += [noted(str(first_error(cells)), notes), "", *("" for _ in RUNTIMES)]
        table.append(line)
    size = document["size"]
    told = f"student ({size['images']} images, {size['epochs']} epochs; seeds: {size['seeds']})"
    header = [told, "lines of user code", "training, processor s (over ours)", "accuracy in PyTorch, %"]
    header += [f"{name}: accuracy, %; processor ms; integer layers" for name in RUNTIMES.values()]
    return "\n".join([page_tables.markdown(header, table), *(f"\n{note}" for note in notes)])


def first_error(found: list[dict[str, Any]]) -> str | None:
    """The first there is."""
    return next((one["error"] for one in found if "error" in one), None)


def mean(key: str, found: list[dict[str, Any]]) -> float:
    return fmean(one[key] for one in found)


def deployed_shown(deployed: list[dict[str, Any]], row: dict[str, Any] | None, notes: list[str]) -> str:
    """What one runtime makes of the students of all seeds."""
    if not deployed:
        return "no export for it"
    error = first_error(deployed)
    return _shown(row, mean("accuracy", deployed)) if error is None else noted(error, notes)


def _shown(row: dict[str, Any] | None, accuracy: float) -> str:
    measured = "" if row is None else f"; {row['cpu_ms']:.2f}; {row['integer_layers']} of {row['total_layers']}"
    return f"{100 * accuracy:.2f}{measured}"


def noted(error: str, notes: list[str]) -> str:
    """A reference to a note, which is added."""
    number = len(notes) + 1
    notes.append(f"({number}) `{error.replace('`', chr(39))}`")
    return f"fails ({number})"


def main() -> None:
    """Train what is missing, measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=SMALL.images, help="that students are trained on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of each student (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="students of each peer (%(default)s)")
    parser.add_argument("--calls", type=int, default=300, help="timed calls of each file (%(default)s)")
    parser.add_argument("--cells", type=Path, default=Path("runs/peers"), help="a file per student (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="train students again that --cells holds")
    parser.add_argument("--out", type=Path, help="JSON file; the table in docs/measured.md is written with the committed one")
    parser.add_argument("--peer", choices=[peer.name for peer in PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cells.mkdir(parents=True, exist_ok=True)
    size = Size(options.images, options.epochs, options.seeds)
    study = Glyphs(size, options.cells)
    if options.peer:
        peer = next(peer for peer in PEERS if peer.name == options.peer)
        train_peer(peer, study, options.seed, options.cells)
        return
    if options.fresh:
        for peer, bits in _students():
            for seed in range(options.seeds):
                cell(options.cells, peer, bits, size, seed).unlink(missing_ok=True)
    busy = is_busy()
    train_all(size, options.seeds, options.cells)
    document = {
        "environment": environment(),
        "busy": busy,
        "size": vars(size),
        "teacher": accuracy(study.teacher, study.test),
        "students": summary(size, options.seeds, options.cells),
        "rows": latencies(study, options.cells, options.calls),
        "missing": [peer.name for peer in PEERS if not peer.version],
    }
    table = make_table(document)
    print(table)
    if options.out:
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(options.out)
        if options.out.resolve() == RESULTS:
            page_tables.write_table("peers", table)


if __name__ == "__main__":
    main()
