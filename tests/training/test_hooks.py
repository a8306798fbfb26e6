"""attach(): the same losses, and the same gradients, in somebody's own loop."""

import pytest
import torch

from qakd_plugin import QAT, QKD, SQAKD, Features, LabelsRequiredError, NotPreparedError, QakdError, attach
from qakd_plugin.losses import cross_entropy, kl_divergence
from qakd_plugin.toolkits import adapter_for

TOOLKITS = ["modelopt", "torch_ao"]


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_gradients_equal_a_hand_written_step(toolkit, make_student, teacher, batches):
    x, _ = batches[0]
    by_hand, attached = make_student(toolkit), make_student(toolkit)
    for model in (by_hand, attached):
        adapter_for(model).set_mode(model, True)
        adapter_for(model).freeze_ranges(model, False)
    with torch.no_grad():
        target = teacher.eval()(x)
    kl_divergence(by_hand(x), target, 4.0).mean().backward()
    with attach(attached, teacher, method=SQAKD(temperature=4.0)) as kd:
        attached(x)
        kd.loss().backward()
    expected, actual = _gradients(by_hand), _gradients(attached)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_nothing_is_left_after_the_block(make_student, teacher, batches):
    student = make_student()
    with attach(student, teacher):
        pass
    assert not student._forward_hooks
    student(batches[0][0])


def test_nothing_is_left_where_attaching_is_refused(make_student, teacher):
    student = make_student()
    with pytest.raises(QakdError, match="typo"):
        attach(student, teacher, method=SQAKD(features=Features(["typo"])))
    for network in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_evaluation_under_no_grad_runs_no_teacher(make_student, teacher, batches):
    student = make_student()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    with attach(student, teacher), torch.no_grad():
        student(batches[0][0])
    assert not calls


def test_phases_of_qkd_are_walked_by_hand(make_student, teacher, batches):
    x, y = batches[0]
    student = make_student()
    with attach(student, teacher, method=QKD(temperature=2.0)) as kd:
        assert kd.phase.name == "self-studying"
        logits = student(x)
        torch.testing.assert_close(kd.loss(y), cross_entropy(logits, y).mean())
        with pytest.raises(QakdError, match="frozen"):
            kd.teacher_loss(y)
        assert kd.next_phase().name == "co-studying"
        student(x)
        kd.loss(y).backward()
        assert all(p.grad is None for p in teacher.parameters())
        kd.teacher_loss(y).backward()
        assert any(p.grad is not None for p in teacher.parameters())
        assert kd.next_phase().name == "tutoring"
        with pytest.raises(QakdError, match="last phase"):
            kd.next_phase()


def test_a_loss_without_a_forward_pass_is_an_error(make_student, teacher):
    with attach(make_student(), teacher) as kd, pytest.raises(QakdError, match="call prepared_model"):
        kd.loss()


def test_missing_labels_name_the_method(make_student, batches):
    student = make_student()
    with attach(student, None, method=QAT()) as kd:
        student(batches[0][0])
        with pytest.raises(LabelsRequiredError, match="QAT"):
            kd.loss()


def test_a_float_model_cannot_be_attached_to(teacher):
    with pytest.raises(NotPreparedError):
        attach(teacher, teacher)


def test_a_missing_teacher_is_named(make_student):
    with pytest.raises(QakdError, match="teacher=None"):
        attach(make_student(), None)
