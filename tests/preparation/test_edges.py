"""prepare(edges=...): bits of the weights of the first and the last layer, with every toolkit, in memory and in files."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import LSQ, QakdError, configuration, describe, export_onnx, prepare, use_quantizers

TOOLKITS = ["modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager"]
IMAGES = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def _net(toolkit):
    torch.manual_seed(0)
    if toolkit == "torchao":
        layers = [nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)]
    else:
        layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*layers).eval()


def _bits(student, role):
    return [q.bits for q in describe(student).quantizers if q.role == role]


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_the_outer_layers_weights_take_the_bits_that_edges_says(toolkit):
    student = prepare(_net(toolkit), [IMAGES], toolkit, weight_bits=3, activation_bits=4, edges=5)
    as_before = prepare(_net(toolkit), [IMAGES], toolkit, weight_bits=3, activation_bits=4)
    assert _bits(student, "weight") == [5, 3, 5]
    assert _bits(as_before, "weight") == [8, 3, 8]
    assert _bits(student, "activation") == _bits(as_before, "activation"), "inputs of the outer layers keep 8 bits"


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_file_holds_the_outer_layers_in_as_few_bits_and_computes_the_same(toolkit, tmp_path):
    student = prepare(_net(toolkit), [IMAGES], toolkit, weight_bits=2, activation_bits=4, edges=4)
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx", target="openvino", weight_storage="int4").path
    kinds = [tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) >= 2]
    stored = [kind for kind in kinds if kind != onnx.TensorProto.INT32]  # factors of codes
    assert stored == [onnx.TensorProto.INT4] * 3, "the outer layers, too"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # which rounds biases
    (logits,) = ort.InferenceSession(path, options).run(None, {"input": IMAGES.numpy()})
    expected = student(IMAGES).detach().numpy()
    # One step of an 8-bit input here and there: torch.ao multiplies by 1 / scale, and ties round otherwise.
    np.testing.assert_allclose(logits, expected, atol=np.ptp(expected) / 100)


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_a_students_file_says_it(toolkit, tmp_path):
    student = prepare(_net(toolkit), [IMAGES], toolkit, weight_bits=3, activation_bits=4, edges=4)
    use_quantizers(student, LSQ())
    loaded = qakd.load(qakd.save(student, tmp_path / "student.safetensors"), _net(toolkit))
    assert _bits(loaded, "weight") == [4, 3, 4]
    assert torch.equal(loaded(IMAGES), student(IMAGES))


def test_a_configuration_for_ones_own_call_has_them_too():
    entries = configuration(_net("modelopt"), weight_bits=3, edges=4)["quant_cfg"]
    weights = [entry["cfg"]["num_bits"] for entry in entries if entry["quantizer_name"].endswith("weight_quantizer")]
    assert weights == [4, 3, 4]


@pytest.mark.parametrize("edges", [1, 9])
def test_bits_that_no_grid_has_are_refused(edges):
    with pytest.raises(QakdError, match=f"edges={edges} is out of range"):
        prepare(_net("modelopt"), [IMAGES], edges=edges)
