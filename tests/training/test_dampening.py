"""Dampening of weights that oscillate: its value, its gradient, its schedule, and where it is refused."""

import math

import pytest
import torch

from qakd_plugin import LSQ, SQAKD, DoReFa, QakdError, attach, distill, use_quantizers
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.dampening import Dampening


def _pulled(student, images):
    """A loss of nothing but dampening, after one forward pass in training mode."""
    adapter = adapter_for(student)
    dampening = Dampening(adapter, student)
    adapter.set_mode(student, True)
    student(images)
    parts = {}
    loss = dampening.added(torch.zeros(()), parts, 1.0, 1.0)
    dampening.remove()
    return loss, parts


@pytest.mark.parametrize("bits", [3, 8])
def test_the_loss_is_the_squared_distance_to_the_nearest_grid_point_within_the_grid(make_student, digits, bits):
    student = use_quantizers(make_student(bits=bits), LSQ())
    adapter, expected = adapter_for(student), 0.0
    with torch.no_grad():
        student.head.weight[0, 0] = 50.0  # far beyond the grid: its end is where it is clipped to, and rounded to
    for quantizer in adapter.quantizers(student):
        if quantizer.role == "weight":
            weight, params = quantizer.weight().double(), adapter.qparams(quantizer)
            scale = params.scale.double().reshape(-1, *[1] * (weight.ndim - 1))
            codes = weight / scale
            nearest = torch.arange(params.quant_min, params.quant_max + 1, dtype=torch.float64)
            apart = (codes.clamp(params.quant_min, params.quant_max)[..., None] - nearest).abs().amin(-1)
            expected += float((apart * scale).square().sum())
    loss, parts = _pulled(student, digits.train[0][:8])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(parts["dampening"]) == pytest.approx(expected, rel=1e-4)


def test_its_gradient_draws_weights_to_the_grid_and_reaches_neither_steps_nor_clipped_weights(make_student, digits):
    student = use_quantizers(make_student(bits=3), LSQ())
    with torch.no_grad():
        student.head.weight[0, 0] = 50.0
    loss, _ = _pulled(student, digits.train[0][:8])
    loss.backward()
    (quantizer,) = (q for q in adapter_for(student).quantizers(student) if q.role == "weight" and q.layer is student.head)
    weight, gradient = student.head.weight.detach(), student.head.weight.grad
    scale = adapter_for(student).qparams(quantizer).scale[:, None]
    params = adapter_for(student).qparams(quantizer)
    inside = (weight / scale > params.quant_min) & (weight / scale < params.quant_max)
    rounded = (weight / scale).round() * scale
    torch.testing.assert_close(gradient[inside], 2 * (weight - rounded)[inside], rtol=1e-3, atol=1e-5)
    assert gradient[0, 0] == 0
    assert all(
        p.grad is None or not p.grad.any() for q in adapter_for(student).quantizers(student) for p in q.module.parameters()
    )


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", pytest.param("pt2e", marks=pytest.mark.matrix)])
def test_a_dampened_run_ends_nearer_its_grid_and_its_weight_grows_by_half_a_cosine(
    make_student, teacher, batches, digits, toolkit, monkeypatch
):
    seen, added = [], Dampening.added

    def spy(self, loss, parts, weight, progress):
        found = added(self, loss, parts, weight, progress)
        seen.append((float(found.detach() - loss.detach()), float(parts["dampening"])))
        return found

    monkeypatch.setattr(Dampening, "added", spy)
    options = {"epochs": 2, "lr": 3e-3, "seed": 0}
    plain, dampened = make_student(toolkit, 4), make_student(toolkit, 4)
    distill(plain, teacher, batches[:4], **options)
    result = distill(dampened, teacher, batches[:4], method=SQAKD(dampening=10.0), **options)
    for step, (share, distance) in enumerate(seen):
        assert share == pytest.approx(10 * (1 - math.cos(math.pi * step / 8)) / 2 * distance, rel=1e-3, abs=1e-4)
    assert len(seen) == 8
    assert "dampening" in result.history[-1]
    left = [float(_pulled(student, digits.train[0][:8])[0].detach()) for student in (plain, dampened)]
    assert left[1] < 0.8 * left[0]


def test_where_dampening_has_no_meaning_it_is_refused(make_student, teacher, batches):
    with pytest.raises(QakdError, match=r"dampening: .* rounds more than the weight itself.*qakd.LSQ\(\)"):
        distill(use_quantizers(make_student(), DoReFa()), teacher, batches, method=SQAKD(dampening=0.01), epochs=1)
    with pytest.raises(QakdError, match="a loop of your own does not know how much of training is done"):
        attach(make_student(), teacher, SQAKD(dampening=0.01))
    scales = use_quantizers(make_student(), LSQ())
    with pytest.raises(QakdError, match="draws weights to their grid"):
        distill(scales, teacher, batches, method=SQAKD(dampening=0.01), epochs=1, trainable="scales")
    with pytest.raises(QakdError, match=r"dampening=-1"):
        SQAKD(dampening=-1)
