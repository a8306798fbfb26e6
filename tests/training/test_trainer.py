"""The loop: how often it waits for the device, and what it asks of the first batch."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import qakd_plugin.training
from qakd_plugin import QKD, SQAKD, distill
from qakd_plugin.training import preflight

_ROOM = str(Path(qakd_plugin.training.__file__).parent)


@pytest.mark.parametrize(("method", "accumulate"), [(SQAKD(), 1), (SQAKD(), 3), (QKD(0, 1, 0), 1)])
def test_a_step_reads_numbers_from_the_device_once(method, accumulate, make_student, teacher, batches, monkeypatch):
    reads = []

    class Steps:
        at = ()

        def on_step_end(self, step, losses):
            self.at = (*self.at, len(reads))

    def counted(original):
        def read(tensor, *args):
            if sys._getframe(1).f_code.co_filename.startswith(_ROOM):
                reads.append(sys._getframe(1).f_code.co_name)
            return original(tensor, *args)

        return read

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    steps, sgd = Steps(), partial(torch.optim.SGD)
    distill(make_student(), teacher, batches, method=method, epochs=1, optimizer=sgd, accumulate=accumulate, callbacks=[steps])
    assert [later - before for before, later in zip(steps.at, steps.at[1:], strict=False)] == [1] * (6 // accumulate - 1)


def test_whether_a_student_can_be_exported_is_tried_on_two_samples(make_student, teacher, batches, monkeypatch):
    shapes = []

    def look(adapter, model, example):
        shapes.append(tuple(example.shape))
        return {}

    monkeypatch.setattr(preflight, "export_problems", look)
    distill(make_student(), teacher, batches[:1], epochs=1)
    assert shapes == [(2, *batches[0][0].shape[1:])]
