"""Methods are data: phases, terms, validation."""

import pytest
import torch

from qakd_plugin import KD, QAT, QKD, SQAKD, LabelsRequiredError, QakdError
from qakd_plugin.losses import cross_entropy, kl_divergence
from qakd_plugin.training.methods import require_labels, total_loss


def test_sqakd_is_kl_alone_and_needs_no_labels():
    (phase,) = SQAKD(temperature=3.0).phases(5)
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    loss, parts = total_loss(phase.student, student, teacher, None)
    assert not phase.needs_labels
    assert list(parts) == ["kl"]
    torch.testing.assert_close(loss, kl_divergence(student, teacher, 3.0).mean())


def test_kd_weighs_teacher_and_labels():
    (phase,) = KD(temperature=2.0, alpha=0.3).phases(1)
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.randint(4, (6,))
    loss, _ = total_loss(phase.student, student, teacher, labels)
    expected = 0.3 * kl_divergence(student, teacher, 2.0).mean() + 0.7 * cross_entropy(student, labels).mean()
    torch.testing.assert_close(loss, expected)


def test_the_other_network_gets_no_gradient():
    _, together, _ = QKD(0.4, 0.3, 0.3).phases(10)
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    labels = torch.randint(3, (4,))
    total_loss(together.student, student, teacher, labels)[0].backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [
        (QKD(30, 100, 70), 10, [30, 100, 70]),
        (QKD(0.15, 0.5, 0.35), 20, [3, 10, 7]),
        (QKD(0, 1, 0), 8, [8]),
        (QKD(0.5, 0, 0.5), 7, [4, 3]),
    ],
)
def test_qkd_phases_count_epochs_or_share_them(method, epochs, expected):
    assert [phase.epochs for phase in method.phases(epochs)] == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: SQAKD(temperature=0),
        lambda: KD(alpha=1.5),
        lambda: KD(temperature=-1),
        lambda: QKD(0, 0, 0),
        lambda: QKD(-1, 2, 2),
        lambda: QKD(1.5, 2, 2),
    ],
)
def test_bad_hyper_parameters_are_named(make):
    with pytest.raises(QakdError, match=r"temperature|alpha|phases"):
        make()


def test_missing_labels_name_the_method():
    with pytest.raises(LabelsRequiredError, match="QAT"):
        require_labels(QAT(), None)
