"""Weights in blocks and in 4 bits: what is stored is what was trained, and every target takes it."""

from __future__ import annotations

import contextlib
import io
import itertools

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from agreement import run_openvino_as_written
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from qakd_plugin import ParityError, UnsupportedQuantizerError, describe, export_onnx
from qakd_plugin.deploy.canonical.write import export_canonical
from qakd_plugin.deploy.engine.build import build_engine
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.export_form.modules import StoredWeight
from qakd_plugin.toolkits import adapter_for

mtq = pytest.importorskip("modelopt.torch.quantization")
OFF = {"quantizer_name": "*", "enable": False}
TARGETS = ["tensorrt", "onnxruntime", "openvino"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _blocks(size, bits=4):
    return {"num_bits": bits, "block_sizes": {-1: size, "type": "static"}}


def _weights(name, **config):
    return {"quantizer_name": f"{name}weight_quantizer", "cfg": config, "enable": True}


def _inputs(name):
    return {"quantizer_name": f"{name}input_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True}


def _quantize(model, x, *entries):
    with contextlib.redirect_stdout(io.StringIO()):
        return mtq.quantize(model.eval(), {"quant_cfg": [OFF, *entries], "algorithm": "max"}, lambda m: m(x))


def _mlp(*sizes):
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Tokens(nn.Module):
    """Linear layers on (N, 5, C), which the exporter writes as Transpose and MatMul."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(64, 48),
            nn.LayerNorm(48),
            nn.Linear(48, 32),
            nn.Linear(32, 10),
        )

    def forward(self, x):
        return self.head(torch.relu(self.second(self.norm(self.first(x)))).mean(1))


class _Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.conv4 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.flatten = nn.MaxPool2d(2), nn.Flatten()
        self.blocks, self.rows, self.both, self.plain = (
            nn.Linear(128, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.flatten(torch.relu(self.conv4(self.pool(torch.relu(self.norm(self.conv(x)))))))
        for layer in (self.blocks, self.rows, self.both, self.plain):
            x = torch.relu(layer(x))
        return self.head(x)


def _stored(path):
    """Codes of every weight of a file, by the name of its initializer, and the data types."""
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    return {name: (onnx.numpy_helper.to_array(t), t.data_type) for name, t in tensors.items() if "codes" in name}


def _reads_zero_point(path):
    return any(
        len(node.input) > 2 for node in onnx.load(path).graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}
    )


def _check_everywhere(student, x, folder, *, fused=1e-6):
    """Export for every target, run each with its runtime, and return the canonical file.

    ``fused`` is what integer kernels may deviate by: they may round ties of activations the other way.
    """
    with torch.no_grad():
        expected = student(x).numpy()
    for target in TARGETS:
        proof = export_onnx(student, x, folder / f"{target}.onnx", target=target).parity
        assert proof.runtime_deviation < 1e-6
        assert proof.toolkit_deviation < 1e-6
        assert proof.fused is None or proof.fused.max_deviation < fused
    (result,) = run_openvino_as_written(folder / "openvino.onnx", x)
    np.testing.assert_allclose(result, expected, rtol=0, atol=max(1e-5, fused) * np.ptp(expected))
    return folder / "tensorrt.onnx"


@pytest.mark.parametrize(("inputs", "block"), [(64, 16), (64, 32), (128, 64), (256, 128), (100, 32), (100, 128)])
def test_blocks_are_stored_as_trained_in_four_bits(inputs, block, tmp_path):
    """100 inputs are no multiple of a block: ModelOpt fills the last one up with zeros, and one block of 128 covers a row."""
    x = torch.randn(64, inputs)
    model = _mlp(inputs, 96, 10)
    student = _quantize(model, x, _weights("*", **_blocks(block)))
    path = _check_everywhere(student, x, tmp_path)
    stored, layer = _stored(path), student[0]
    assert {kind for _, kind in stored.values()} == {onnx.TensorProto.INT4}
    codes = next(array for name, (array, _) in stored.items() if name.startswith("0."))
    columns = -(-inputs // block) * block if inputs > block else inputs
    assert codes.shape == (96, columns)
    amax = layer.weight_quantizer.amax.reshape(96, -1)
    step = (amax / 7).repeat_interleave(block, 1)[:, :inputs]
    np.testing.assert_array_equal(codes.astype(np.int32)[:, :inputs], (layer.weight / step).round().clamp(-8, 7).int().numpy())
    assert not codes.astype(np.int32)[:, inputs:].any()


def test_the_engine_keeps_the_weights_in_four_bits(tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    x = torch.randn(16, 100)
    path = export_onnx(_quantize(_mlp(100, 96, 10), x, _weights("*", **_blocks(32))), x, tmp_path / "s.onnx").path
    manifest = build_engine(path, tmp_path / "s.engine", "tensorrt_rtx", capabilities=["SM86"]).manifest
    assert manifest["int4_weights"] == manifest["matmuls"]["total"] == 2


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (_blocks(16), _blocks(16)),
        ({"num_bits": 4, "axis": 0}, {"num_bits": 4, "axis": 0}),
        ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": 0}),
        ({"num_bits": 8, "axis": 0}, _blocks(16)),
    ],
)
def test_linear_layers_on_tokens_are_exact_with_fusions_on(first, others, tmp_path):
    """In a session of the user's own, with default options. MatMulNBits rounds activations to 8 bits at accuracy level 4."""
    x = torch.randn(8, 5, 64)
    student = _quantize(_Tokens(), x, _weights("*", **others), _weights("first.", **first))
    _check_everywhere(student, x, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "onnxruntime.onnx", options, providers=["CPUExecutionProvider"])
    expected = student(x).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], expected, rtol=0, atol=1e-6 * np.ptp(expected))
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    levels = [a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [1] * [first["num_bits"], others["num_bits"], others["num_bits"]].count(4)
    assert "DequantizeLinear" not in {node.op_type for node in nodes}, "it would be computed in every call"


def test_mixed_precision_stores_each_layer_as_its_runtime_needs_it(tmp_path):
    x = torch.randn(32, 1, 8, 8)
    student = _quantize(
        _Mixed(),
        x,
        *(_weights(f"{name}.", num_bits=8, axis=0) for name in ("conv", "head")),
        *(_weights(f"{name}.", num_bits=4, axis=0) for name in ("conv4", "rows", "both")),
        _weights("blocks.", **_blocks(32)),
        *(_inputs(f"{name}.") for name in ("conv", "conv4", "both", "head")),
    )
    path = _check_everywhere(student, x, tmp_path, fused=1e-2)
    kinds = {name.partition(".")[0]: kind for name, (_, kind) in _stored(path).items()}
    int4 = {name for name, kind in kinds.items() if kind == onnx.TensorProto.INT4}
    assert int4 == {"blocks", "rows", "both"}
    assert kinds.keys() - int4 == {"conv", "conv4", "head"}
    model = onnx.load(path)
    assert model.opset_import[0].version == 21
    # ONNX Runtime rejects an int8 pair with a zero point in front of MaxPool in this opset.
    assert not _reads_zero_point(path)
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    assert all([a.i for a in node.attribute if a.name == "output_dtype"] == [onnx.TensorProto.INT8] for node in quantizers)
    pytest.importorskip("tensorrt_rtx_bindings")
    manifest = build_engine(path, tmp_path / "s.engine", "tensorrt_rtx", capabilities=["SM86"]).manifest
    assert manifest["convolutions"] == {"total": 2, "int8": 2}
    assert manifest["int4_weights"] == manifest["int4_layers"] == 3
    assert manifest["matmuls"] == {"total": 5, "int8": 2}


def test_without_blocks_and_four_bits_the_opset_stays(tmp_path):
    x = torch.randn(16, 64)
    student = _quantize(_mlp(64, 32, 10), x, _weights("*", num_bits=8, axis=0), _inputs("*"))
    model = onnx.load(export_onnx(student, x, tmp_path / "s.onnx").path)
    assert model.opset_import[0].version == 20
    assert onnx.TensorProto.INT4 not in {tensor.data_type for tensor in model.graph.initializer}


def test_blocks_beside_quantized_activations_are_exact_where_a_target_takes_them(tmp_path):
    x = torch.randn(16, 64)
    student = _quantize(_mlp(64, 96, 10), x, _weights("*", **_blocks(32)), _inputs("*"))
    with pytest.raises(UnsupportedQuantizerError, match=r"0\.weight: weights with \d scales .* beside quantized activations"):
        export_onnx(student, x, tmp_path / "s.onnx", target="tensorrt")
    for target in ("onnxruntime", "openvino"):
        assert export_onnx(student, x, tmp_path / "s.onnx", target=target).parity.runtime_deviation < 1e-6


@pytest.mark.skipif(not hasattr(TensorQuantizer, "enable_lsq"), reason="this ModelOpt learns no ranges")
def test_ranges_that_modelopt_learned_are_read(tmp_path):
    x = torch.randn(16, 64)
    student = _quantize(_mlp(64, 96, 10), x, _weights("*", **_blocks(32)))
    for layer in (student[0], student[2]):
        layer.weight_quantizer.enable_lsq(learnable_amax="post", tied_amax=False)
        with torch.no_grad():
            layer.weight_quantizer._amax_post.mul_(torch.rand_like(layer.weight_quantizer._amax_post) + 0.5)
    assert export_onnx(student, x, tmp_path / "s.onnx").parity.toolkit_deviation < 1e-6


@pytest.mark.parametrize("config", ["INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG"])
def test_factors_on_the_input_are_exported(config, tmp_path):
    x = torch.randn(64, 128) * torch.linspace(0.1, 8, 128)
    with contextlib.redirect_stdout(io.StringIO()):
        student = mtq.quantize(_mlp(128, 256, 10).eval(), getattr(mtq, config), lambda model: model(x))
    assert student[0].input_quantizer.pre_quant_scale.max() > 1.1 * student[0].input_quantizer.pre_quant_scale.min()
    _check_everywhere(student, x, tmp_path, fused=1e-6 if "INT4" in config else 1e-2)


def _exported(x):
    student = _quantize(_mlp(64, 96, 10), x, _weights("*", **_blocks(32)))
    form = adapter_for(student).export_form(student)
    return student, form, export_canonical(form, x)


def _input(file, layer, index):
    (node,) = [node for node in file.graph if node.metadata_props.get("qakd.weight") == f"{layer}.weight"]
    return node.inputs[index]


def test_a_wrong_four_bit_code_is_named(tmp_path):
    x = torch.randn(16, 64)
    student, form, file = _exported(x)
    value = _input(file, "2", 0)
    codes = value.const_value.numpy().astype(np.int8)
    codes[7, 40] += 1 if codes[7, 40] < 7 else -1
    value.const_value = ir.tensor(codes.astype(ml_dtypes.int4))
    with pytest.raises(ParityError, match=r"^2: integer weight codes differ, first in output channel 7"):
        check_parity(file, form, student, x, fused=False)


def test_a_wrong_scale_of_one_block_is_named(tmp_path):
    x = torch.randn(16, 64)
    student, form, file = _exported(x)
    value = _input(file, "0", 1)
    scale = value.const_value.numpy().copy()
    scale[3, 1] *= 1.0001  # too little for the logits to show it
    value.const_value = ir.tensor(scale)
    with pytest.raises(ParityError, match=r"^0: the scales of its blocks differ"):
        check_parity(file, form, student, x, fused=False)


def test_a_block_of_zeros_has_zero_codes(tmp_path):
    model, x = _mlp(64, 96, 10), torch.randn(16, 64)
    with torch.no_grad():
        model[0].weight[5, 32:] = 0
    student = _quantize(model, x, _weights("*", **_blocks(32)))
    form = adapter_for(student).export_form(student)
    codes = {name: module.codes for name, module in form.named_modules() if isinstance(module, StoredWeight)}
    assert not codes["0.weight"][5, 32:].any()
    assert export_onnx(student, x, tmp_path / "s.onnx").parity.runtime_deviation < 1e-6


def test_blocks_of_a_convolution_are_named(tmp_path):
    x = torch.randn(4, 1, 8, 8)
    student = _quantize(_Mixed(), x, _weights("*", **_blocks(32)))
    with pytest.raises(UnsupportedQuantizerError, match=r"conv\.weight_quantizer: .*Use one scale per channel here \(axis=0\)"):
        export_onnx(student, x, tmp_path / "s.onnx")
    rows = {row.name: row for row in describe(student).quantizers}
    assert "no export form" in rows["conv.weight_quantizer"].problems["tensorrt"]
    assert not rows["blocks.weight_quantizer"].problems
    assert (rows["blocks.weight_quantizer"].axis, rows["blocks.weight_quantizer"].block) == (1, 32)
