"""What a toolkit leaves in floating point without a word is named; networks in wrappers are found, or it is said where."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qakd_plugin import NotPreparedError, describe, distill, export_onnx, prepare

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Conv2d):
    """Weight standardization (arXiv 1903.10520)."""

    def forward(self, x):
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, weight.view_as(self.weight), self.bias)


class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(8, 5)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x.mean([2, 3]))


def _net(kind=nn.Conv2d):
    torch.manual_seed(0)
    convolutions = kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def _warned(caplog):
    return [record.getMessage() for record in caplog.records if "floating point" in record.getMessage()]


@pytest.mark.parametrize("toolkit", ["torch_ao", "torch_ao_eager"])
def test_layers_that_torch_ao_does_not_know_are_named(toolkit, caplog):
    prepare(_net(), [IMAGES], toolkit)
    assert not _warned(caplog)
    prepare(_net(Standardized), [IMAGES], toolkit)
    (warning,) = _warned(caplog)
    assert warning.startswith(f"0, 2: toolkit='{toolkit}' left these layers in floating point")


def test_layers_that_pt2e_does_not_see_are_named(caplog):
    assert describe(prepare(PartlyFrozen().eval(), [IMAGES], "pt2e")).weight_quantizers == 1
    (warning,) = _warned(caplog)
    assert warning.startswith("backbone.0: toolkit='pt2e' left these layers in floating point")


def test_a_quantized_weight_that_is_not_what_is_multiplied_is_named(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        student = prepare(_net(Standardized), [IMAGES])
        assert not _warned(caplog)
        export_onnx(student, IMAGES, tmp_path / "s.onnx")
        (warning,) = _warned(caplog)
        assert warning.startswith("0.weight, 2.weight: not this quantized weight is multiplied")
        caplog.clear()
        export_onnx(prepare(_net(Standardized), [IMAGES], "pt2e"), IMAGES, tmp_path / "s.onnx")
        export_onnx(prepare(_net(), [IMAGES]), IMAGES, tmp_path / "s.onnx")
        assert not _warned(caplog)


def test_what_was_compiled_is_trained_and_exported(tmp_path):
    student = prepare(_net(), [IMAGES])
    compiled = torch.compile(student, backend="eager")
    assert describe(compiled).model == "Sequential"
    result = distill(compiled, _net(), [IMAGES], epochs=1, lr=1e-3)
    assert result.model is student
    assert export_onnx(compiled, IMAGES, tmp_path / "s.onnx").parity.weight_codes


def test_a_graph_in_a_wrapper_is_named():
    wrapped = nn.Sequential(nn.Identity(), prepare(_net(), [IMAGES], "pt2e"))
    with pytest.raises(NotPreparedError, match=r"wraps 1, .* prepared_model\.get_submodule\('1'\)"):
        distill(wrapped, _net(), [IMAGES], epochs=1)
