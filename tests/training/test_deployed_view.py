"""The deployed view alone: what it shows, and that everything is put back."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qakd_plugin import QAT, SQAKD, distill, prepare
from qakd_plugin.augment.selector import FixedAugmentation
from qakd_plugin.demo.net import DigitNet
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


def test_a_copy_of_the_weights_keeps_versions_and_extra_state_of_modules(batches):
    class Versioned(DigitNet):
        """As torchvision's MNASNet it looks for its version, and has a state that is no tensor."""

        _version = 2

        def get_extra_state(self):
            return {"images": 7}

        def set_extra_state(self, state):
            assert state == {"images": 7}

        def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
            if metadata.get("version") != 2:
                raise ValueError(f"version should be 2 instead of {metadata.get('version')}")
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    torch.manual_seed(0)
    student = prepare(Versioned(width=4).eval(), [x for x, _ in batches])
    result = distill(student, None, batches[:1], method=QAT(), epochs=1, val_loader=batches[:1], trackers=())
    assert result.metrics["epoch"] in (-1, 0)
    view = DeployedView(adapter_for(student), student, None, Processes(), ema=None, recalibrate_batches=0, autocast=nullcontext)
    copied = view.weights()
    student.load_state_dict(copied)
    with torch.no_grad():
        student.head.weight.zero_()
    assert copied["head.weight"].any()
