"""Weights that alone are quantized: every file computes what was trained, and none of its runtime's own rounding is hidden."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qakd_plugin as qakd
from qakd_plugin.deploy.canonical.write import export_canonical
from qakd_plugin.deploy.diagnosis import diagnose
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.deploy.targets.onnxruntime import to_onnxruntime_form
from qakd_plugin.errors import ParityError, UnsupportedQuantizerError
from qakd_plugin.runtimes.base import DYNAMIC_INT8
from qakd_plugin.toolkits import adapter_for

openvino = pytest.importorskip("openvino")
BLOCKS = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
IDS = torch.arange(28).reshape(4, 7) * 5 % 90


class Words(nn.Module):
    """A language model of one layer: token ids (N, T) -> logits (N, T, words)."""

    def __init__(self, width: int = 64, *, tied: bool = False) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(90, width), nn.Linear(width, width), nn.Linear(width, 90, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.layer(self.table(input_ids))))
        return logits


def quantized(model: nn.Module, weights: dict[str, object], algorithm: object = "max") -> nn.Module:
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        return mtq.quantize(model.eval(), {"quant_cfg": entries, "algorithm": algorithm}, lambda one: one(IDS))


def in_a_session_of_ones_own(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input_ids": IDS.numpy()})[0]


def in_openvino(path: Path) -> np.ndarray:
    compiled = openvino.Core().compile_model(
        path, "CPU", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return compiled(IDS.numpy())[0]


def check_everywhere(student: nn.Module, folder: Path) -> onnx.ModelProto:
    """All files compute what the student does, in each runtime as a user would call it; returns the one for ONNX Runtime."""
    with torch.no_grad():
        expected = student(IDS).numpy()
    for target, run in (("onnxruntime", in_a_session_of_ones_own), ("openvino", in_openvino), ("tensorrt", in_openvino)):
        path = qakd.export_onnx(student, {"input_ids": IDS}, folder / f"{target}.onnx", target).path
        np.testing.assert_allclose(run(path), expected, rtol=0, atol=1e-6 * np.ptp(expected), err_msg=target)
    return onnx.load(folder / "onnxruntime.onnx")


ROWS, BYTES, TENSOR = ({"num_bits": bits, "axis": axis} for bits, axis in ((4, 0), (8, 0), (4, None)))


@pytest.mark.parametrize(("weights", "tied"), [(BLOCKS, False), (BLOCKS, True), (ROWS, True), (BYTES, True), (TENSOR, True)])
def test_embeddings_and_output_layers_are_exact_in_sessions_with_default_options(weights, tied, tmp_path):
    torch.manual_seed(0)
    file = check_everywhere(quantized(Words(tied=tied), weights), tmp_path)
    kinds = [node.op_type for node in file.graph.node]
    assert "DequantizeLinear" not in kinds  # ONNX Runtime would compute it in every call
    assert kinds.count("MatMulNBits") == (2 if weights["num_bits"] == 4 else 0)
    assert kinds.count("GatherBlockQuantized") == (1 if weights["num_bits"] == 4 else 0)
    codes = 90 * 64 * weights["num_bits"] // 8
    held = sum(len(tensor.raw_data) for tensor in file.graph.initializer if len(tensor.raw_data) == codes)
    assert held == (1 if tied else 2) * codes


def _learned():
    student = quantized(Words(), BLOCKS)
    qakd.use_quantizers(student, qakd.LSQ())
    return student


def _torchao():
    student = Words(tied=True)
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True), step="prepare")
    quantize_(student, config, lambda module, _: isinstance(module, nn.Linear | nn.Embedding))
    return student.eval()


def _factors():
    return quantized(Words(), BLOCKS, {"method": "awq_lite", "alpha_step": 0.5})


@pytest.mark.parametrize("make", [_learned, _torchao, _factors])
def test_learned_scales_groups_of_torchao_and_awq_are_exact(make, tmp_path):
    torch.manual_seed(0)
    assert "MatMulNBits" in {node.op_type for node in check_everywhere(make(), tmp_path).graph.node}


def test_rows_that_no_block_divides_are_exact(tmp_path):
    """40 columns: no block that the runtime takes divides them. Linear layers fill the last one, embeddings are folded."""
    torch.manual_seed(0)
    file = check_everywhere(quantized(Words(40), {"num_bits": 4, "axis": 0}), tmp_path)
    assert [node.op_type for node in file.graph.node].count("MatMulNBits") == 2
    with pytest.raises(UnsupportedQuantizerError, match=r"^table\.weight_quantizer: blocks of 32 do not divide the 40 columns"):
        qakd.export_onnx(quantized(Words(40), BLOCKS), {"input_ids": IDS}, tmp_path / "s.onnx")


def _form():
    student = quantized(Words(), BLOCKS)
    form = adapter_for(student).export_form(student)
    return student, form, to_onnxruntime_form(export_canonical(form, {"input_ids": IDS}))


@pytest.mark.parametrize("layer", ["table", "layer"])
@pytest.mark.parametrize(
    ("what", "message"), [("code", "integer weight codes differ"), ("scale", "the scales of its blocks differ")]
)
def test_a_wrong_packed_code_or_scale_is_named(layer, what, message):
    student, form, file = _form()
    (node,) = [node for node in file.graph if node.metadata_props.get("qakd.weight") == f"{layer}.weight"]
    value = node.inputs[2] if what == "scale" else node.inputs[1 if node.op_type == "MatMulNBits" else 0]
    array = value.const_value.numpy().copy()
    if what == "code":
        array.flat[3] ^= 1
    else:
        array.flat[3] *= np.float32(1.0001)  # too little for the logits to show it
    value.const_value = ir.tensor(array)
    with pytest.raises(ParityError, match=rf"^{layer}: {message}"):
        check_parity(file, form, student, {"input_ids": IDS}, fused=True)


def test_rounded_activations_are_a_row_of_their_own_in_both_runtimes(tmp_path):
    torch.manual_seed(0)
    student, folder = quantized(Words(), BLOCKS), tmp_path
    files = [
        qakd.export_onnx(student, {"input_ids": IDS}, folder / f"{name}.onnx", name) for name in ("onnxruntime", "openvino")
    ]
    reference = student(IDS).detach().numpy()
    models = [qakd.Candidate(file.path, "PTQ", "words", "modelopt", 4, 32, runtime=file.target) for file in files]
    rows = qakd.benchmark(models, [{"input_ids": IDS}], ("onnxruntime", "openvino"), calls=5, reference=reference)
    found = {(row.runtime, row.precision): row.sqnr_db for row in rows}
    assert found.keys() == {
        (name, precision) for name in ("onnxruntime", "openvino") for precision in ("float32", DYNAMIC_INT8)
    }
    for name in ("onnxruntime", "openvino"):
        assert found[name, "float32"] > 100
    assert 20 < found["onnxruntime", DYNAMIC_INT8] < 60  # OpenVINO rounds where the processor makes it worth while


def test_a_file_that_rounds_by_itself_is_never_said_to_be_exact(tmp_path):
    student = quantized(Words(), BLOCKS)
    model = onnx.load(qakd.export_onnx(student, {"input_ids": IDS}, tmp_path / "s.onnx", "onnxruntime").path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4
    onnx.save(model, tmp_path / "level4.onnx")
    (row,) = qakd.benchmark([tmp_path / "level4.onnx"], [{"input_ids": IDS}], calls=5)
    assert (row.precision, row.weight_bits, row.activation_bits) == (DYNAMIC_INT8, 4, 32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_file_without_dequantizers_is_known_to_be_quantized(bits, tmp_path):
    path = qakd.export_onnx(
        quantized(Words(), {"num_bits": bits, "axis": 0}), {"input_ids": IDS}, tmp_path / "s.onnx", "onnxruntime"
    ).path
    model = onnx.load(path)
    del model.metadata_props[:]  # its record says it as well
    onnx.save(model, path)
    row = qakd.benchmark([path], [{"input_ids": IDS}], calls=5)[0]
    assert (row.weight_bits, row.activation_bits) == (bits, 32)
    row = qakd.benchmark([path], [{"input_ids": IDS}], ("openvino",), calls=5)[0]
    assert (row.precision, row.integer_layers, row.total_layers) == ("float32", 0, 2)
    (finding,) = diagnose(path)
    assert (finding.kind, finding.layers) == ("float input", ("layer", "head"))
