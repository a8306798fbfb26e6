"""What a convolution adds to a shortcut: rounded before the sum only where a runtime needs it there."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qakd_plugin import describe, export_onnx, load, prepare, save
from qakd_plugin.bench.census import census
from qakd_plugin.placement.placement import place_quantizers
from qakd_plugin.preparation.prepared import prepare_as
from qakd_plugin.runtimes.onnxruntime import session_options, start_session

IMAGES = torch.randn(8, 16, 12, 12, generator=torch.Generator().manual_seed(0))
TOOLKITS = ["modelopt", "pt2e", "torch_ao"]


class Block(nn.Module):
    """A residual block; with a convolution in its shortcut where sizes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def _net() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(stem, Block(16, 16, 1), Block(16, 32, 2), nn.Conv2d(32, 8, 1), nn.Flatten(), nn.Linear(200, 4)).eval()


def _summands(path):
    """Of each sum, how many of its operands are quantized: read through what leaves numbers as they are."""
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}

    def quantized(name):
        node = made_by[name]
        return node.op_type == "DequantizeLinear" or (node.op_type in {"MaxPool", "Transpose"} and quantized(node.input[0]))

    return [sum(map(quantized, node.input)) for node in graph.node if node.op_type == "Add"]


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_for_openvino_one_operand_of_a_sum_is_what_a_convolution_computed(toolkit, tmp_path):
    student = prepare(_net(), [IMAGES], toolkit, target="openvino")
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx", target="openvino").path
    assert _summands(path) == [1, 1]
    session = start_session(path, session_options(fusions=False))
    expected = student(IMAGES).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"input": IMAGES.numpy()})[0], expected, atol=np.ptp(expected) / 100)


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_where_onnx_runtime_is_among_the_targets_both_are_quantized(toolkit, target, tmp_path):
    student = prepare(_net(), [IMAGES], toolkit, target=target)
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx", target="onnxruntime").path
    counted = census(path)
    assert (counted.integer, counted.total) == (8, 8)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_student_for_openvino_of_an_earlier_version_is_prepared_as_it_was(toolkit, tmp_path):
    asked = {"target": "openvino", "batch_fn": lambda batch: (batch, None)}
    old = prepare_as(_net(), [IMAGES], toolkit, 8, 8, None, placement=3, **asked)
    new = prepare(_net(), [IMAGES], toolkit, target="openvino")
    assert describe(old).activation_quantizers == describe(new).activation_quantizers + 2
    for student in (old, new):
        again = load(save(student, tmp_path / "student.safetensors"), _net())
        assert torch.equal(again(IMAGES), student(IMAGES))


def test_a_convolution_keeps_its_quantizer_where_others_read_it_a_relu_follows_or_the_sum_has_none():
    class Sums(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.stem, self.branch, self.last, self.kind = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1), kind

        def forward(self, x):
            x = torch.relu(self.stem(x))
            y = self.branch(x)
            y = torch.relu(y) if self.kind == "relu" else y
            total = x + y
            if self.kind == "read twice":
                total = total * y
            return self.last(total) if self.kind == "read by a layer" else self.last(total) + self.last(total + 1)

    class Outer(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.sums = Sums(kind)

        def forward(self, x):
            return self.sums(x)

    def summed(kind, **options):
        return [output.name for output in place_quantizers(Outer(kind).eval(), **options).summed]

    for kind in ("floating", "relu", "read twice", "read by a layer"):
        assert summed(kind) == []
        assert summed(kind, before_sums=False) == (["sums.branch"] if kind == "read by a layer" else [])
