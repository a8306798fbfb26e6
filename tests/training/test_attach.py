"""attach() in loops of others: every toolkit and method, data parallel, autocast, accumulation, a compiled teacher."""

import copy

import data_parallel
import pytest
import torch
from data_parallel import TOOLKITS
from torch._dynamo.utils import counters

from qakd_plugin import KD, QAT, QKD, SQAKD, QakdError, attach
from qakd_plugin.losses import cross_entropy, kl_divergence
from qakd_plugin.toolkits import adapter_for


def _gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(expected, actual, **tolerance):
    assert expected.keys() == actual.keys()
    assert len(expected) > 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 0, "atol": 0}
HAND_WRITTEN = {
    SQAKD(4.0): lambda logits, other, y: kl_divergence(logits, other, 4.0).mean(),
    KD(2.0, 0.3): lambda logits, other, y: (
        0.3 * kl_divergence(logits, other, 2.0).mean() + 0.7 * cross_entropy(logits, y).mean()
    ),
    QAT(): lambda logits, other, y: cross_entropy(logits, y).mean(),
    QKD(0, 0, 1, 2.0): lambda logits, other, y: cross_entropy(logits, y).mean() + kl_divergence(logits, other, 2.0).mean(),
}


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_step_equals_the_hand_written_one_with_every_method(toolkit, prepared, mentor, batches):
    x, y = batches[0]
    with torch.no_grad():
        other = mentor(x)
    for method, loss in HAND_WRITTEN.items():
        by_hand, student = prepared(toolkit), prepared(toolkit)
        adapter_for(by_hand).set_mode(by_hand, True)
        adapter_for(by_hand).freeze_ranges(by_hand, False)
        loss(by_hand(x), other, y).backward()
        with attach(student, mentor, method) as kd:
            kd.train()
            student(x)
            kd.loss(y).backward()
        _assert_same(_gradients(by_hand), _gradients(student), **EXACT)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_eval_stops_statistics_and_ranges(toolkit, prepared, mentor, batches):
    student = prepared(toolkit)
    with attach(student, mentor) as kd:
        kd.train()
        kd.eval()
        before = student(batches[0][0])
        student(10 * batches[0][0])
        assert torch.equal(student(batches[0][0]), before)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_quantizers_see_float32_under_autocast_and_only_while_attached(toolkit, prepared, mentor, batches):
    student = prepared(toolkit)
    seen = {}

    def look(module, args, output):
        seen.setdefault(module, output.dtype)

    with attach(student, mentor) as kd:
        for quantizer in adapter_for(student).quantizers(student):
            # Behind the hooks of attach: what the quantizer is called with.
            quantizer.module.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].dtype}))
        kd.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student(batches[0][0])
            kd.loss().backward()
        assert len(seen) == len(adapter_for(student).quantizers(student))
        assert set(seen.values()) == {torch.float32}
    if toolkit != "torchao":  # whose quantizers hold weights only, which are float32 anyway
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            student(batches[0][0])
        assert torch.bfloat16 in seen.values()


def test_without_autocast_a_double_network_stays_double(prepared, mentor, batches):
    student = prepared("modelopt").double()
    with attach(student, mentor.double()) as kd:
        assert student(batches[0][0].double()).dtype == torch.float64
        assert kd.loss().dtype == torch.float64


def test_micro_batches_add_up(prepared, mentor, batches):
    by_hand, student = prepared(), prepared()
    micro = [batches[0][0][:16], batches[0][0][16:]]
    with torch.no_grad():
        others = [mentor(x) for x in micro]
    by_hand.train()
    sum(kl_divergence(by_hand(x), other, 4.0).mean() / 2 for x, other in zip(micro, others, strict=True)).backward()
    with attach(student, mentor) as kd:
        kd.train()
        for x in micro:
            student(x)
            (kd.loss() / 2).backward()
    _assert_same(_gradients(by_hand), _gradients(student), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_co_studying_with_two_optimizers_equals_a_hand_written_loop(toolkit, prepared, mentor, batches):
    student, by_hand, teacher = prepared(toolkit), prepared(toolkit), copy.deepcopy(mentor)
    adapter_for(by_hand).set_mode(by_hand, True)
    adapter_for(by_hand).freeze_ranges(by_hand, False)
    mentor.train()
    first, second = torch.optim.SGD(by_hand.parameters(), 0.05), torch.optim.SGD(mentor.parameters(), 0.02)
    for x, y in batches[:3]:
        own, other = by_hand(x), mentor(x)
        (cross_entropy(own, y).mean() + kl_divergence(own, other.detach(), 2.0).mean()).backward()
        (cross_entropy(other, y).mean() + kl_divergence(other, own.detach(), 2.0).mean()).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    first, second = torch.optim.SGD(student.parameters(), 0.05), torch.optim.SGD(teacher.parameters(), 0.02)
    with attach(student, teacher, QKD(temperature=2.0)) as kd:
        kd.next_phase()
        kd.train()
        teacher.train()
        for x, y in batches[:3]:
            student(x)
            kd.loss(y).backward()
            first.step()  # before the teacher's loss: it holds nothing of the student that a step changes
            kd.teacher_loss(y).backward()
            second.step()
            first.zero_grad()
            second.zero_grad()
    for expected, actual in ((by_hand, student), (mentor, teacher)):
        _assert_same(dict(expected.named_parameters()), dict(actual.named_parameters()), **EXACT)


def test_a_teacher_without_gradients_cannot_learn(prepared, mentor, batches):
    student = prepared()
    with attach(student, mentor.requires_grad_(False), QKD()) as kd:
        kd.next_phase()
        student(batches[0][0])
        kd.loss(batches[0][1])
        with pytest.raises(QakdError, match="requires_grad_"):
            kd.teacher_loss(batches[0][1])


def test_an_output_object_with_logits_is_read(prepared, mentor, batches):
    class Wrapped(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return {"logits": self.network(x)}

    student = prepared()
    with attach(student, Wrapped(mentor)) as kd:
        logits = student(batches[0][0])
        torch.testing.assert_close(kd.loss(), kl_divergence(logits, mentor(batches[0][0]), 4.0).mean(), **EXACT)
    mentor.forward = lambda x: (x,)
    with attach(student, mentor) as kd:
        student(batches[0][0])
        with pytest.raises(QakdError, match="match names 'logits', which the teacher does not output"):
            kd.loss()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_teacher_is_compiled_once(backend, prepared, mentor, batches):
    torch._dynamo.reset()
    counters.clear()
    student, compiled = prepared(), torch.compile(mentor.train(), backend=backend)  # train: every call switches and puts back
    with torch.no_grad():
        others = [copy.deepcopy(mentor).eval()(x) for x, _ in batches[:4]]
    with attach(student, compiled) as kd, torch._dynamo.config.patch(error_on_recompile=True):
        kd.train()
        for (x, _), other in zip(batches[:4], others, strict=True):
            logits = student(x)
            torch.testing.assert_close(kd.loss(), kl_divergence(logits, other, 4.0).mean(), rtol=1e-5, atol=1e-7)
            kd.eval()
            with torch.no_grad():
                student(x)  # a validation in between
            kd.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert mentor.training


@pytest.mark.parametrize("toolkit", ["torch_ao", "torchao"])
def test_a_compiled_student_has_the_gradients_of_one_that_is_not(toolkit, prepared, mentor, batches):
    torch._dynamo.reset()
    plain, student = prepared(toolkit), prepared(toolkit)
    for model, called in ((plain, plain), (student, torch.compile(student, backend="eager"))):
        with attach(called, mentor) as kd:
            kd.eval()
            called(batches[0][0])
            kd.loss().backward()
        assert not model._forward_hooks
    _assert_same(_gradients(plain), _gradients(student), rtol=1e-4, atol=1e-6)


# -- data parallel


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(network, batches, tmp_path):
    x, y = batches[0]
    torch.save({"network": network.state_dict(), "x": x, "y": y}, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(data_parallel.work, (tmp_path,), nprocs=2)
    alone = data_parallel.gradients(network, x, y)
    for rank in range(2):
        together = torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            _assert_same(expected, together[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_copy_made_meanwhile_holds_no_second_teacher_and_teaches_nothing(toolkit, prepared, mentor, batches):
    x = batches[0][0]
    student = prepared(toolkit)
    passes = []
    mentor.register_forward_hook(lambda *_: passes.append(1))
    with attach(student, mentor) as kd:
        kd.train()
        average = copy.deepcopy(student)
        owners = [getattr(hook, "__self__", None) for hook in average._forward_hooks.values()]
        assert all(owner is kd or not isinstance(owner, type(kd)) for owner in owners)
        kd.eval()  # the same numbers for each call
        student(x)
        expected = kd.loss()
        student(x)
        average(2 * x)  # no batch of the student's
        assert len(passes) == 2
        torch.testing.assert_close(kd.loss(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_copy_of_the_student_is_frozen_by_eval(toolkit, prepared, mentor, batches):
    x = batches[0][0]
    with attach(prepared(toolkit), mentor) as kd, torch.no_grad():
        kd.train()
        average = copy.deepcopy(kd._model)
        kd.eval(average)
        before = average(x)
        average(10 * x)
        assert torch.equal(average(x), before)
