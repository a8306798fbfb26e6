"""Weights of few bits: small files, the same numbers, the same kernels."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from qakd_plugin import DoReFa, EngineError, ExportError, export_onnx, prepare, use_quantizers
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.canonical.graph import stored_codes, weight_dequantizers
from qakd_plugin.deploy.diagnosis import diagnose
from qakd_plugin.deploy.engine.precheck import inspect_onnx
from qakd_plugin.deploy.targets.weight_packing import _grid, store_weights
from qakd_plugin.runtimes.openvino import OpenVINORunner


def _run(path, images, *, optimize):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options).run(None, {"input": images.numpy()})[0]


def _types(path):
    return {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in onnx.load(path).graph.initializer}


class Wide(nn.Sequential):
    """Layers large enough for their weights to be most of the file."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 3, 2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


@pytest.fixture(scope="module")
def wide(digits):
    torch.manual_seed(0)
    model, images = Wide().train(), digits.train[0][:64]
    with torch.no_grad():
        for _ in range(8):
            model(images)
    return model.eval(), images


@pytest.mark.parametrize(("bits", "storage"), [(4, "int4"), (3, "int4"), (2, "int4"), (2, "int2")])
def test_packed_weights_give_the_same_bits_and_run_on_the_same_kernels(bits, storage, tmp_path, wide):
    model, images = wide
    student = prepare(model, [images], "modelopt", weight_bits=bits, activation_bits=bits)
    plain, packed = (
        export_onnx(student, images, tmp_path / f"{name}.onnx", target="onnxruntime", weight_storage=name).path
        for name in ("int8", storage)
    )
    assert storage.upper() in _types(packed)
    for optimize in (False, True):
        np.testing.assert_array_equal(_run(plain, images, optimize=optimize), _run(packed, images, optimize=optimize))
    assert census(packed) == census(plain)
    assert census(packed).float_layers == ()
    assert "packed weights" not in {finding.kind for finding in diagnose(packed, census(packed).float_layers)}
    widths = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1) / packed.stat().st_size
    assert widths > {"int4": 1.6, "int2": 2.7}[storage]  # weights per byte, biases, scales and the graph counted in


@pytest.mark.parametrize("bits", [4, 2])
def test_openvino_gets_the_same_numbers_from_packed_weights(bits, tmp_path, wide):
    model, images = wide
    student = prepare(model, [images], "modelopt", weight_bits=bits, activation_bits=bits)
    plain, packed = (
        export_onnx(student, images, tmp_path / f"{name}.onnx", target="openvino", weight_storage=name).path
        for name in ("int8", "int4")
    )
    assert packed.stat().st_size < 0.7 * plain.stat().st_size
    results = [OpenVINORunner(path, 1).run({"input": images.numpy()})["logits"] for path in (plain, packed)]
    np.testing.assert_array_equal(*results)


def test_tensorrt_refuses_packed_weights_by_name(tmp_path, wide):
    model, images = wide
    student = prepare(model, [images], "modelopt", weight_bits=4, activation_bits=8)
    path = export_onnx(student, images, tmp_path / "s.onnx", target="tensorrt").path
    model = ir.load(path)
    store_weights(model, "int4")
    ir.save(model, path)
    with pytest.raises(EngineError, match=r"^3\.weight/DequantizeLinear: weights stored in front of a Cast"):
        inspect_onnx(path)


def test_codes_times_different_powers_of_two_are_packed_per_channel(tmp_path, wide):
    model, images = wide
    student = prepare(model, [images], "modelopt", weight_bits=4, activation_bits=4)
    # A large bias leaves this channel no room for wider codes, so its power is another than its neighbours'.
    student.get_submodule("9").bias.data[3] = 3e4
    plain, packed = (
        export_onnx(student, images, tmp_path / f"{name}.onnx", target="onnxruntime", weight_storage=name).path
        for name in ("int8", "int4")
    )
    model = ir.load(packed)
    powers = [value.const_value.numpy() for name, value in model.graph.initializers.items() if name.endswith(".power")]
    assert any(power.size > 1 for power in powers)
    expected = {node.name: stored_codes(node) for node in weight_dequantizers(ir.load(plain).graph)}
    for node in weight_dequantizers(model.graph):
        np.testing.assert_array_equal(stored_codes(node), expected[node.name])
    np.testing.assert_array_equal(_run(plain, images, optimize=True), _run(packed, images, optimize=True))


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_a_grid_gives_every_code_back_and_is_found_where_there_is_one(seed, odd):
    random = np.random.default_rng(seed)
    small = random.integers(-8, 8, (5, 4, 3))
    small[:, 0, 0] = 1  # an odd code in every channel, so that the power is the one drawn
    powers = 2 ** random.integers(0, 3, (5, 1, 1))
    codes = (powers * (2 * small + 1 if odd else small)).astype(np.int8)
    factor, offset = _grid(codes, 0, -8, 7)
    found = (codes - offset) // factor
    assert found.min() >= -8
    assert found.max() <= 7
    np.testing.assert_array_equal(found * factor + offset, codes)
    codes[0, 0, :2] = (127, -64)
    assert _grid(codes, 0, -8, 7) is None


def test_weights_on_a_grid_without_zero_are_packed_too(tmp_path, wide):
    model, images = wide
    student = prepare(model, [images], "modelopt", weight_bits=4, activation_bits=4)
    use_quantizers(student, DoReFa(), keep=("0", "13"))
    plain, packed = (
        export_onnx(student, images, tmp_path / f"{name}.onnx", target="onnxruntime", weight_storage=name).path
        for name in ("int8", "int4")
    )
    assert packed.stat().st_size < 0.7 * plain.stat().st_size
    assert census(packed).float_layers == ()
    for optimize in (False, True):
        np.testing.assert_array_equal(_run(plain, images, optimize=optimize), _run(packed, images, optimize=optimize))


@pytest.mark.parametrize(
    ("target", "storage", "message"),
    [
        ("openvino", "int2", "openvino does not load 2-bit weights"),
        ("tensorrt", "int2", "tensorrt does not load 2-bit weights"),
        ("onnxruntime", "int1", "weight_storage='int1' is unknown"),
    ],
)
def test_a_storage_that_the_target_does_not_read_is_refused(target, storage, message, tmp_path, wide):
    model, images = wide
    student = prepare(model, [images], "modelopt", weight_bits=2, activation_bits=8)
    with pytest.raises(ExportError, match=message):
        export_onnx(student, images, tmp_path / "s.onnx", target=target, weight_storage=storage)
    assert not (tmp_path / "s.onnx").exists()
