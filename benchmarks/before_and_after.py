"""Whether a change made image classifiers slower: a distillation step and an export of ResNet-18, two checkouts interleaved.

    git worktree add ../before <commit>
    python benchmarks/before_and_after.py ../before

Each checkout runs in a process of its own, which waits while the other measures; what is printed are ratios of medians, after
to before. Seeds are fixed, so losses and the exported bytes are compared as well.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TASKS = ["distill step", "export"]
STEPS, BATCH, SIZE = 6, 16, 64


def measure(task: str) -> dict[str, Any]:
    """One round in this process: seconds, and what must be equal."""
    import torch
    import torchvision

    import qakd_plugin as qakd

    torch.manual_seed(0)
    images = torch.rand(BATCH * STEPS, 3, SIZE, SIZE)
    teacher = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    student = qakd.prepare(teacher, [images[:BATCH]], weight_bits=8, activation_bits=8)
    if task == "export":
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            path = qakd.export_onnx(student, images[:BATCH], Path(folder) / "student.onnx", "onnxruntime").path
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "result": hashlib.sha256(path.read_bytes()).hexdigest()}
    ends: list[float] = []

    class Clock:
        def on_step_end(self, step: int, losses: dict[str, Any]) -> None:
            ends.append(time.perf_counter())

    loader = list(images.split(BATCH))
    result = qakd.distill(student, teacher, loader, epochs=2, lr=1e-3, seed=0, callbacks=[Clock()])
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {"seconds": statistics.median(steps), "result": [row["kl"] for row in result.history]}


def _serve() -> None:
    """Answer each line on standard input, the name of a task, with a line of JSON."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    for line in sys.stdin:
        os.write(answers, (json.dumps(measure(line.strip())) + "\n").encode())


def _start(checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=checkout,
    )


def _ask(process: subprocess.Popen[str], task: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(task + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    """Measure, and print a line for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?", help="checkout of the commit before")
    parser.add_argument("--after", type=Path, default=ROOT, help="the other checkout (this one)")
    parser.add_argument("--rounds", type=int, default=9, help="of each task and checkout (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="what to measure (all)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return _serve()
    if options.before is None or not (options.before / "qakd_plugin").is_dir():
        parser.error("name the checkout of the commit before: git worktree add ../before <commit>")
    workers = {"before": _start(options.before.resolve()), "after": _start(options.after.resolve())}
    for task in options.tasks:
        found: dict[str, list[dict[str, Any]]] = {name: [_ask(worker, task)][:0] for name, worker in workers.items()}  # warm
        for _ in range(options.rounds):
            for name in random.sample(list(workers), 2):
                found[name].append(_ask(workers[name], task))
        before, after = ([one["seconds"] for one in found[name]] for name in ("before", "after"))
        ratio = statistics.median(after) / statistics.median(before)
        spread = statistics.median(abs(a / b - ratio) for a, b in zip(after, before, strict=True))
        same = all(one["result"] == found["before"][0]["result"] for one in found["before"] + found["after"])
        print(
            f"{task}: {statistics.median(before):.3f} s before, {statistics.median(after):.3f} s after, ratio {ratio:.3f} "
            f"(rounds differ by {spread:.3f}), results {'equal' if same else 'DIFFER'}"
        )
    for worker in workers.values():
        worker.terminate()
    return None


if __name__ == "__main__":
    main()
