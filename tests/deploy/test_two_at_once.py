"""Threads of one process that export, prepare and train at once: each is right, and nothing of the process is changed."""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from qakd_plugin import distill, export_onnx, prepare
from qakd_plugin._common.one_at_a_time import one_at_a_time
from qakd_plugin.errors import ExportError

X = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _float() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return prepare(_float(), [X])


def _at_once(work: Sequence[Callable[[], object]]) -> list[object]:
    """What each returns, all begun together."""
    results: list[object] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = work[index]()
        except Exception as error:  # noqa: BLE001 - compared below
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_exports_at_once_are_the_files_that_exports_alone_are(student, tmp_path, monkeypatch):
    alone = export_onnx(student, X, tmp_path / "alone.onnx").path.read_bytes()
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    filters, level = list(warnings.filters), logging.getLogger("onnxscript").level
    done = threading.Event()
    lines = 0

    def others_print() -> None:
        nonlocal lines
        while not done.wait(0.001):
            print("a line of another thread")
            lines += 1

    printing = threading.Thread(target=others_print)
    printing.start()
    work = [lambda index=index: export_onnx(copy.deepcopy(student), X, tmp_path / f"{index}.onnx").path for index in range(3)]
    results = _at_once([*work, lambda: prepare(_float(), [X])])
    done.set()
    printing.join()
    assert [path.read_bytes() for path in results[:3]] == [alone] * 3
    assert all(map(torch.equal, results[3].state_dict().values(), student.state_dict().values()))
    assert sys.stdout is written
    assert written.getvalue() == "a line of another thread\n" * lines
    assert (list(warnings.filters), logging.getLogger("onnxscript").level) == (filters, level)


def test_distillations_at_once_are_the_ones_that_each_is_alone(student):
    batches = [(X[:8], torch.zeros(8).long()), (X[8:], torch.ones(8).long())]
    teacher = _float()  # made here: it draws from the generators that a distillation of another thread draws from

    def train() -> Tensor:
        model = distill(
            copy.deepcopy(student), teacher, batches, epochs=2, lr=1e-3, seed=0, trackers=(), augment=torch.rand_like
        ).model
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    alone = train()
    for found in _at_once([train, train]):
        assert torch.equal(found, alone)


def test_an_export_that_a_loop_of_another_thread_disturbs_says_so(student, tmp_path, monkeypatch):
    """What torch.fx raises then, at random moments."""

    def disturbed(*args: object, **options: object) -> None:
        raise AssertionError("Unexpected key conv@1, expected conv")

    monkeypatch.setattr(torch.export, "export", disturbed)
    done = threading.Event()
    loop = threading.Thread(target=done.wait)
    loop.start()
    try:
        with pytest.raises(ExportError, match="Let no other thread call a torch module meanwhile"):
            export_onnx(student, X, tmp_path / "x.onnx")
    finally:
        done.set()
        loop.join()


def test_who_waits_says_for_what(caplog):
    entered, leave = threading.Event(), threading.Event()

    @one_at_a_time
    def long_work() -> None:
        entered.set()
        leave.wait(10)

    @one_at_a_time
    def short_work() -> str:
        return inner()

    @one_at_a_time
    def inner() -> str:
        return "done"

    thread = threading.Thread(target=long_work)
    thread.start()
    entered.wait(10)
    threading.Timer(0.2, leave.set).start()
    with caplog.at_level(logging.WARNING):
        assert short_work() == "done"
    thread.join()
    assert [record.getMessage() for record in caplog.records] == [
        "short_work waits for long_work, which another thread of this process is in."
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_lacks():
    entered, leave = threading.Event(), threading.Event()

    @one_at_a_time
    def work(hold: bool) -> None:
        if hold:
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work, args=(True,))
    thread.start()
    entered.wait(10)
    child = os.fork()
    if child == 0:
        work(False)
        os._exit(7)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
