"""Each trouble is found in a graph that has it, by the layers' names, and is one: ONNX Runtime's own graph says so."""

import copy

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from qdq_graphs import INT4, UINT8, QdqGraph, residual_net
from torch import nn

from qakd_plugin import ExportError, export_float, export_onnx, prepare
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.diagnosis import NARROW, diagnose


def found(path, float_layers=()):
    return {finding.kind: finding.layers for finding in diagnose(path, float_layers)}


def _two_convolutions(path, between, channels=32, **second):
    """Two convolutions with unsigned codes; ``between(graph, x)`` returns the quantized input of the second."""
    graph = QdqGraph(("batch", 3, 16, 16))
    x = graph.conv(graph.quantize("input", "in", zero_point=128, dtype=UINT8), "first", (3, channels))
    x = graph.conv(between(graph, x), "second", (channels, channels), **second)
    return graph.save(path, graph.quantize(x, "out", zero_point=128, dtype=UINT8), rank=4)


def _unsigned(graph, x, name="mid", **numbers):
    return graph.quantize(x, name, dtype=UINT8, **numbers)


def test_nothing_is_found_in_a_file_for_onnxruntime_but_what_its_layers_are(tmp_path, make_student, digits):
    path = export_onnx(make_student(), digits.test[0][:8], tmp_path / "s.onnx", target="onnxruntime").path
    assert set(found(path, census(path).float_layers)) <= {"narrow"}


def test_a_file_for_tensorrt_is_told_to_be_slow_in_onnxruntime(tmp_path, make_student, digits):
    path = export_onnx(make_student(), digits.test[0][:8], tmp_path / "s.onnx").path
    counted = census(path)
    assert found(path)["signed codes"][:3] == ("stem.0", "stages.0.conv1", "stages.0.conv2")
    assert counted.float_layers  # it is slow there
    assert "float in the runtime" not in found(path, counted.float_layers)  # and every layer has its reason


def test_export_names_convolutions_that_a_coarse_bias_leaves_in_floating_point(tmp_path, caplog):
    torch.manual_seed(0)
    images = 1000 * torch.randn(8, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    path = export_onnx(prepare(network, [images]), images, tmp_path / "student.onnx", "onnxruntime").path
    assert found(path)["separate bias"] == ("0",)
    assert "1 of 2 quantized convolutions in floating point, because it would round their biases" in caplog.text
    assert "outputs: 0. Input" in caplog.text
    assert census(path).integer == 1


def test_export_names_transposed_convolutions_for_onnxruntime_alone(tmp_path, caplog):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    student = prepare(network, [images])
    export_onnx(student, images, tmp_path / "student.onnx", "tensorrt")
    assert "transposed" not in caplog.text
    export_onnx(student, images, tmp_path / "student.ort.onnx", "onnxruntime")
    assert "ONNX Runtime will compute 2 in floating point: it has no integer kernel for transposed" in caplog.text


def test_a_float_file_is_told_to_be_one(tmp_path, teacher, digits):
    path = export_float(teacher, digits.test[0][:8], tmp_path / "s.onnx")
    assert found(path) == {"not quantized": ()}


def test_a_convolution_that_feeds_an_add_without_a_quantizer(tmp_path):
    def residual(graph, x):
        shortcut = _unsigned(graph, x, "shortcut")
        y = graph.conv(shortcut, "branch", (32, 32))
        return _unsigned(graph, graph.add("Add", [y, shortcut], "sum"))

    path = _two_convolutions(tmp_path / "s.onnx", residual)
    assert found(path)["output not quantized"] == ("branch",)
    assert found(path)["add with one float input"] == ("sum",)
    assert census(path).float_layers == ("branch/Conv",)


class Residual(nn.Module):
    """A residual block, and a convolution at the end that nothing reads but the caller."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.last = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 32), (32, 32), (32, 16)))

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((x + self.branch(x)).relu())


@pytest.mark.parametrize("stock", [True, False])
def test_exporting_says_what_a_stock_configuration_leaves_in_floating_point(stock, tmp_path, caplog):
    torch.manual_seed(0)
    network, images = Residual().eval(), torch.rand(4, 3, 12, 12)
    if stock:
        mtq = pytest.importorskip("modelopt.torch.quantization")
        student = mtq.quantize(copy.deepcopy(network), mtq.INT8_DEFAULT_CFG, lambda model: model(images))
    else:
        student = prepare(network, [images])
    for target in ("onnxruntime", "openvino"):
        export_onnx(student, images, tmp_path / f"{target}.onnx", target=target)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("export: ONNX Runtime")]
    left = set(census(tmp_path / "onnxruntime.onnx").float_layers)
    assert left == ({"first/Conv", "branch/Conv", "last/Conv"} if stock else {"last/Conv"})
    assert len(said) == stock
    if stock:
        assert "2 of 3 quantized convolutions" in said[0]
        assert "output: first, branch. For ModelOpt mtq.quantize(model, qakd_plugin.configuration(model)" in said[0]


def test_a_clip_in_front_of_a_quantizer(tmp_path):
    def clip(graph, x):
        bounds = [graph.constant("low", np.float32(0)), graph.constant("high", np.float32(3))]
        return _unsigned(graph, graph.add("Clip", [x, *bounds], "clip"))

    path = _two_convolutions(tmp_path / "s.onnx", clip)
    assert found(path)["clamp before quantizer"] == ("first",)
    assert len(census(path).float_layers) == 1
    relu = _two_convolutions(tmp_path / "relu.onnx", lambda graph, x: _unsigned(graph, graph.add("Relu", [x], "relu")))
    assert "clamp before quantizer" not in found(relu)
    assert census(relu).float_layers == ()


def test_a_pool_with_another_scale_behind_it(tmp_path):
    def pool(second_scale):
        def make(graph, x):
            x = graph.add("MaxPool", [_unsigned(graph, x, "before")], "pool", kernel_shape=[2, 2], strides=[2, 2])
            return _unsigned(graph, x, "after", scale=second_scale)

        return make

    assert found(_two_convolutions(tmp_path / "tied.onnx", pool(0.05))) == {"narrow": ("first",)}
    assert found(_two_convolutions(tmp_path / "untied.onnx", pool(0.06)))["untied pool"] == ("pool",)


def test_layers_with_float_weights_and_float_inputs(tmp_path):
    graph = QdqGraph(("batch", 32))
    x = graph.gemm("input", "weight_only", (32, 32))
    x = graph.add("MatMul", [x, graph.constant("w", graph.random.normal(size=(32, 8)).astype(np.float32))], "plain/MatMul")
    layers = found(graph.save(tmp_path / "s.onnx", x))
    assert layers == {"float weights": ("plain",), "float input": ("weight_only",)}


def test_products_of_activations(tmp_path):
    graph = QdqGraph(("batch", 32, 32))
    x = graph.quantize("input", "in")
    x = graph.add("MatMul", [graph.matmul(x, "query", (32, 32)), graph.matmul(x, "key", (32, 32))], "scores/MatMul")
    assert found(graph.save(tmp_path / "s.onnx", x, rank=3)) == {
        "signed codes": ("query", "key"),
        "products of activations": ("scores",),
    }


def test_packed_weights_without_a_cast(tmp_path):
    graph = QdqGraph(("batch", 32, 16, 16), opset=21)
    x = graph.conv(graph.quantize("input", "in", zero_point=128, dtype=UINT8), "packed", (32, 32), dtype=INT4)
    path = graph.save(tmp_path / "s.onnx", graph.quantize(x, "out", zero_point=128, dtype=UINT8), rank=4)
    assert found(path) == {"packed weights": ("packed",)}


def test_a_bias_behind_the_convolution(tmp_path):
    def bias(graph, x):
        y = graph.conv(_unsigned(graph, x, "before"), "biased", (32, 32))
        return _unsigned(graph, graph.add("Add", [y, graph.constant("bias", np.ones((1, 32, 1, 1), np.float32))], "add"))

    path = _two_convolutions(tmp_path / "s.onnx", bias)
    assert found(path)["separate bias"] == ("biased",)
    assert census(path).float_layers == ("biased/Conv",)


def test_narrow_depthwise_and_transposed_convolutions(tmp_path):
    graph = QdqGraph(("batch", NARROW, 16, 16))
    x = graph.quantize("input", "in")
    x = graph.quantize(graph.conv(x, "wide", (NARROW, NARROW)), "q1")
    x = graph.quantize(graph.conv(x, "narrow", (NARROW, NARROW - 1)), "q2")
    x = graph.quantize(graph.conv(x, "depthwise", (NARROW - 1, NARROW - 1), group=NARROW - 1), "q3")
    weight = graph.weight("transposed.weight", (NARROW - 1, 4, 2, 2), axis=1)
    x = graph.quantize(graph.add("ConvTranspose", [x, weight], "transposed/ConvTranspose", strides=[2, 2]), "q4")
    layers = found(graph.save(tmp_path / "s.onnx", x, rank=4))
    assert layers.pop("signed codes") == ("wide", "narrow", "depthwise", "transposed")
    assert layers == {"narrow": ("narrow",), "depthwise": ("depthwise",), "transposed convolution": ("transposed",)}


def test_a_layer_that_the_runtime_left_in_float_for_no_known_reason_comes_first(tmp_path):
    path = _two_convolutions(tmp_path / "s.onnx", _unsigned)
    first = diagnose(path, ["second/Conv_nchwc", "unrelated"])[0]
    assert (first.kind, first.layers) == ("float in the runtime", ("second",))


def test_findings_name_layers_as_the_trained_model_does(tmp_path):
    assert found(residual_net(tmp_path / "s.onnx"))["depthwise"] == ("depthwise",)


def test_weights_in_other_files_are_read_from_the_files_own_folder(tmp_path, monkeypatch):
    whole = residual_net(tmp_path / "whole.onnx")
    (tmp_path / "folder").mkdir()
    split = tmp_path / "folder" / "split.onnx"
    onnx.save(onnx.load(whole), split, save_as_external_data=True, size_threshold=0, location="weights.bin")
    assert found(split) == found(whole)
    monkeypatch.chdir(split.parent)
    assert found("split.onnx") == found(whole)
    (tmp_path / "folder" / "weights.bin").rename(tmp_path / "weights.bin")
    with pytest.raises(ExportError, match=r"split\.onnx cannot be read: .*weights\.bin: No such file"):
        diagnose(split)
    (tmp_path / "folder" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(ExportError, match="outside the base directory"):
        diagnose(split)
    model = onnx.load(split, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    split.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="outside the base directory"):
        diagnose(split)


@pytest.mark.parametrize("location", ["../weights.bin", "folder/../../weights.bin", "/etc/hostname"])
def test_weights_outside_the_folder_are_not_looked_for(location, tmp_path):
    """Whether they are there or not, and also where an attribute names them."""
    model = onnx.load(residual_net(tmp_path / "s.onnx"))
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))
    (tmp_path / "s.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"s\.onnx keeps weights in .* outside the base directory, the folder of the file"):
        diagnose(tmp_path / "s.onnx")


@pytest.mark.parametrize("content", [None, b"", b"not onnx" * 50])
def test_a_bad_file_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        diagnose(tmp_path / "bad.onnx")


def test_two_bit_weights_count_as_packed_too(tmp_path):
    graph = QdqGraph(("batch", 32, 16, 16), opset=25)
    x = graph.quantize("input", "in", zero_point=128, dtype=UINT8)
    codes = graph.constant("codes", graph.random.integers(-2, 2, (32, 32, 3, 3)).astype(ml_dtypes.int2))
    weight = graph.add("DequantizeLinear", [codes, graph.constant("scale", np.float32(0.1))], "w/DequantizeLinear")
    x = graph.quantize(graph.add("Conv", [x, weight], "two/Conv"), "out", zero_point=128, dtype=UINT8)
    assert found(graph.save(tmp_path / "s.onnx", x, rank=4))["packed weights"] == ("two",)
