"""Losses against float64 computations of scipy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from qakd_plugin.errors import QakdError
from qakd_plugin.losses import binary_kl, cosine, cross_entropy, kl_divergence, l1, l2, smooth_l1


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


@pytest.mark.parametrize(("shape", "dim"), [((3, 5, 4, 6), 1), ((3, 7, 5), -1), ((3, 5, 7), 1), ((2, 5, 3, 4, 2), 1)])
def test_kl_over_any_dimension_is_the_mean_over_all_other_positions(shape, dim):
    student, teacher = torch.randn(shape), torch.randn(shape)
    flat = [z.movedim(dim, -1).reshape(-1, 5) for z in (student, teacher)]
    expected = _scipy_kl(*flat, 2.0).reshape(shape[0], -1).mean(1)
    np.testing.assert_allclose(kl_divergence(student, teacher, 2.0, dim=dim).numpy(), expected, rtol=1e-5)


def test_kl_counts_the_positions_of_the_mask_alone():
    student, teacher, mask = torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.rand(3, 7) > 0.4
    mask[2] = False
    student[2] = torch.inf  # what does not count may be anything
    each = _scipy_kl(student[:2].reshape(-1, 5), teacher[:2].reshape(-1, 5), 4.0).reshape(2, 7)
    expected = (each * mask[:2].numpy()).sum(1) / mask[:2].numpy().sum(1)
    found = kl_divergence(student, teacher, 4.0, dim=-1, where=mask).numpy()
    np.testing.assert_allclose(found[:2], expected, rtol=1e-5)
    assert found[2] == 0


def test_weights_of_positions_count_in_proportion():
    student, teacher, weights = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6)
    expected = ((student - teacher).double().square() * weights).sum(1) / weights.double().sum(1)
    np.testing.assert_allclose(l2(student, teacher, weights).numpy(), expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 8), (2, 3, 4, 4)])
@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_binary_kl_equals_that_of_two_classes_with_one_logit_at_zero(shape, magnitude):
    student, teacher = magnitude * torch.randn(shape), magnitude * torch.randn(shape)
    pairs = [torch.stack([torch.zeros(z.numel()), z.flatten()], dim=1) for z in (student, teacher)]
    expected = _scipy_kl(*pairs, 3.0).reshape(shape[0], -1).mean(1)
    # Of two logits that are certain, both sides know the difference to float64's rounding of log-probabilities near 0.
    np.testing.assert_allclose(binary_kl(student, teacher, 3.0).numpy(), expected, rtol=1e-5, atol=1e-14)


def test_binary_kl_has_the_gradient_of_softened_probabilities():
    student, teacher = torch.randn(6, 1, requires_grad=True), torch.randn(6, 1)
    binary_kl(student, teacher, 2.0).sum().backward()
    expected = 2.0 * (torch.sigmoid(student.detach().double() / 2) - torch.sigmoid(teacher.double() / 2))
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_losses_of_values_equal_their_formulas_in_float64():
    student, teacher = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    s, t = student.double().numpy(), teacher.double().numpy()
    d = np.abs(s - t)
    np.testing.assert_allclose(l2(student, teacher).numpy(), (d**2).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(l1(student, teacher).numpy(), d.mean((1, 2)), rtol=1e-5)
    smooth = np.where(d < 0.5, d**2 / (2 * 0.5), d - 0.25).mean((1, 2))
    np.testing.assert_allclose(smooth_l1(student, teacher, beta=0.5).numpy(), smooth, rtol=1e-5)
    norms = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(cosine(student, teacher).numpy(), (1 - (s * t).sum(-1) / norms).mean(1), rtol=1e-5)


@pytest.mark.parametrize("loss", [l1, l2, smooth_l1, cosine, binary_kl])
def test_equal_outputs_have_no_loss_and_shapes_that_differ_are_named(loss):
    x = torch.randn(4, 6)
    torch.testing.assert_close(loss(x, x.clone()), torch.zeros(4), rtol=0, atol=1e-6)
    with pytest.raises(QakdError, match=r"\(4, 6\) and \(4, 5\)"):
        loss(x, torch.zeros(4, 5))


@pytest.mark.parametrize(("shape", "dim"), [((3, 5, 4, 6), 1), ((3, 7, 5), -1)])
def test_cross_entropy_over_positions_leaves_out_what_is_to_be_ignored(shape, dim):
    logits = torch.randn(shape)
    positions = logits.movedim(dim, -1).shape[:-1]
    labels = torch.randint(5, positions)
    labels.view(-1)[::3] = -100
    labels[2] = -100
    rows = log_softmax(logits.movedim(dim, -1).double().numpy(), axis=-1)
    for index in range(3):
        counted = labels[index].numpy() != -100
        picked = [rows[index][place][labels[index][place]] for place in zip(*np.nonzero(counted), strict=True)]
        expected = -np.mean(picked) if picked else 0.0
        assert float(cross_entropy(logits, labels, dim=dim)[index]) == pytest.approx(expected, rel=1e-5)


def test_labels_of_several_classes_are_refused_and_the_right_loss_is_named():
    with pytest.raises(QakdError, match="BCEWithLogitsLoss"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(QakdError, match="BCEWithLogitsLoss"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 1]]))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(QakdError, match=f"between 0 and 2.*{label}"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("shape", [(3,), (4, 5), (4, 7, 2), ()])
def test_a_mask_that_does_not_fit_is_named(shape):
    with pytest.raises(QakdError, match="mask of shape"):
        kl_divergence(torch.zeros(4, 7, 5), torch.zeros(4, 7, 5), 1.0, dim=-1, where=torch.ones(shape))


@pytest.mark.parametrize(("student", "teacher"), [((4, 3), (4, 5)), ((4,), (4,))])
def test_kl_names_shapes_that_do_not_fit(student, teacher):
    with pytest.raises(QakdError, match=r"same shape|no dimension"):
        kl_divergence(torch.zeros(student), torch.zeros(teacher), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_kl_rejects_temperatures_that_are_not_positive(temperature):
    with pytest.raises(QakdError, match="temperature"):
        kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_cross_entropy_names_a_label_shape_that_does_not_fit():
    with pytest.raises(QakdError, match="labels"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.long))
