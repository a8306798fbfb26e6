"""Linear layers in 4 bits, from the toolkit's configuration to the constants of the plan."""

import contextlib
import io

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qakd_plugin import LSQ, UnsupportedQuantizerError, build_engine, export_onnx, prepare, use_quantizers
from qakd_plugin.demo.net import DigitNet

pytest.importorskip("tensorrt_rtx_bindings")


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(16, 5, 128)


@pytest.fixture
def perceptron(x):
    """Four linear layers on tokens, which the exporter writes as MatMul, and a head, which it writes as Gemm."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(128, 256),
                nn.GELU(),
                nn.Linear(256, 128),
                nn.ReLU(),
                nn.Linear(128, 128),
                nn.GELU(),
                nn.Linear(128, 128),
            )
            self.head = nn.Linear(128, 10)

        def forward(self, x):
            return self.head(self.body(x).mean(1))

    return Tokens().eval()


def quantize(model, x, config):
    with contextlib.redirect_stdout(io.StringIO()):
        return mtq.quantize(model, config, lambda network: network(x))


def engine(student, x, folder, **options):
    file = export_onnx(student, x, folder / "student.onnx", **options)
    return build_engine(file, folder / "student.engine", "tensorrt_rtx", capabilities=["SM86"]).manifest


@pytest.mark.parametrize("config", ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG"])
@pytest.mark.parametrize("float16", [False, True])
def test_modelopts_own_4_bit_configurations_are_int4_in_the_plan(config, float16, perceptron, x, tmp_path):
    manifest = engine(quantize(perceptron, x, getattr(mtq, config)), x, tmp_path, float16=float16)
    assert manifest["matmuls"] == {"total": 5, "int8": 0}
    assert manifest["int4_weights"] == manifest["int4_layers"] == 5
    kind = "half" if float16 else "float"
    assert {tuple(layer["inputs"]) for layer in manifest["layers"]} == {(kind, kind)}


@pytest.mark.parametrize("learned", [False, True])
def test_w4a8_computes_in_int8_from_weights_stored_in_int4(learned, perceptron, x, tmp_path):
    student = prepare(perceptron, [x], weight_bits=4, activation_bits=8)
    if learned:
        use_quantizers(student, LSQ())
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
        nn.functional.cross_entropy(student(x), torch.arange(16) % 10).backward()
        optimizer.step()
    manifest = engine(student, x, tmp_path)
    # The first and the last layer stay at 8 bits.
    assert manifest["matmuls"] == {"total": 5, "int8": 5}
    assert manifest["int4_weights"] == manifest["int4_layers"] == 3
    assert sorted(str(layer["stored"]) for layer in manifest["layers"]) == ["int4"] * 3 + ["int8"] * 2


def test_int4_and_int8_files_of_one_model_compute_the_same(perceptron, x, tmp_path):
    student = prepare(perceptron, [x], weight_bits=4, activation_bits=8)
    packed, whole = (
        export_onnx(student, x, tmp_path / f"{storage}.onnx", weight_storage=storage).path for storage in ("int4", "int8")
    )
    stored = [{tensor.data_type for tensor in onnx.load(path).graph.initializer} for path in (packed, whole)]
    assert [onnx.TensorProto.INT4 in types for types in stored] == [True, False]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    first, second = (onnxruntime.InferenceSession(path, options).run(None, {"input": x.numpy()})[0] for path in (packed, whole))
    np.testing.assert_array_equal(first, second)


def test_4_bit_convolutions_stay_in_an_int8_container(tmp_path, calibration):
    torch.manual_seed(0)
    student = prepare(DigitNet(width=4).eval(), calibration, weight_bits=4, activation_bits=8)
    manifest = engine(student, calibration[0], tmp_path)
    assert manifest["int4_weights"] == manifest["int4_layers"] == 0
    assert manifest["convolutions"]["int8"] == manifest["convolutions"]["total"] > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}, "enable": True},
                {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True},
            ],
            r"body\.0\.weight: weights with 4 scales along the summed dimension beside quantized activations",
        ),
        (
            [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "body.2.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {0: 32}}, "enable": True},
            ],
            r"body\.2\.weight_quantizer: block_sizes=.* has no export form",
        ),
    ],
)
def test_what_tensorrt_does_not_compute_is_refused_at_export(config, message, perceptron, x, tmp_path):
    student = quantize(perceptron, x, {"quant_cfg": config, "algorithm": "max"})
    with pytest.raises(UnsupportedQuantizerError, match=message):
        export_onnx(student, x, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_one_scale_for_all_4_bit_weights_keeps_the_int8_container(perceptron, x, tmp_path):
    """RTX fails to build it in 4 bits beside 8-bit activations."""
    config = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": None}, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True},
    ]
    manifest = engine(quantize(perceptron, x, {"quant_cfg": config, "algorithm": "max"}), x, tmp_path)
    assert manifest["int4_weights"] == 0
    assert manifest["matmuls"] == {"total": 5, "int8": 5}
