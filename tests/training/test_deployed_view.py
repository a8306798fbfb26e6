"""The deployed view alone: what it shows, and that everything is put back."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qakd_plugin import SQAKD
from qakd_plugin.augment.selector import FixedAugmentation
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.batches import Batches
from qakd_plugin.training.deployed_view import DeployedView
from qakd_plugin.training.distributed.processes import Processes
from qakd_plugin.training.ema import Ema


@pytest.fixture
def made(make_student, batches):
    def make(recalibrate_batches=0, decay=None, toolkit="modelopt"):
        student, processes = make_student(toolkit), Processes()
        adapter = adapter_for(student)
        adapter.set_mode(student, True)
        loader = Batches(batches, processes, batch_fn=default_batch, augment=FixedAugmentation(None, None), method=SQAKD())
        ema = None if decay is None else Ema(student, decay)
        options = {"ema": ema, "recalibrate_batches": recalibrate_batches, "autocast": nullcontext}
        return student, ema, DeployedView(adapter, student, loader, processes, **options)

    return make


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao"])
def test_ranges_stand_still_and_the_mode_is_put_back(toolkit, made, batches):
    student, _, view = made(toolkit=toolkit)
    adapter = adapter_for(student)

    def scales():
        return [adapter.qparams(q).scale.clone() for q in adapter.quantizers(student)]

    with view.shown():
        assert not student.training
        before = scales()
        student(10 * batches[0][0])
        assert all(torch.equal(a, b) for a, b in zip(before, scales(), strict=True))
    assert student.training


def test_weights_are_averaged_within_and_trained_ones_come_back(made):
    student, ema, view = made(decay=0.9)
    with torch.no_grad():
        student.head.weight.add_(1)
    ema.update()
    trained = student.head.weight.detach().clone()
    with view.shown():
        shown = view.weights()
        assert not torch.equal(shown["head.weight"], trained)
    assert torch.equal(student.head.weight, trained)
    assert not torch.equal(shown["head.weight"], view.weights()["head.weight"])


def test_statistics_are_fresh_within_and_put_back_and_nothing_is_drawn(made):
    student, _, view = made(recalibrate_batches=6)
    norm = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        norm.running_mean.fill_(50)
    draws = torch.get_rng_state()
    with view.shown():
        assert norm.running_mean.abs().max() < 49
    assert torch.equal(norm.running_mean, torch.full_like(norm.running_mean, 50))
    assert torch.equal(torch.get_rng_state(), draws)
