"""Every reference task with every toolkit and method: it trains, goes on after a stop, and computes the same everywhere.

    python benchmarks/conformance.py

A cell that cannot exist is refused in one line, which the table on docs/measured.md shows. The tests run a covering part.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page_tables import RESULTS, markdown, write_table
from reference_tasks import TASKS, Task, trained
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import QakdError
from qakd_plugin._common.cpu_features import onednn_adds_products_in_16_bits
from qakd_plugin._common.files import write_atomic
from qakd_plugin.tasks.batches import batch_splitter, default_batch
from qakd_plugin.tasks.inputs import Inputs, call
from qakd_plugin.tasks.metrics import Counted, outputs_and_targets
from qakd_plugin.tasks.outputs import named_outputs
from qakd_plugin.tasks.task_loss import with_targets
from qakd_plugin.toolkits import adapter_for

FIGURES = RESULTS / "conformance.json"
TOOLKITS = ("modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager")
RUNTIMES = ("onnxruntime", *(() if onednn_adds_products_in_16_bits() else ("openvino",)))
"""Without VNNI sums of OpenVINO's integer kernels saturate."""
EPOCHS = 2
BITS = 8
RATE = 1e-3
"""A large one: what a run does shows after few steps."""

SIZES = (8, 24, 64)
"""Smallest, usual and largest size of an engine's dynamic dimension that is no batch."""

TIES_DB = 10 * math.log10(2)
"""A runtime settles ties its own way. If all codes were ties, its rounding errors would be independent of the student's, each
as large as the student's against itself with quantizers off."""

TIES = 0.05
"""What they may change of a metric of 24 samples."""


class Stopped(Exception):
    """Stands for the end of a process in the middle of a run."""


class _StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, step: int, losses: dict[str, Any]) -> None:
        if step == self._step:
            raise Stopped


class _Watched:
    """The losses of a run's first step, and whether its student moved: the prepared model may be what is kept."""

    def __init__(self, student: nn.Module) -> None:
        self._student, self._before = student, [parameter.detach().clone() for parameter in student.parameters()]
        self.losses: dict[str, float] = {}
        self.moved = False

    def on_step_end(self, step: int, losses: dict[str, Any]) -> None:
        if not self.losses:
            self.losses = {name: float(value) for name, value in losses.items()}
        self.moved = not all(map(torch.equal, self._before, self._student.parameters()))


def prepared(task: Task, teacher: nn.Module, toolkit: str) -> nn.Module:
    """The student, calibrated on the task's own batches."""
    return qakd.prepare(teacher, task.batches(), toolkit, weight_bits=BITS, activation_bits=BITS)


def distilled(task: Task, student: nn.Module, teacher: nn.Module, method: str, **options: Any) -> Any:
    """A run of two epochs, its best by the task's own metric."""
    options = {"epochs": EPOCHS, "seed": 0, "lr": RATE, "val_loader": task.batches(), **task.options, **options}
    if task.metric_fn is not None:
        options["metric_fn"] = task.metric_fn
    return qakd.distill(
        student, teacher, task.batches(), method=task.methods()[method], metric=task.metric(),
        task_loss=task.task_loss, **options,
    )  # fmt: skip


def check_training(task: Task, toolkit: str, method: str, folder: Path) -> None:
    """Train, stop and go on to the same bits, and see the same first loss in a loop written by hand.

    Raises:
        AssertionError: something of it does not hold.
        QakdError: the cell is refused.
    """
    teacher = trained(task)
    student = prepared(task, teacher, toolkit)
    before = copy.deepcopy(student)
    watched = _Watched(student)
    whole = distilled(task, student, teacher, method, callbacks=[watched])
    assert watched.moved, "no parameter has moved"

    steps = len(task.batches())
    try:
        distilled(task, copy.deepcopy(before), teacher, method, checkpoint_dir=folder, callbacks=[_StopAt(steps + 1)])
        raise AssertionError("the run was not stopped")
    except Stopped:
        resumed = distilled(task, copy.deepcopy(before), teacher, method, checkpoint_dir=folder, resume=True)
    own, other = whole.model.state_dict(), resumed.model.state_dict()
    different = [name for name, value in own.items() if isinstance(value, torch.Tensor) and not torch.equal(value, other[name])]
    assert not different, f"a run that was stopped ends with another {different[0]}"

    by_hand = _first_loss_by_hand(task, copy.deepcopy(before), teacher, method)
    for name, value in by_hand.items():
        assert abs(value - watched.losses[name]) <= 1e-5 * abs(value) + 1e-7, f"{name}: {watched.losses[name]}, by hand {value}"


def _first_loss_by_hand(task: Task, student: nn.Module, teacher: nn.Module, method: str) -> dict[str, float]:
    inputs, targets = batch_splitter(default_batch, student)(task.batches()[0])
    if task.task_loss == "model" and method != "SQAKD":
        inputs = with_targets(student, inputs, targets)
    with qakd.attach(student, teacher, method=task.methods()[method], task_loss=task.task_loss) as kd:
        kd.train()
        teacher.train(method == "QKD")  # it learns in its first phase
        call(student, inputs)
        kd.loss(targets)
        return {name: float(value) for name, value in kd.parts.items()}


def check_deployment(task: Task, toolkit: str, folder: Path) -> dict[str, dict[str, float]]:
    """Export for each target with its proof, and count the same metric in torch and in each runtime.

    Returns:
        The metric's numbers by runtime; "torch" is the student itself.

    Raises:
        AssertionError: a runtime computes something else than the student.
        QakdError: the cell is refused.
    """
    teacher = trained(task)
    student = distilled(task, prepared(task, teacher, toolkit), teacher, "SQAKD").model
    quiet = _own_sqnr_db(task, student)
    inputs = _named_inputs(task, student)
    candidates = []
    for target in RUNTIMES:
        path = folder / f"{target}.onnx"
        qakd.export_onnx(student, inputs, path, target, dynamic=_dynamic(task, toolkit))
        candidates.append(qakd.Candidate(path, "SQAKD", task.name, toolkit, BITS, BITS, runtime=target))
    counted = {"torch": _numbers(task, student)}
    rows = qakd.benchmark(
        candidates,
        task.batches(),
        RUNTIMES,
        calls=1,
        metric=task.metric(),
        metric_fn=task.metric_fn,
        reference=_outputs(task, student),
    )
    for row in rows:
        counted[row.runtime] = {value.name: value.value for value in row.metrics}
        for output in row.outputs or (row,):
            loud = output.sqnr_db is not None and output.sqnr_db < quiet - TIES_DB
            assert not loud, f"{row.runtime}: {output.sqnr_db:.1f} dB of the student, whose quantization leaves {quiet:.1f} dB"
        for name, value in counted[row.runtime].items():
            other = counted["torch"][name]
            assert abs(value - other) <= TIES * max(1.0, abs(other)), f"{row.runtime}: {name} is {value}, in torch {other}"
    report = qakd.write_report(rows, folder / "report")
    assert task.name in report.read_text()
    return counted


def check_engine(task: Task, toolkit: str, folder: Path) -> None:
    """TensorRT-RTX builds what was prepared, with sizes for each dynamic dimension.

    Raises:
        QakdError: the cell is refused.
    """
    student = prepared(task, trained(task), toolkit)
    inputs = _named_inputs(task, student)
    dynamic = _dynamic(task, toolkit)
    file = qakd.export_onnx(student, inputs, folder / "tensorrt.onnx", "tensorrt", dynamic=dynamic)
    sizes = {name: SIZES for names in (dynamic or {}).values() for name in names.values()}
    qakd.build_engine(
        file, folder / "student.engine", "tensorrt_rtx", opt_batch=1, max_batch=8, sizes=sizes, capabilities=["SM89"]
    )


def _named_inputs(task: Task, student: nn.Module) -> Inputs:
    """Of the first batch; what a mapping names keeps its name in the file."""
    batch = task.batches()[0]
    inputs, _ = batch_splitter(default_batch, student)(batch)
    if isinstance(batch, Mapping) and isinstance(inputs, torch.Tensor):
        return {name: value for name, value in batch.items() if value is inputs}
    return inputs


def _dynamic(task: Task, toolkit: str) -> Mapping[str, Mapping[int, str]] | None:
    """PT2E captures a graph for one length of tokens."""
    return None if toolkit == "pt2e" and task.tokens else task.dynamic


def _numbers(task: Task, student: nn.Module) -> dict[str, float]:
    """What the metric says of the student in torch."""
    counted = Counted(task.metric(), task.metric_fn or outputs_and_targets)
    for inputs, targets in map(batch_splitter(default_batch, student), task.batches()):
        with torch.no_grad():
            counted.update(named_outputs(call(student, inputs)), targets)
    return counted.compute()


def _outputs(task: Task, network: nn.Module) -> dict[str, Any]:
    """What a network outputs, sample by sample."""
    found: dict[str, list[Any]] = {}
    for inputs, _ in map(batch_splitter(default_batch, network), task.batches()):
        with torch.no_grad():
            for name, output in named_outputs(call(network, inputs)).items():
                found.setdefault(name, []).append(output.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _own_sqnr_db(task: Task, student: nn.Module) -> float:
    """A student against itself with quantizers off; of several outputs, the noisiest."""
    floating, adapter = copy.deepcopy(student), adapter_for(student)
    adapter.freeze_ranges(floating, True)
    adapter.set_fake_quant(floating, False)
    expected, found = _outputs(task, floating), _outputs(task, student)
    powers = [((expected[name] ** 2).sum(), ((expected[name] - found[name]) ** 2).sum()) for name in expected]
    return min(float(10 * np.log10(signal / noise)) for signal, noise in powers)


def outcome(work: Callable[[], object]) -> str:
    """Empty, or the reason why a cell is refused: the first sentence of its one line."""
    try:
        work()
    except QakdError as error:
        return re.sub(
            r"\S*/(\w+\.onnx)", r"\1", " ".join(str(error).split("\n")[0].split(". ")[0].split(": IBuilder")[0].split())
        )
    return ""


def measure(task: Task, toolkit: str) -> dict[str, str]:
    """Outcomes of a task with a toolkit: of each method, of the files, and of the engine."""
    found = {}
    for method in task.methods():
        with tempfile.TemporaryDirectory() as folder:
            found[method] = outcome(functools.partial(check_training, task, toolkit, method, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        found["files"] = outcome(functools.partial(check_deployment, task, toolkit, Path(folder)))
    if not found["files"]:
        with tempfile.TemporaryDirectory() as folder:
            found["engine"] = outcome(functools.partial(check_engine, task, toolkit, Path(folder)))
    return found


def table(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """One line a task, one column a toolkit, and below it the reasons of what is refused."""
    reasons: dict[str, int] = {}

    def cell(found: dict[str, str]) -> str:
        if len(set(found.values())) == 1:
            return said(next(iter(found.values())))
        return ", ".join(f"{name} {said(reason)}" for name, reason in found.items() if reason) + ", else yes"

    def said(reason: str) -> str:
        return f"[{reasons.setdefault(reason, len(reasons) + 1)}]" if reason else "yes"

    rows = [[name, *(cell(by_toolkit[toolkit]) for toolkit in TOOLKITS)] for name, by_toolkit in results.items()]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return markdown(["task", *TOOLKITS], rows) + "\n\n" + "\n".join(notes)


def main() -> None:
    """Measure what is asked for, keep it beside what was measured before, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="", help="parts of names, with | between them (all)")
    parser.add_argument("--table", action="store_true", help="write the table again, measure nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for task in () if options.table else TASKS:
        if any(part in task.name for part in options.tasks.split("|")):
            results[task.name] = {}
            for toolkit in TOOLKITS:
                started = time.perf_counter()
                results[task.name][toolkit] = found = measure(task, toolkit)
                print(f"{task.name:32}{toolkit:16}{time.perf_counter() - started:6.1f} s  {cell_text(found)}", flush=True)
            write_atomic(FIGURES, json.dumps(results, indent=1) + "\n")
    order = [task.name for task in TASKS]
    results = dict(sorted(results.items(), key=lambda found: order.index(found[0]) if found[0] in order else len(order)))
    write_atomic(FIGURES, json.dumps(results, indent=1) + "\n")
    write_table("conformance", table(results))


def cell_text(found: dict[str, str]) -> str:
    """For the terminal."""
    return "; ".join(f"{name}: {reason or 'yes'}" for name, reason in found.items())


if __name__ == "__main__":
    main()
