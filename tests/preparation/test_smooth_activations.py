"""Quantizers around SiLU, Hardswish and GELU: in front of them only where a runtime needs one there."""

import collections

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from qakd_plugin import describe, export_onnx, load, prepare, save
from qakd_plugin.bench.census import census
from qakd_plugin.placement.placement import place_quantizers
from qakd_plugin.preparation.prepared import prepare_as

IMAGES = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
SMOOTH = {"Sigmoid", "HardSwish"}
TOOLKITS = ["modelopt", "pt2e", "torch_ao"]


def _net():
    torch.manual_seed(0)
    blocks = [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.Hardswish(), nn.Conv2d(16, 16, 1)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, 4)).eval()


def _quantized_before(path):
    """How many activation functions of a file read something that was dequantized."""
    graph = onnx.load(path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    found = collections.Counter(made_by[node.input[0]] for node in graph.node if node.op_type in SMOOTH)
    return found["DequantizeLinear"], found.total()


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_for_openvino_a_quantizer_stands_after_them_alone(toolkit, tmp_path):
    student = prepare(_net(), [IMAGES], toolkit, target="openvino")
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx", target="openvino").path
    assert _quantized_before(path) == (0, 2)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (logits,) = ort.InferenceSession(path, options).run(None, {"input": IMAGES.numpy()})
    expected = student(IMAGES).detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=np.ptp(expected) / 100)


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_where_onnx_runtime_is_among_the_targets_its_convolutions_stay_in_integers(toolkit, target, tmp_path):
    student = prepare(_net(), [IMAGES], toolkit, target=target)
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx", target="onnxruntime").path
    assert _quantized_before(path) == (2, 2)
    counted = census(path)
    assert (counted.integer, counted.total) == (4, 4)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_student_for_openvino_of_an_earlier_version_is_prepared_as_it_was(toolkit, tmp_path):
    asked = {"target": "openvino", "batch_fn": lambda batch: (batch, None)}
    old = prepare_as(_net(), [IMAGES], toolkit, 8, 8, None, placement=2, **asked)
    new = prepare(_net(), [IMAGES], toolkit, target="openvino")
    assert describe(old).activation_quantizers == describe(new).activation_quantizers + 2
    for student in (old, new):
        again = load(save(student, tmp_path / "student.safetensors"), _net())
        assert torch.equal(again(IMAGES), student(IMAGES))


def test_fx_leaves_what_a_linear_layer_hands_to_a_gelu_in_floating_point():
    """Integer kernels of linear layers return floats in every runtime."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    student = prepare(network, [IMAGES[:, :, 0, 0][:, :8]], "torch_ao")
    quantized = [user.target for user in student.graph.nodes if user.op == "call_module"]
    gelu = quantized.index("1")
    assert quantized[gelu - 1] == "0", "the layer itself"
    assert quantized[gelu + 1].startswith("activation_post_process")


@pytest.mark.parametrize("function", [torch.sigmoid, nn.functional.silu, nn.functional.gelu, torch.tanh])
def test_functions_count_as_modules_do_and_other_readers_keep_the_quantizer(function):
    class Functional(nn.Module):
        def __init__(self, shares):
            super().__init__()
            self.first, self.second, self.shares = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1), shares

        def forward(self, x):
            x = self.first(x)
            return self.second(function(x) * x if self.shares else function(x))

    def outputs(shares, **options):
        return [output.name for output in place_quantizers(Functional(shares).eval(), **options).outputs]

    assert outputs(False) == outputs(True) == ["first"]
    assert outputs(False, before_activations=False) == []
    assert outputs(True, before_activations=False) == ["first"]
