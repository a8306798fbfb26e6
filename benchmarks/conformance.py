"""Every reference task with every toolkit and method: it trains, goes on after a stop, and computes the same everywhere.

    python benchmarks/conformance.py

A cell that cannot exist is refused in one line, which the table on docs/measured.md shows. The tests run a covering part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference_tasks import Task, trained
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import QakdError
from qakd_plugin.tasks.batches import batch_splitter
from qakd_plugin.tasks.inputs import call
from qakd_plugin.tasks.task_loss import with_targets

TOOLKITS = ("modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager")
EPOCHS = 2


class Stopped(Exception):
    """Stands for the end of a process in the middle of a run."""


class _StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, step: int, losses: dict[str, Any]) -> None:
        if step == self._step:
            raise Stopped


class _FirstLosses:
    def __init__(self) -> None:
        self.losses: dict[str, float] = {}

    def on_step_end(self, step: int, losses: dict[str, Any]) -> None:
        if not self.losses:
            self.losses = {name: float(value) for name, value in losses.items()}


def prepared(task: Task, teacher: nn.Module, toolkit: str) -> nn.Module:
    """The student, calibrated on the task's own batches."""
    return qakd.prepare(
        teacher, task.batches(), toolkit, weight_bits=task.bits, activation_bits=task.bits, batch_fn=task.batch_fn
    )


def distilled(task: Task, student: nn.Module, teacher: nn.Module, method: str, **options: Any) -> Any:
    """A run of two epochs, its best by the task's own metric."""
    options = {"epochs": EPOCHS, "seed": 0, "val_loader": task.batches(), **task.options, **options}
    if task.metric_fn is not None:
        options["metric_fn"] = task.metric_fn
    return qakd.distill(
        student, teacher, task.batches(), method=task.methods()[method], batch_fn=task.batch_fn, metric=task.metric(),
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
    first = _FirstLosses()
    whole = distilled(task, copy.deepcopy(before), teacher, method, callbacks=[first])
    moved = [not torch.equal(old, new) for old, new in zip(before.parameters(), whole.model.parameters(), strict=True)]
    assert any(moved), "no parameter has moved"

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
        assert abs(value - first.losses[name]) <= 1e-5 * abs(value) + 1e-7, f"{name}: {first.losses[name]}, by hand {value}"


def _first_loss_by_hand(task: Task, student: nn.Module, teacher: nn.Module, method: str) -> dict[str, float]:
    inputs, targets = batch_splitter(task.batch_fn, student)(task.batches()[0])
    if task.task_loss == "model" and method != "SQAKD":
        inputs = with_targets(student, inputs, targets)
    with qakd.attach(student, teacher, method=task.methods()[method], task_loss=task.task_loss) as kd:
        kd.train()
        teacher.train(method == "QKD")  # it learns in its first phase
        call(student, inputs)
        kd.loss(targets)
        return {name: float(value) for name, value in kd.parts.items()}


def outcome(work: Callable[[], None]) -> str:
    """ "yes", or the first sentence with which a cell is refused."""
    try:
        work()
    except QakdError as error:
        return str(error).split(". ")[0]
    return "yes"
