"""Transposed convolutions: scales per output channel, BatchNorm folded, integers in ONNX Runtime's file where it has them."""

import onnx
import pytest
import torch
from torch import nn

from qakd_plugin import LSQ, configuration, distill, export_onnx, prepare, use_quantizers

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _net(groups=1):
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 6, 2, 2, groups=groups, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *up, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    for _ in range(10):
        net(IMAGES)
    return net.eval()


def _exported(student, path):
    exported = export_onnx(student, IMAGES, path)
    graph = onnx.load(exported.path).graph
    (layer,) = [node for node in graph.node if node.op_type == "ConvTranspose"]
    (scale,) = [node for node in graph.node if layer.input[1] in node.output]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    norms = sum(node.op_type == "BatchNormalization" for node in graph.node)
    return [attribute.i for attribute in scale.attribute if attribute.name == "axis"], shapes[scale.input[1]], norms


@pytest.mark.parametrize(("toolkit", "bits", "learned"), [("modelopt", 8, False), ("modelopt", 4, True), ("pt2e", 8, False)])
def test_batch_norm_goes_into_scales_of_output_channels(toolkit, bits, learned, tmp_path):
    student = prepare(_net(), [IMAGES], toolkit, weight_bits=bits)
    if learned:
        use_quantizers(student, LSQ())
    distill(student, _net(), [IMAGES], epochs=1, lr=1e-3)
    assert _exported(student, tmp_path / "s.onnx") == ([1], (6,), 0)


def test_groups_share_scales_and_keep_their_batch_norm(tmp_path, caplog):
    assert _exported(prepare(_net(groups=2), [IMAGES]), tmp_path / "s.onnx") == ([1], (3,), 1)
    assert "2/ConvTranspose: BatchNorm stays in the graph" in caplog.text


def test_a_configuration_for_the_users_own_call_has_modelopts_axis():
    entries = {entry["quantizer_name"]: entry.get("cfg", {}) for entry in configuration(_net())["quant_cfg"]}
    assert entries["2.weight_quantizer"]["axis"] == 0
