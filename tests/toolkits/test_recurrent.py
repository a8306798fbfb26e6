"""Recurrent layers beside quantized ones: they stay in floating point, and are named."""

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import UnsupportedQuantizerError

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.rand(8, 1, 8, 12, generator=torch.Generator().manual_seed(0))


class Crnn(nn.Module):
    """(N, 1, 8, T) to five classes: a convolution, a recurrent layer, a linear one."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rnn, self.head = nn.Conv2d(1, 8, 3, padding=1), kind(64, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x).relu().flatten(1, 2).transpose(1, 2)
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_modelopt_leaves_them_alone_in_everything_that_follows(kind, tmp_path, caplog):
    network = Crnn(kind).eval()
    student = qakd.prepare(network, [X])
    assert "rnn: recurrent layers stay in floating point" in caplog.text
    assert type(student.rnn) is type(network.rnn) is kind
    assert {q.name.split(".")[0] for q in qakd.describe(student).quantizers} == {"conv", "head"}
    result = qakd.distill(student, network, [X], epochs=1, seed=0)
    mto.save(result.model, tmp_path / "student.pth")
    restored = qakd.restore_modelopt(Crnn(kind).eval(), tmp_path / "student.pth")
    with torch.no_grad():
        assert torch.equal(result.model(X), restored(X))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_those_that_modelopt_took_are_refused_by_name_and_the_advice_helps(kind):
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    student = mtq.quantize(Crnn(kind).eval(), mtq.INT8_DEFAULT_CFG, lambda network: network(X))
    with pytest.raises(UnsupportedQuantizerError, match=rf"^rnn: what ModelOpt makes of nn.{kind.__name__} .*mtq.unregister"):
        qakd.describe(student)
    taken = QuantModuleRegistry[kind]
    mtq.unregister(kind)
    try:
        student = mtq.quantize(Crnn(kind).eval(), mtq.INT8_DEFAULT_CFG, lambda network: network(X))
        assert qakd.describe(student).weight_quantizers == 2
    finally:
        QuantModuleRegistry.register({kind: f"nn.{kind.__name__}"})(taken.__mro__[1])
