"""Contextual mutual information against two passes over all predictions, written from the definition."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import qakd_plugin.augment.cmi
from qakd_plugin import QakdError, cmi_score
from qakd_plugin.augment.cmi import CmiStatistics, Jackknife


def _two_passes(logits, targets):
    """Figures from the definition: first the centroid of every class, then the divergence of each prediction from it."""
    log_p = log_softmax(logits.double().numpy(), axis=1)
    p = np.exp(log_p)
    classes = p.shape[1]
    t = targets.double().numpy() if targets.is_floating_point() else np.eye(classes)[targets.numpy()]
    present = [y for y in range(classes) if t[:, y].sum() > 0]
    cmi = variance = 0.0
    far = []
    for y in present:
        rows = t[:, y] > 0
        weights, own, log_own = t[rows, y], p[rows], log_p[rows]
        centroid = weights @ own / weights.sum()
        seen = centroid > 0
        cmi += weights @ (own[:, seen] * (log_own[:, seen] - np.log(centroid[seen]))).sum(1)
        variance += weights @ ((own - centroid) ** 2).sum(1)
        far.append(np.log(weights.sum()) - np.logaddexp.reduce(np.log(weights) + log_own[:, y]))
    surprise = -(np.where(t > 0, t * log_p, 0.0)).sum() / len(p)
    return {"cmi": cmi / len(p), "centroid_divergence": np.mean(far), "cross_entropy": surprise, "variance": variance / len(p)}


def _same(record, logits, targets, tolerance=1e-9):
    for name, value in _two_passes(logits, targets).items():
        found = getattr(record, name)
        assert found == pytest.approx(value, abs=tolerance, rel=tolerance), name


def _random(count, classes, seed, magnitude=3.0, soft=False, missing=()):
    generator = torch.Generator().manual_seed(seed)
    logits = magnitude * torch.randn(count, classes, generator=generator)
    allowed = torch.tensor([y for y in range(classes) if y not in missing])
    first, second = (allowed[torch.randint(len(allowed), (count,), generator=generator)] for _ in range(2))
    if not soft:
        return logits, first
    share = torch.rand(count, 1, generator=generator)
    one_hot = torch.nn.functional.one_hot
    return logits, share * one_hot(first, classes) + (1 - share) * one_hot(second, classes)


@given(
    count=st.integers(1, 90),
    classes=st.integers(2, 12),
    seed=st.integers(0, 10**6),
    magnitude=st.sampled_from([0.01, 1.0, 30.0, 1e3, 1e5]),
    soft=st.booleans(),
    missing=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_one_pass_equals_two_passes_from_the_definition(count, classes, seed, magnitude, soft, missing):
    logits, targets = _random(count, classes, seed, magnitude, soft, missing=range(missing))
    _same(cmi_score(logits, targets), logits, targets)


def test_a_thousand_classes_of_which_some_are_absent():
    logits, targets = _random(3000, 1000, 0, missing=range(0, 1000, 7))
    _same(cmi_score(logits, targets), logits, targets)


def test_labels_with_many_classes_each():
    logits, _ = _random(300, 30, 12)
    targets = torch.randn(300, 30, generator=torch.Generator().manual_seed(13)).softmax(1)
    _same(cmi_score(logits, targets), logits, targets, tolerance=1e-9)


def test_a_hundred_thousand_images():
    logits, targets = _random(100_000, 10, 1)
    _same(cmi_score(logits, targets), logits, targets)


def test_probabilities_below_what_float64_can_hold_stay_finite():
    logits = torch.tensor([[0.0, 5000.0, 1e4], [1e4, 0.0, 3.0]])
    for targets in (torch.tensor([0, 1]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])):
        record = cmi_score(logits, targets)
        assert record.centroid_divergence > 1000
        _same(record, logits, targets)


@pytest.mark.parametrize("soft", [False, True])
def test_any_order_and_any_split_into_batches_give_the_same(soft):
    logits, targets = _random(500, 7, 2, soft=soft)
    expected = cmi_score(logits, targets)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    streamed = CmiStatistics(7)
    for z, y in zip(logits[order].split([1, 99, 250, 150]), targets[order].split([1, 99, 250, 150]), strict=True):
        streamed.update(z, y)
    for name in ("score", "cmi", "centroid_divergence", "cross_entropy", "variance", "num_samples"):
        assert getattr(streamed.result(), name) == pytest.approx(getattr(expected, name), abs=1e-12)


def test_batches_in_the_same_order_give_the_same_interval():
    logits, targets = _random(500, 7, 2)
    streamed = CmiStatistics(7)
    for z, y in zip(logits.split(33), targets.split(33), strict=True):
        streamed.update(z, y)
    assert streamed.result().interval == pytest.approx(cmi_score(logits, targets).interval, abs=1e-12)


def test_renaming_classes_changes_nothing():
    logits, targets = _random(200, 9, 4)
    new = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    renamed = cmi_score(logits[:, torch.argsort(new)], new[targets])
    assert renamed.score == pytest.approx(cmi_score(logits, targets).score, abs=1e-12)


def test_repeated_data_score_the_same():
    logits, targets = _random(150, 6, 6, soft=True)
    assert cmi_score(logits.repeat(3, 1), targets.repeat(3, 1)).score == pytest.approx(
        cmi_score(logits, targets).score, abs=1e-12
    )


@pytest.mark.parametrize("magnitude", [1.0, 100.0])
def test_a_teacher_that_knows_the_label_and_no_more_has_none(magnitude):
    targets = torch.randint(8, (300,), generator=torch.Generator().manual_seed(7))
    of_class = magnitude * torch.randn(8, 8, generator=torch.Generator().manual_seed(8))
    record = cmi_score(of_class[targets], targets)
    assert record.cmi == pytest.approx(0, abs=1e-12)
    assert record.variance == pytest.approx(0, abs=1e-12)


def test_labels_as_probabilities_of_one_class_equal_classes():
    logits, targets = _random(200, 5, 9)
    soft = cmi_score(logits, torch.nn.functional.one_hot(targets, 5).float())
    assert soft.score == pytest.approx(cmi_score(logits, targets).score, abs=1e-12)
    assert soft.interval == pytest.approx(cmi_score(logits, targets).interval, abs=1e-12)


def test_forms_subtract_what_they_name():
    logits, targets = _random(100, 4, 10)
    for form, part in (("centroid", "centroid_divergence"), ("ce", "cross_entropy")):
        record = cmi_score(logits, targets, form=form)
        assert record.score == record.cmi - getattr(record, part)
    with pytest.raises(QakdError, match="form='other'"):
        cmi_score(logits, targets, form="other")


def _with_student(count, classes, seed, soft=False):
    logits, targets = _random(count, classes, seed, soft=soft)
    return logits, targets, logits + torch.randn(count, classes, generator=torch.Generator().manual_seed(seed + 1))


@pytest.mark.parametrize("soft", [False, True])
def test_the_pair_form_is_what_the_student_says_of_the_teachers_answer_beyond_the_class(soft):
    """From the other end: mean of sum_c P_x[c] log(S_x[c] / Q_y[c]), with centroids written out; no divergence is formed."""
    logits, targets, student = _with_student(300, 6, 21, soft)
    p, log_s = np.exp(log_softmax(logits.double().numpy(), axis=1)), log_softmax(student.double().numpy(), axis=1)
    t = targets.double().numpy() if soft else np.eye(6)[targets.numpy()]
    centroids = (t.T @ p) / t.sum(0)[:, None]
    expected = np.einsum("xy,xc,xyc->", t, p, log_s[:, None, :] - np.log(centroids)[None]) / len(p)
    record = cmi_score(logits, targets, form="pair", student_logits=student)
    assert record.score == pytest.approx(expected, abs=1e-9)
    assert record.student_divergence == pytest.approx((p * (np.log(p) - log_s)).sum() / len(p), abs=1e-9)
    low, high = record.interval
    assert low < record.score < high


def test_a_student_that_answers_as_the_teacher_leaves_cmi_and_any_other_takes_some_away():
    logits, targets, student = _with_student(200, 5, 22)
    same = cmi_score(logits, targets, form="pair", student_logits=logits + 3.0)  # a softmax knows no shift
    assert same.score == pytest.approx(same.cmi, abs=1e-12)
    assert cmi_score(logits, targets, form="pair", student_logits=student).score < same.score


def test_a_student_changes_no_other_figure():
    logits, targets, student = _with_student(200, 5, 23)
    alone, beside = cmi_score(logits, targets), cmi_score(logits, targets, student_logits=student)
    assert alone.student_divergence is None
    for name in ("score", "cmi", "centroid_divergence", "cross_entropy", "variance", "interval"):
        assert getattr(alone, name) == getattr(beside, name)


def test_students_that_cannot_be_compared_are_named():
    logits, targets, student = _with_student(30, 5, 24)
    with pytest.raises(QakdError, match=r"student's logits are known of 0 of 30 images: pass student_logits="):
        cmi_score(logits, targets, form="pair")
    with pytest.raises(
        QakdError, match=r"student_logits must have the shape of the teacher's logits, \(30, 5\), got \(30, 4\)"
    ):
        cmi_score(logits, targets, form="pair", student_logits=student[:, :4])
    student[7, 0] = float("nan")
    with pytest.raises(QakdError, match="student's logits of image 7 are not finite"):
        cmi_score(logits, targets, form="pair", student_logits=student)
    statistics = CmiStatistics(5)
    statistics.update(logits, targets, logits)
    statistics.update(logits, targets)
    with pytest.raises(QakdError, match="known of 30 of 60 images"):
        statistics.result(form="pair")


def test_memory_does_not_grow_with_the_number_of_images():
    statistics = CmiStatistics(5)

    def size():
        return sum(value.untyped_storage().nbytes() for value in vars(statistics.sums).values())

    before = size()
    for seed in range(5):
        statistics.update(*_random(1000, 5, seed))
    assert size() == before
    assert statistics.num_samples == 5000


def test_the_interval_covers_the_score_of_all_images_as_often_as_it_says():
    """A population of 20,000; many samples of 400 each, of which one in twenty may miss."""
    logits, targets = _random(20_000, 4, 11)
    truth = cmi_score(logits, targets).score
    hits = 0
    for seed in range(200):
        rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(seed))[:400]
        low, high = cmi_score(logits[rows], targets[rows]).interval
        hits += low <= truth <= high
    assert 176 <= hits <= 199


def test_the_jackknife_of_a_mean_is_its_standard_error_and_of_a_variance_unbiased():
    values = np.random.default_rng(0).normal(size=12)
    rest = [np.delete(values, k) for k in range(12)]
    of_mean = Jackknife.of(values.mean(), [part.mean() for part in rest])
    assert of_mean.error == pytest.approx(values.std(ddof=1) / np.sqrt(12))
    of_variance = Jackknife.of(values.var(), [part.var() for part in rest])
    assert of_variance.corrected == pytest.approx(values.var(ddof=1))


def test_too_few_images_for_an_interval_say_so():
    assert cmi_score(torch.zeros(1, 3), torch.tensor([1])).interval == (-np.inf, np.inf)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.tensor([0, 1]), "image 1 are not finite"),
        (torch.tensor([[0.0, float("inf")]]), torch.tensor([0]), "image 0 are not finite"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"label 3 of image 1 is out of range: it must lie in 0..2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "label -1 of image 0"),
        (torch.zeros(2, 3), torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]), "row 0 is out of range"),
        (torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.5, -0.5, 0.0]]), "row 1 is out of range"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"must have shape \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(5, dtype=torch.long), "targets must be int64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long), "logits must have shape"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "empty"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), "num_classes=1"),
    ],
)
def test_bad_input_is_named(logits, targets, message):
    with pytest.raises(QakdError, match=message):
        cmi_score(logits, targets)


def test_a_number_of_classes_that_does_not_fit_is_named():
    with pytest.raises(QakdError, match=r"\(N, 4\)"):
        cmi_score(torch.zeros(2, 3), torch.tensor([0, 1]), num_classes=4)


def test_doctests_hold():
    assert doctest.testmod(qakd_plugin.augment.cmi, extraglobs={"torch": torch}).failed == 0
