"""Linear layers of ONNX Runtime's form that the runtime would leave in floating point, written so that it does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qakd_plugin import export_onnx, prepare
from qakd_plugin.bench.census import census


class _TwoLayers(nn.Module):
    """(N, 6, 8) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 5)


class _SquaredRelu(_TwoLayers):
    def forward(self, x):
        return self.head(self.second(F.relu(self.first(x)) ** 2).mean(1))


class _SineOfRelu6(_TwoLayers):
    def forward(self, x):
        return self.head(self.second(torch.sin(F.relu6(self.first(x)))).mean(1))


class _CalledTwice(_TwoLayers):
    def forward(self, x):
        return self.head(self.second(x[:, :2]).mean(1) + self.second(x[:, 2:]).mean(1) + self.first(x).mean(1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("network", "products"), [(_SquaredRelu, 3), (_SineOfRelu6, 3), (_CalledTwice, 4)])
def test_every_linear_layer_computes_in_integers_and_exactly(network, products, bits, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randn(8, 6, 8)
    file = export_onnx(prepare(network().eval(), [tokens], weight_bits=bits), tokens, tmp_path / "x.onnx", "onnxruntime")
    counted = census(file)
    assert (counted.integer, counted.total, counted.float_layers) == (products, products, ())
    assert file.parity.toolkit_deviation < 1e-5
