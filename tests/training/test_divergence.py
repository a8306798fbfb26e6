"""Ranges that do not fit what is quantized in training are named, where the rate would be blamed."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import qakd_plugin as qakd
from qakd_plugin.errors import TrainingError
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.divergence import Moment, misfit, require_finite_gradient

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MOMENT = Moment("distill", epoch=0, batch=0, step=0, lr=1e-3, gradient_norm=math.nan, way_back="")


def _network(fits):
    """Convolutions with small weights, each with a BatchNorm: in training alone its output is of size 1."""
    torch.manual_seed(0)
    layers = []
    for inputs in (3, 8, 8):
        layers += [nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        nn.init.normal_(layers[-3].weight, std=0.02)
    network = nn.Sequential(*layers, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    with torch.no_grad():
        for _ in range(40 if fits else 0):
            network(X)
    return network.eval()


def _in_training(fits, toolkit="modelopt"):
    student = qakd.prepare(_network(fits), [X], toolkit)
    adapter = adapter_for(student)
    adapter.set_mode(student, True)
    adapter.freeze_ranges(student, True)
    return adapter, student


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_the_first_batch_tells_that_statistics_do_not_fit(toolkit, caplog):
    network = _network(fits=False)
    student = qakd.prepare(network, [X], toolkit)
    qakd.distill(student, network, [X], epochs=1, seed=0, lr=1e-5)
    (said,) = [record.getMessage() for record in caplog.records if "running statistics" in record.getMessage()]
    assert "times its calibrated range" in said
    assert said.partition(":")[0] in {quantizer.fqn for quantizer in adapter_for(student).quantizers(student)}


def test_statistics_that_fit_are_not_spoken_of(caplog):
    network = _network(fits=True)
    qakd.distill(qakd.prepare(network, [X]), network, [X], epochs=1, seed=0, lr=1e-5)
    assert "running statistics" not in caplog.text


def test_a_look_at_ranges_changes_nothing():
    adapter, student = _in_training(fits=False)
    before, drawn = {name: value.clone() for name, value in student.state_dict().items()}, torch.get_rng_state()
    assert misfit(adapter, student, X) is not None
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(quantizer.module._forward_pre_hooks for quantizer in adapter.quantizers(student))


def test_how_far_beyond_is_measured():
    adapter, student = _in_training(fits=False)
    name, times = misfit(adapter, student, X).split(": in training what it quantizes is ")
    (quantizer,) = [found for found in adapter.quantizers(student) if found.fqn == name]
    seen = []
    handle = quantizer.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    student(X)
    handle.remove()
    qparams = adapter.qparams(quantizer)
    expected = seen[0].norm() / math.sqrt(seen[0].numel()) / float(qparams.scale) / max(-qparams.quant_min, qparams.quant_max)
    assert float(times.split()[0]) == pytest.approx(float(expected), rel=0.05)


def test_a_gradient_that_is_lost_is_blamed_on_what_lost_it():
    with pytest.raises(TrainingError, match=r"not finite at step 0 .* running statistics .* prepare it again\.$") as caught:
        require_finite_gradient(math.inf, 1.0, MOMENT, *_in_training(fits=False), X)
    assert "Lower lr" not in str(caught.value)
    fits = _in_training(fits=True)
    with pytest.raises(TrainingError, match=r"No step was taken yet, so it is not the rate: look for a layer"):
        require_finite_gradient(math.nan, 1.0, MOMENT, *fits, X)
    with pytest.raises(TrainingError, match=r"Lower lr=0\.001\.$"):
        require_finite_gradient(math.nan, 1.0, replace(MOMENT, step=1), *fits, X)
    require_finite_gradient(1.0, 1.0, MOMENT, *_in_training(fits=False), X)
