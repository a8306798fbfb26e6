"""Losses against float64 computations of scipy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from qakd_plugin.errors import ArgumentError, QakdError
from qakd_plugin.losses import cross_entropy, kl_divergence


def _scipy_kl(student, teacher, temperature):
    student, teacher = (log_softmax(z.double().numpy() / temperature, axis=1) for z in (student, teacher))
    return temperature**2 * (np.exp(teacher) * (teacher - student)).sum(axis=1)


@pytest.mark.parametrize("temperature", [1, 2, 4, 20])
@pytest.mark.parametrize("magnitude", [1.0, 100.0, 1e4])
def test_kl_equals_float64_scipy(temperature, magnitude):
    generator = torch.Generator().manual_seed(int(temperature * 10 + magnitude))
    student, teacher = (magnitude * (2 * torch.rand(64, 17, generator=generator) - 1) for _ in range(2))
    expected = _scipy_kl(student, teacher, temperature)
    # What float32 cannot hold (below 1.2e-38) may come out as 0.
    actual = kl_divergence(student, teacher, temperature).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=np.finfo(np.float32).tiny)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_kl_of_identical_logits_is_exactly_zero(temperature, magnitude):
    logits = magnitude * torch.randn(32, 10)
    assert torch.equal(kl_divergence(logits, logits.clone(), temperature), torch.zeros(32))


def test_kl_gradient_is_the_difference_of_softened_predictions():
    student, teacher = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    kl_divergence(student, teacher, 4.0).sum().backward()
    expected = 4.0 * (torch.softmax(student.detach().double() / 4, 1) - torch.softmax(teacher.double() / 4, 1))
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_kl_takes_bfloat16_and_returns_float32():
    student, teacher = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    value = kl_divergence(student, teacher, 2.0)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), _scipy_kl(student, teacher, 2.0), rtol=1e-6)


def test_soft_labels_of_one_class_equal_hard_labels():
    logits, labels = torch.randn(16, 6), torch.randint(6, (16,))
    soft = torch.nn.functional.one_hot(labels, 6).float()
    torch.testing.assert_close(cross_entropy(logits, soft), cross_entropy(logits, labels))


@pytest.mark.parametrize(("student", "teacher"), [((4, 3), (4, 5)), ((4,), (4,)), ((4, 3, 2), (4, 3, 2))])
def test_kl_names_shapes_that_do_not_fit(student, teacher):
    with pytest.raises(ValueError, match="student_logits and teacher_logits"):
        kl_divergence(torch.zeros(student), torch.zeros(teacher), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_kl_rejects_temperatures_that_are_not_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_cross_entropy_names_a_label_shape_that_does_not_fit():
    with pytest.raises(ValueError, match="labels"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long))


def test_cross_entropy_names_a_label_that_is_no_class():
    with pytest.raises(ArgumentError, match=r"labels must lie in 0\.\.2, the classes of the logits: Target 3 is out of bounds"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_what_losses_refuse_is_an_error_of_this_package():
    for call in (
        lambda: kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), -1.0),
        lambda: kl_divergence(torch.zeros(1, 2), torch.zeros(1, 3), 1.0),
        lambda: cross_entropy(torch.zeros(3), torch.zeros(3)),
        lambda: cross_entropy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)),
    ):
        with pytest.raises(QakdError):
            call()
