"""torchao's QATConfig: weights of linear layers, per channel or in groups, trained and exported as they are."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from agreement import run_openvino_as_written
from torch import nn

from qakd_plugin import (
    EWGS,
    LSQ,
    SQAKD,
    NotPreparedError,
    QakdError,
    UnsupportedQuantizerError,
    describe,
    distill,
    export_onnx,
    prepare,
    restore_quantizers,
    use_quantizers,
)
from qakd_plugin.deploy.engine.build import build_engine
from qakd_plugin.toolkits import adapter_for

torchao = pytest.importorskip("torchao.quantization")
qat = pytest.importorskip("torchao.quantization.qat")
GROUPS = {"dtype": torch.int4, "group_size": 32, "is_symmetric": True}
ROWS = {"dtype": torch.int4, "granularity": "per_channel", "is_symmetric": True}


def _quantize(model, activation=None, **weight):
    model = copy.deepcopy(model)
    config = qat.QATConfig(
        activation_config=activation, weight_config=qat.IntxFakeQuantizeConfig(**weight) if weight else None, step="prepare"
    )
    torchao.quantize_(model, config)
    return model.eval()


class _Net(nn.Module):
    """A small convolution in floating point in front of linear layers, for digits."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, stride=4, padding=1), nn.ReLU(), nn.Flatten())
        self.hidden, self.middle, self.head = nn.Linear(256, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.hidden(self.features(x))))))


@pytest.fixture(scope="module")
def mlp(digits):
    """Trained far enough for its predictions to mean something."""
    torch.manual_seed(0)
    model = _Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for x, y in digits.loader("train", shuffle=True):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def _codes(path):
    """(codes, data type) of every stored weight, by layer."""
    tensors = [tensor for tensor in onnx.load(path).graph.initializer if ".codes" in tensor.name]
    return {t.name.partition(".")[0]: (onnx.numpy_helper.to_array(t).astype(np.int32), t.data_type) for t in tensors}


def _expected_codes(layer, group):
    """What torchao's forward pass makes of the weight, in steps: the largest magnitude of a group is 7.5 of them."""
    weight = layer.weight.detach()
    step = weight.reshape(len(weight), -1, group).abs().amax(2) / 7.5
    with torch.no_grad():
        codes = layer.weight_fake_quantizer(weight) / step.repeat_interleave(group, 1)
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    return codes.round().int().numpy()


def _check(student, images, folder):
    with torch.no_grad():
        expected = student(images).numpy()
    for target in ("tensorrt", "onnxruntime", "openvino"):
        proof = export_onnx(student, images, folder / f"{target}.onnx", target=target).parity
        assert max(proof.runtime_deviation, proof.toolkit_deviation) < 1e-5
        assert proof.unfused.max_deviation < 1e-5  # no activation is quantized, so there are no ties
        assert proof.fused is None or proof.fused.max_deviation < 1e-5
    (result,) = run_openvino_as_written(folder / "openvino.onnx", images)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    return folder / "tensorrt.onnx"


@pytest.mark.parametrize("config", [GROUPS, ROWS])
def test_a_distilled_student_is_exported_exactly(config, tmp_path, mlp, digits):
    student = _quantize(mlp, **config)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    distill(student, mlp, digits.loader("train", labels=False, shuffle=True), method=SQAKD(), epochs=2, seed=0)
    assert all((before[f"{name}.weight"] != student.get_submodule(name).weight).any() for name in ("hidden", "middle", "head"))
    path = _check(student, digits.test[0], tmp_path)
    for name, (codes, kind) in _codes(path).items():
        layer = student.get_submodule(name)
        assert kind == onnx.TensorProto.INT4
        np.testing.assert_array_equal(codes, _expected_codes(layer, config.get("group_size", layer.in_features)))
    assert len(_codes(path)) == 3


def test_the_engine_is_built_from_four_bits(tmp_path, mlp, digits):
    pytest.importorskip("tensorrt_rtx_bindings")
    path = export_onnx(_quantize(mlp, **GROUPS), digits.test[0][:16], tmp_path / "s.onnx").path
    manifest = build_engine(path, tmp_path / "s.engine", "tensorrt_rtx", capabilities=["SM86"]).manifest
    assert manifest["int4_weights"] == manifest["matmuls"]["total"] == 3


def test_scales_left_behind_by_the_last_forward_pass_are_not_used(tmp_path, mlp, digits):
    student, images = _quantize(mlp, **GROUPS), digits.test[0][:32]
    student(images)
    with torch.no_grad():
        student.hidden.weight.mul_(1.7)
    stale = student.hidden.weight_fake_quantizer.scale.clone()
    adapter = adapter_for(student)
    (quantizer,) = [q for q in adapter.quantizers(student) if q.fqn.startswith("hidden")]
    torch.testing.assert_close(adapter.qparams(quantizer).scale, 1.7 * stale)
    assert torch.equal(student.hidden.weight_fake_quantizer.scale, stale), "asking must not change the model"
    path = export_onnx(student, images, tmp_path / "s.onnx").path
    np.testing.assert_array_equal(_codes(path)["hidden"][0], _expected_codes(student.hidden, 32))


def test_learned_ranges_are_trained_and_exported_exactly(tmp_path, mlp, digits, batches):
    student = _quantize(mlp, **GROUPS, is_dynamic=False, range_learning=True)
    with pytest.raises(NotPreparedError, match=r"hidden\.weight_fake_quantizer .*initialize_fake_quantizers"):
        export_onnx(student, digits.test[0][:4], tmp_path / "s.onnx")
    qat.initialize_fake_quantizers(student, (digits.test[0][:4],))
    before = student.hidden.weight_fake_quantizer.scale.detach().clone()
    distill(student, mlp, batches, method=SQAKD(), epochs=2, seed=0, quantizer_lr=1e-4)
    learned = student.hidden.weight_fake_quantizer.scale
    assert not torch.equal(learned, before)
    path = _check(student, digits.test[0], tmp_path)
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name.endswith(".scale")}
    np.testing.assert_array_equal(scales["hidden.weight.scale"], learned.detach().numpy())


def test_with_fake_quant_off_the_student_is_the_teacher(mlp, digits):
    student, images = _quantize(mlp, **GROUPS), digits.test[0][:32]
    student.middle.weight_fake_quantizer.enabled = False
    adapter = adapter_for(student)
    assert [q.fqn for q in adapter.quantizers(student)] == ["hidden.weight_fake_quantizer", "head.weight_fake_quantizer"]
    adapter.set_fake_quant(student, False)
    assert len(adapter.quantizers(student)) == 2, "what is only paused is not lost"
    with torch.no_grad():
        torch.testing.assert_close(student(images), mlp(images))
        adapter.set_fake_quant(student, True)
        assert (student(images) - mlp(images)).abs().max() > 1e-2
    assert len(adapter.quantizers(student)) == 2, "a quantizer that was off stays off"


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_prepare_quantizes_the_weights_of_linear_layers(bits, tmp_path, mlp, digits, caplog):
    with caplog.at_level(logging.WARNING):
        student = prepare(mlp, [digits.train[0][:8]], "torchao", weight_bits=bits, keep=["hidden"])
    assert "activations stay in floating point" in caplog.text
    description = describe(student)
    assert description.toolkit == "torchao"
    assert {q.name: q.bits for q in description.quantizers} == {
        "middle.weight_fake_quantizer": bits,
        "head.weight_fake_quantizer": 8,  # the last layer
    }
    assert not any(q.problems for q in description.quantizers)
    assert not hasattr(mlp.middle, "weight_fake_quantizer"), "the float model is not changed"
    kinds = {name: kind for name, (_, kind) in _codes(_check(student, digits.test[0][:64], tmp_path)).items()}
    assert kinds == {"middle": onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4, "head": onnx.TensorProto.INT8}


def test_prepare_without_a_linear_layer_says_what_to_use(digits):
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(QakdError, match=r"no linear layer .* toolkit='modelopt' or 'torch_ao' for convolutions"):
        prepare(model, [digits.train[0][:8]], "torchao")


def test_dynamic_activations_can_be_trained_but_not_exported(tmp_path, mlp, digits, caplog):
    activation = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    student = _quantize(mlp, activation, **GROUPS)
    rows = {row.name: row for row in describe(student).quantizers}
    assert "no target has a form" in rows["hidden.activation_fake_quantizer"].problems["tensorrt"]
    assert rows["hidden.weight_fake_quantizer"].bits == 4
    with caplog.at_level(logging.WARNING):
        distill(student, mlp, [digits.train[0][:32]], method=SQAKD(), epochs=1, seed=0)
    assert "It can be trained with, but not exported." in caplog.text
    with pytest.raises(UnsupportedQuantizerError, match=r"hidden\.activation_fake_quantizer: .*toolkit='modelopt'"):
        export_onnx(student, digits.test[0][:4], tmp_path / "s.onnx")


def _int4_weight_only():
    config = torchao.Int4WeightOnlyConfig(group_size=32)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    torchao.quantize_(model, qat.QATConfig(config, step="prepare"))
    return model


def _asymmetric():
    return _quantize(nn.Sequential(nn.Linear(64, 32)), dtype=torch.int4, group_size=32, is_symmetric=False)


def _float8():
    model = nn.Sequential(nn.Linear(64, 32))
    torchao.quantize_(model, qat.QATConfig(weight_config=qat.Float8FakeQuantizeConfig(), step="prepare"))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_int4_weight_only, r"^0: Int4WeightFakeQuantizer has no form .*IntxFakeQuantizeConfig\(torch\.int4"),
        (_asymmetric, r"^0: its weight is mapped asymmetrically"),
        (_float8, r"^0: Float8FakeQuantizer has no form with integer codes"),
    ],
)
def test_what_has_no_form_is_refused_by_name(make, message, tmp_path):
    with pytest.raises(UnsupportedQuantizerError, match=message):
        export_onnx(make(), torch.randn(4, 64), tmp_path / "s.onnx")


def test_a_scale_that_training_made_negative_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    student = _quantize(model, **GROUPS, is_dynamic=False, range_learning=True)
    qat.initialize_fake_quantizers(student, (torch.randn(4, 64),))
    with torch.no_grad():
        student[2].weight_fake_quantizer.scale[3, 0] = -0.1
    with pytest.raises(QakdError, match=r"^2: the weight scale must be finite and positive"):
        export_onnx(student, torch.randn(4, 64), tmp_path / "s.onnx")


def test_a_shared_layer_is_exported_under_all_its_names(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second, self.head = nn.Identity(), nn.Linear(64, 10)

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    student = _quantize(Twice(), **GROUPS)
    student.second = student.first
    assert export_onnx(student, torch.randn(16, 64), tmp_path / "s.onnx").parity.runtime_deviation < 1e-6


@pytest.mark.parametrize(
    "config", [EWGS(per_channel=False), LSQ(per_channel=False), LSQ()], ids=["EWGS", "LSQ", "LSQ-channels"]
)
def test_torchaos_own_quantizers_compute_what_was_learned(config):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 8)
    student = use_quantizers(prepare(model, [x], "torchao"), config)
    learned = student(x)
    torch.testing.assert_close(restore_quantizers(student)(x), learned)


def test_torchao_is_not_imported_for_other_models() -> None:
    code = """
import sys, torch
from qakd_plugin.toolkits import TOOLKITS, adapter_named
assert not any(adapter_named(name).detect(torch.nn.Linear(2, 2)) for name in TOOLKITS)
assert "torchao" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
