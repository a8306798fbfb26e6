"""What ModelOpt can do and no export form has is refused by name, before the training and at the export."""

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from qakd_plugin import KD, UnsupportedQuantizerError, describe, distill, export_onnx, use_quantizers
from qakd_plugin.quantizers import LSQ
from qakd_plugin.toolkits import adapter_for

ENABLED = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    {"quantizer_name": "*bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}},
]


class Products(nn.Module):
    """A product of two tensors within a module, as in attention."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def product(self, q, k):
        return q * k

    def forward(self, x):
        return self.product(self.query(x), self.key(x))


class QuantizedProducts(Products):
    def _setup(self):
        self.q_bmm_quantizer = TensorQuantizer()

    def product(self, q, k):
        return super().product(self.q_bmm_quantizer(q), k)


@pytest.fixture
def student():
    torch.manual_seed(0)
    mtq.register(original_cls=Products, quantized_cls=QuantizedProducts)
    try:
        model = mtq.quantize(
            nn.Sequential(nn.Linear(16, 8), nn.ReLU(), Products(), nn.Linear(8, 4)).eval(),
            {"quant_cfg": ENABLED, "algorithm": "max"},
            lambda network: network(torch.randn(64, 16)),
        )
        yield model
    finally:
        mtq.unregister(Products)


def test_a_quantizer_within_a_module_is_refused_by_name_before_training_and_at_the_export(student, tmp_path):
    teacher = nn.Linear(16, 4)
    with pytest.raises(UnsupportedQuantizerError, match=r"2\.q_bmm_quantizer.*Disable it"):
        distill(student, teacher, [torch.randn(8, 16)], method=KD(), epochs=1)
    with pytest.raises(UnsupportedQuantizerError, match=r"2\.q_bmm_quantizer"):
        export_onnx(student, torch.randn(8, 16), tmp_path / "s.onnx")
    with pytest.raises(UnsupportedQuantizerError, match=r"2\.q_bmm_quantizer"):
        adapter_for(student).export_form(student)
    with pytest.raises(UnsupportedQuantizerError, match=r"2\.q_bmm_quantizer"):
        use_quantizers(student, LSQ())
    (row,) = (row for row in describe(student).quantizers if row.name.endswith("q_bmm_quantizer"))
    assert all("no export form" in problem for problem in row.problems.values())
    mtq.set_quantizer_attribute(student, "*q_bmm_quantizer", {"enable": False})
    assert export_onnx(student, torch.randn(8, 16), tmp_path / "s.onnx").parity.runtime_deviation < 1e-5
