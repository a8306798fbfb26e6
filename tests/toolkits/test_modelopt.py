"""What ModelOpt can do and no export form has is refused by name, before the training and at the export."""

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from onnx import TensorProto, numpy_helper
from torch import nn

from qakd_plugin import KD, UnsupportedQuantizerError, describe, distill, export_onnx, prepare, use_quantizers
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


def test_what_a_sparsity_mask_leaves_out_stays_zero_in_training_and_in_the_file(tmp_path):
    mts = pytest.importorskip("modelopt.torch.sparsity")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 8)).eval()
    images = torch.randn(8, 4, 8, 8)
    sparse = mts.sparsify(network, "sparse_magnitude")
    mask = sparse[2].weight == 0
    assert float(mask.float().mean()) == 0.5
    student = prepare(sparse, [images])
    distill(student, network, [images], epochs=2, lr=1e-3, seed=0)
    file = export_onnx(student, images, tmp_path / "sparse.onnx")
    assert file.parity.toolkit_deviation < 1e-6
    codes = {
        tuple(x.dims): numpy_helper.to_array(x) for x in onnx.load(file).graph.initializer if x.data_type == TensorProto.INT8
    }
    assert not codes[16, 16, 3, 3][mask.numpy()].any()
    assert codes[16, 16, 3, 3][~mask.numpy()].any()
