"""Frozen BatchNorms: part of the convolution before them where that is exact, named where it is not."""

import copy
import logging

import onnx
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import qakd_plugin as qakd
from qakd_plugin.bench.census import census

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _norm(channels, eps=1e-3):
    norm = FrozenBatchNorm2d(channels, eps)
    generator = torch.Generator().manual_seed(channels)
    for name, low, high in (("weight", -1.5, 1.5), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.01, 2)):
        getattr(norm, name).uniform_(low, high, generator=generator)
    return norm


def _network(bias=False):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, bias=bias), _norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), _norm(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_every_convolution_before_one_computes_in_integers(toolkit, tmp_path):
    network = _network()
    before = copy.deepcopy(network.state_dict())
    student = qakd.prepare(network, [X], toolkit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    adapter = qakd.preparation.prepared.adapter_named(toolkit)
    adapter.set_fake_quant(student, False)
    with torch.no_grad():
        torch.testing.assert_close(student(X), network(X), rtol=1e-5, atol=1e-5)
    adapter.set_fake_quant(student, True)
    qakd.export_onnx(student, X, tmp_path / "net.onnx", target="onnxruntime")
    counted = census(tmp_path / "net.onnx")
    assert counted.integer == counted.total == 3


def test_what_is_not_the_only_reader_of_one_call_of_a_plain_convolution_stays_and_is_named(caplog):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 8, 1), _norm(8), _norm(8)
            self.other, self.third = nn.Conv2d(8, 8, 1), _norm(8)
            self.up, self.fourth, self.head = nn.ConvTranspose2d(8, 8, 1), _norm(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.second(self.first(self.conv(x)))  # the second has no convolution before it
            y = self.other(x)
            x = self.third(y) + y
            return self.head(self.fourth(self.up(x)).mean((2, 3)))

    network = Shared().eval()
    with caplog.at_level(logging.WARNING):
        student = qakd.prepare(network, [X])
    assert "second, third, fourth: frozen BatchNorms that are not the only reader" in caplog.text
    kept = [name for name, module in student.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    assert kept == ["second", "third", "fourth"]


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_one_that_stays_is_exported(toolkit, tmp_path):
    network = _network()
    network.insert(2, _norm(8))
    student = qakd.prepare(network, [X], toolkit)
    assert qakd.export_onnx(student, X, tmp_path / "net.onnx", target="onnxruntime").parity.toolkit_deviation < 1e-4


def test_one_that_does_not_tell_its_eps_is_folded_by_what_it_computes():
    class DetrFrozenBatchNorm2d(FrozenBatchNorm2d):
        def forward(self, x):  # the eps of its own is 1e-2, whatever its attribute says
            self.eps, told = 1e-2, self.eps
            x = super().forward(x)
            self.eps = told
            return x

    network = _network()
    network[1].__class__ = DetrFrozenBatchNorm2d
    student = qakd.prepare(network, [X])
    qakd.toolkits.adapter_for(student).set_fake_quant(student, False)
    with torch.no_grad():
        torch.testing.assert_close(student(X), network(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_what_modelopt_saved_comes_back_into_the_float_model(bias, tmp_path):
    import modelopt.torch.opt as mto

    network = _network(bias)
    student = qakd.prepare(network, [X])
    mto.save(student, tmp_path / "student.pth")
    restored = qakd.restore_modelopt(_network(bias), tmp_path / "student.pth")
    with torch.no_grad():
        assert torch.equal(student(X), restored(X))


@pytest.mark.parametrize("toolkit", ["torch_ao", "torch_ao_eager", "pt2e", "modelopt"])
def test_a_batch_norm_after_a_linear_layer_leaves_none_in_the_file(toolkit, tmp_path):
    torch.manual_seed(0)
    hidden = nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()
    net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 5))
    images = torch.rand(32, 3, 8, 8)
    for _ in range(20):
        net(images)
    net.eval()
    student = qakd.prepare(net, [images], toolkit)
    assert (student(images) - net(images)).abs().max() < 0.03 * net(images).abs().max()
    qakd.distill(student, net, [images[:16], images[16:]], epochs=1)
    exported = qakd.export_onnx(student, images, tmp_path / "mlp.onnx", target="onnxruntime")
    assert census(exported).integer == 3
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(exported.path).graph.node}
