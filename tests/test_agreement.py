"""What the other tests compare programs with can fail."""

import copy
from dataclasses import replace

import pytest
import torch
from agreement import decided, require_same_but_for_ties, ties_are_rare, tolerated_sqnr_db

from qakd_plugin import ParityError
from qakd_plugin.deploy.parity.report import Agreement, ParityReport, agreement
from qakd_plugin.toolkits import adapter_for


@pytest.fixture(params=["modelopt", "pt2e", "torch_ao", "torch_ao_eager"])
def student(request, prepared):
    student = prepared(request.param)
    adapter_for(student).freeze_ranges(student, True)
    return student


def _form(student):
    return adapter_for(student).export_form(student)


def _last(form, name):
    """The last tensor of this name in a form."""
    return [tensor for key, tensor in form.state_dict().items() if key.rpartition(".")[2] == name][-1]


def test_a_student_is_the_same_as_its_own_form_and_as_a_copys(student, digits):
    require_same_but_for_ties(_form(student), copy.deepcopy(student), digits.test[0][:32])


def test_a_scale_or_a_bias_that_differs_is_no_tie(student, digits):
    images, form = digits.test[0][:32], _form(student)
    _last(form, "scale").mul_(1.01)
    with pytest.raises(ParityError):
        require_same_but_for_ties(form, student, images)
    form = _form(student)
    _last(form, "bias")[0] += 0.05
    with pytest.raises(ParityError):
        require_same_but_for_ties(form, student, images)


def test_ties_that_are_many_are_no_chance(prepared, digits, monkeypatch):
    proof = ParityReport(10, 10_000, 9, 1, None, 0.0, 0.0, Agreement(0.5, 20.0, 0.1, 8), None)
    assert ties_are_rare(proof)
    assert not ties_are_rare(replace(proof, ties_toolkit=2))
    student = prepared("modelopt")
    monkeypatch.setattr("agreement.RARE", -1.0)  # then even none are too many
    with pytest.raises(AssertionError, match=r"ties in \d+ codes"):
        require_same_but_for_ties(_form(student), student, digits.test[0][:8])


@torch.no_grad()
def test_noise_above_that_of_quantization_is_not_tolerated(student, digits):
    images = digits.test[0][:64]
    before = copy.deepcopy(student.state_dict())
    least = tolerated_sqnr_db(student, images)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in before.items())
    expected = student(images)
    adapter_for(student).set_fake_quant(student, False)
    assert least < agreement(student(images).numpy(), expected.numpy()).sqnr_db < least + 3.1
    adapter_for(student).set_fake_quant(student, True)
    deviation = expected.std() * torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    assert agreement(expected.numpy(), (expected + 10 ** (-least / 20) * 1.5 * deviation).numpy()).sqnr_db < least


def test_labels_are_decided_where_no_deviation_reaches_the_second_logit():
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.49], [1.0, 0.0, 0.99]])
    assert decided(logits, 0.001).tolist() == [True, True, True]
    assert decided(logits, 0.006).tolist() == [True, False, False]
