"""The losses of a phase on one batch, against the same written by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qakd_plugin import KD, QAT, QKD, SQAKD, Features
from qakd_plugin.losses import cross_entropy, kl_divergence
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.batches import Batch
from qakd_plugin.training.networks import Networks
from qakd_plugin.training.objective import Objective


@pytest.fixture
def made(make_student, teacher, batches):
    def make(method):
        student = make_student()
        networks = Networks(student, teacher, student, teacher)
        x, y = batches[0]
        return Objective(adapter_for(student), networks, method.phases(10), nullcontext), student, Batch(x, y, len(x), len(x))

    return make


def test_a_phase_without_a_teacher_does_not_call_it(made, teacher):
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was called"))
    objective, student, batch = made(QAT())
    losses = objective(QAT().phases(1)[0], batch)
    torch.testing.assert_close(losses.student, cross_entropy(student(batch.inputs), batch.targets).mean())
    assert losses.teacher is None
    assert list(losses.numbers) == ["loss", "ce"]


def test_numbers_are_parts_and_agreement(made, teacher):
    objective, student, batch = made(KD(temperature=2.0, alpha=0.25))
    losses = objective(KD(temperature=2.0, alpha=0.25).phases(1)[0], batch)
    with torch.no_grad():
        own, other = student(batch.inputs), teacher.eval()(batch.inputs)
        kl, ce = kl_divergence(own, other, 2.0).mean(), cross_entropy(own, batch.targets).mean()
    assert float(losses.numbers["kl"]) == pytest.approx(float(kl), rel=1e-6)
    assert float(losses.numbers["loss"]) == pytest.approx(float(0.25 * kl + 0.75 * ce), rel=1e-6)
    assert float(losses.numbers["agreement"]) == float((own.argmax(1) == other.argmax(1)).double().mean())
    assert not any(value.requires_grad for value in losses.numbers.values())


def test_logits_that_a_cache_knows_are_taken_and_the_teacher_is_not_called(made, teacher):
    objective, student, batch = made(SQAKD())
    known = torch.randn(len(batch.inputs), 10)
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was called"))
    losses = objective(SQAKD().phases(1)[0], Batch(batch.inputs, None, batch.weight, batch.total, {"logits": known}))
    torch.testing.assert_close(losses.student, kl_divergence(student(batch.inputs), known, 4.0).mean())


def test_while_both_learn_each_has_a_loss_of_its_own(made):
    _, together, _ = QKD(0.4, 0.3, 0.3).phases(10)
    objective, _, batch = made(QKD())
    losses = objective(together, batch)
    assert losses.teacher is not None
    assert losses.teacher.requires_grad
    assert {"teacher_loss", "teacher_ce", "teacher_kl"} <= losses.numbers.keys()


def test_hooks_for_features_are_taken_off(made, teacher):
    objective, student, batch = made(SQAKD(features=Features(["head"])))
    assert "features" in objective(SQAKD(features=Features(["head"])).phases(1)[0], batch).numbers
    objective.close()
    for network in (student, teacher):
        assert not any(module._forward_pre_hooks for module in network.modules() if isinstance(module, nn.Linear))
