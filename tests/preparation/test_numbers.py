"""Weights and inputs that have no numbers, or others than float32, are refused by name before a toolkit sees them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qakd_plugin import ExportError, QakdError, export_float, export_onnx, prepare

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _float() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def _with(name: str, value: float) -> Callable[[nn.Module], nn.Module]:
    def changed(model: nn.Module) -> nn.Module:
        model.get_parameter(name).data.flatten()[0] = value
        return model

    return changed


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "torch_ao_eager", "pt2e", "torchao"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_with("0.weight", float("nan")), "0.weight holds NaN or infinite weights"),
        (_with("4.bias", float("inf")), "4.bias holds NaN or infinite weights"),
        (_with("1.weight", float("-inf")), "1.weight holds NaN or infinite weights"),
        (lambda model: model.double(), r"0.weight is float64, .*: pass model.float\(\)"),
        (lambda model: model.bfloat16(), r"model holds bfloat16 weights, .*: pass model.float\(\)"),
        (lambda model: model.half(), r"model holds float16 weights, .*: pass model.float\(\)"),
        (lambda model: model.to("meta"), "0.weight lies on the meta device"),
    ],
)
def test_weights_are_refused_by_name(change, problem, toolkit):
    with pytest.raises(QakdError, match=problem):
        prepare(change(_float()), [X], toolkit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_student_in_another_type_is_not_exported(dtype, tmp_path):
    student = prepare(_float(), [X], "torch_ao").to(dtype)
    with pytest.raises(ExportError, match=rf"is {str(dtype).removeprefix('torch.')}, .*: pass model\.float\(\)"):
        export_onnx(student, X, tmp_path / "s.onnx")


def test_inputs_without_numbers_are_refused():
    with pytest.raises(QakdError, match="calibration_batches: batch 1 lies on the meta device"):
        prepare(_float(), [X, X.to("meta")])


def test_a_file_of_no_numbers_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"^0\.weight lies on the meta device"):
        export_float(_float().to("meta"), X, tmp_path / "meta.onnx")
    with pytest.raises(ExportError, match="example_inputs: 'input' lies on the meta device"):
        export_float(_float(), X.to("meta"), tmp_path / "meta.onnx")
    assert not list(tmp_path.iterdir())
