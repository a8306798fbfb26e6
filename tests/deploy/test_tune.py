"""A tuned file computes the same bits; what is chosen is what was measured."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from qdq_graphs import UINT8, QdqGraph, residual_net

from qakd_plugin import ExportError, QakdError, export_onnx, tune_for_host
from qakd_plugin.bench.census import census
from qakd_plugin.cli import main
from qakd_plugin.deploy.canonical.graph import constant, stored_codes, weight_dequantizers
from qakd_plugin.deploy.diagnosis import diagnose
from qakd_plugin.deploy.engine.precheck import inspect_onnx
from qakd_plugin.deploy.tuning import eligible_layers, with_weight_zero_point
from qakd_plugin.runtimes.onnxruntime import session_options, start_session


def _run(path, images, *, optimize):
    """With the options that keep sums from saturating on processors where they would."""
    return start_session(path, session_options(fusions=optimize)).run(None, {"input": images})[0]


@pytest.fixture(params=[8, 4])
def file(request, tmp_path, make_student, digits):
    images = digits.test[0][:16]
    exported = export_onnx(make_student("modelopt", request.param), images, tmp_path / "s.onnx", target="onnxruntime")
    return exported.path, images.numpy()


def test_shifted_weights_are_the_same_numbers_on_the_same_kernels(file, tmp_path):
    path, images = file
    model = ir.load(path)
    layers = eligible_layers(model)
    assert len(layers) == 9  # all convolutions; the linear layer is none
    ir.save(with_weight_zero_point(model, layers), tmp_path / "shifted.onnx")
    changed = {node.name: node for node in weight_dequantizers(ir.load(tmp_path / "shifted.onnx").graph)}
    for node in weight_dequantizers(model.graph):
        zero_point = constant(changed[node.name].inputs[2])
        np.testing.assert_array_equal(stored_codes(changed[node.name]).astype(int) - zero_point.min(), stored_codes(node))
    assert sum(bool(constant(node.inputs[2]).any()) for node in changed.values()) == len(layers)
    assert census(tmp_path / "shifted.onnx").integer == census(path).integer == 10
    for optimize in (False, True):
        first, second = (_run(name, images, optimize=optimize) for name in (path, tmp_path / "shifted.onnx"))
        np.testing.assert_array_equal(first, second)


def test_a_file_is_written_and_recorded_only_where_it_gains(file, tmp_path):
    path, images = file
    out = tmp_path / "tuned.onnx"
    always = tune_for_host(path, out, samples=images, calls=5, minimum_gain=-100.0, exact=True)
    assert always.path == out
    assert always.layers
    assert always.eligible == 9
    np.testing.assert_array_equal(_run(out, images, optimize=True), _run(path, images, optimize=True))
    record = json.loads(out.with_suffix(".tuning.json").read_text())
    assert record["layers"] == list(always.layers)
    assert record["tuned_ms"] == always.tuned_ms
    out.unlink()
    never = tune_for_host(path, out, samples=images, calls=5, minimum_gain=1.0, exact=True)
    assert (never.path, never.layers) == (path, ())
    assert "Nothing gained" in str(never)
    assert not out.exists()
    assert json.loads(out.with_suffix(".tuning.json").read_text())["layers"] == []


def test_a_file_with_its_weights_elsewhere_is_tuned_to_a_whole_one(file, tmp_path):
    path, images = file
    (tmp_path / "split").mkdir()
    split, out = tmp_path / "split" / "s.onnx", tmp_path / "tuned.onnx"
    onnx.save(onnx.load(path), split, save_as_external_data=True, size_threshold=0, location="weights.bin")
    assert tune_for_host(split, out, samples=images, calls=2, minimum_gain=-100.0, exact=True).path == out
    (tmp_path / "split" / "weights.bin").unlink()
    np.testing.assert_array_equal(_run(out, images, optimize=True), _run(path, images, optimize=True))


def test_on_the_command_line(file, tmp_path, capsys):
    path, _ = file
    assert main(["tune", str(path), "--out", str(tmp_path / "tuned.onnx"), "--calls", "3", "--exact"]) == 0
    assert "ms" in capsys.readouterr().out
    assert main(["tune", str(tmp_path / "none.onnx"), "--out", str(tmp_path / "other.onnx")]) == 1
    assert "none.onnx" in capsys.readouterr().err


def test_grouped_convolutions_and_full_codes_are_left_alone(tmp_path):
    graph = QdqGraph(("batch", 8, 16, 16))
    x = graph.quantize("input", "in", dtype=UINT8)
    for name, group in (("plain", 1), ("grouped", 2), ("depthwise", 8), ("full", 1)):
        x = graph.quantize(graph.conv(x, name, (8, 8), group=group), f"{name}.out", dtype=UINT8)
    path = graph.save(tmp_path / "s.onnx", x, rank=4)
    model = ir.load(path)
    for node in weight_dequantizers(model.graph):
        zero = ir.Value(name=f"{node.name}.zero", const_value=ir.tensor(np.zeros(8, np.int8), name=f"{node.name}.zero"))
        model.graph.register_initializer(zero)
        node.resize_inputs(3)
        node.replace_input_with(2, zero)
    full = model.graph.initializers["full.weight.codes"]
    codes = full.const_value.numpy().copy()
    codes.flat[0] = -128
    full.const_value = ir.tensor(codes, name=full.name)
    assert eligible_layers(model) == ("plain/Conv",)


def test_tensorrt_refuses_a_tuned_file_by_name(file, tmp_path):
    path, _ = file
    tune_for_host(path, tmp_path / "tuned.onnx", calls=2, minimum_gain=-100.0, exact=True)
    with pytest.raises(QakdError, match=r"zero point|unsigned"):
        inspect_onnx(tmp_path / "tuned.onnx")


def test_bad_input_is_named(file, tmp_path):
    path, images = file
    with pytest.raises(ExportError, match=r"trt\.onnx is not in ONNX Runtime's form, .* target='onnxruntime'"):
        tune_for_host(residual_net(tmp_path / "trt.onnx"), tmp_path / "tuned.onnx")
    with pytest.raises(ExportError, match=r"was exported for 'onnxruntime': export it with target='openvino'"):
        tune_for_host(path, tmp_path / "tuned.onnx", runtime="openvino")
    with pytest.raises(ExportError, match="runtime='tensorrt' is unknown: use one of"):
        tune_for_host(path, tmp_path / "tuned.onnx", runtime="tensorrt")
    with pytest.raises(ExportError, match=r"samples: input 'input' takes shape \[any, 1, 32, 32\]"):
        tune_for_host(path, tmp_path / "tuned.onnx", samples=images[:, :, :8])
    with pytest.raises(ExportError, match="samples: expected 64 or more"):
        tune_for_host(path, tmp_path / "tuned.onnx", samples=images, batch=64)
    with pytest.raises(ExportError, match=r"none\.onnx"):
        tune_for_host(tmp_path / "none.onnx", tmp_path / "tuned.onnx")
    assert not (tmp_path / "tuned.onnx").exists()


def _small(folder, name="s.onnx"):
    """One convolution that can be tuned, in ONNX Runtime's form."""
    graph = QdqGraph(("batch", 8, 8, 8))
    x = graph.quantize("input", "in", dtype=UINT8)
    x = graph.quantize(graph.conv(x, "conv", (8, 8)), "out", dtype=UINT8)
    path = graph.save(folder / name, x, rank=4)
    model = onnx.load(path)
    weight = next(node for node in model.graph.node if node.name == "conv.weight/DequantizeLinear")
    weight.input.append("conv.weight.zero")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(8, np.int8), "conv.weight.zero"))
    onnx.save(model, path)
    return path


def test_a_small_file_is_tuned(tmp_path):
    tuned = tune_for_host(_small(tmp_path), tmp_path / "t.v2", calls=2, minimum_gain=-100.0, exact=True)
    assert tuned.layers == ("conv/Conv",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.onnx", "t.v2", "t.v2.tuning.json"]


def _unknown_operator(model):
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Convv"


def _short_weight(model):
    next(tensor for tensor in model.graph.initializer if tensor.name == "conv.weight.codes").raw_data = b"\1"


def _weight_of_another_shape(model):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "conv.weight.codes")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones((8, 7, 3, 3), np.int8), tensor.name))


def _no_inputs(model):
    del next(node for node in model.graph.node if node.op_type == "Conv").input[:]


def _type_that_does_not_exist(model):
    next(tensor for tensor in model.graph.initializer if tensor.name == "conv.weight.scale").data_type = 77


@pytest.mark.parametrize(
    "damage", [_unknown_operator, _short_weight, _weight_of_another_shape, _no_inputs, _type_that_does_not_exist]
)
def test_a_damaged_file_is_one_line_that_names_it(damage, tmp_path):
    path = _small(tmp_path)
    model = onnx.load(path)
    damage(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"s\.onnx") as caught:
        tune_for_host(path, tmp_path / "tuned.onnx", calls=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [_short_weight, _no_inputs, _type_that_does_not_exist])
def test_a_damaged_file_is_not_diagnosed(damage, tmp_path):
    path = _small(tmp_path)
    model = onnx.load(path)
    damage(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"s\.onnx") as caught:
        diagnose(path)
    assert "\n" not in str(caught.value)


def test_the_file_of_an_earlier_run_is_named_where_nothing_gains_any_more(tmp_path, caplog):
    path, earlier = _small(tmp_path), tmp_path / "tuned.onnx"
    earlier.write_bytes(b"earlier")
    tuning = tune_for_host(path, earlier, calls=5, minimum_gain=0.99)
    assert tuning.path == path
    assert earlier.read_bytes() == b"earlier"
    assert f"{earlier} is of an earlier run, and stays" in caplog.text


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (2**30, r"not a valid ONNX file .*its input 'input' has the sizes .*all together may be 2\^31 - 1"),
        (2**13, r"its input 'input' of \[8, 8192, 8192\] takes 2 GiB for one sample, .*: pass samples"),
    ],
)
def test_no_random_inputs_are_drawn_beyond_memory(size, problem, tmp_path):
    path = _small(tmp_path)
    model = onnx.load(path)
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    sizes[2].dim_value = sizes[3].dim_value = size
    onnx.save(model, path)
    with pytest.raises(ExportError, match=problem):
        tune_for_host(path, tmp_path / "tuned.onnx")


def test_a_file_of_several_inputs_is_tuned_with_samples_by_name(tmp_path):
    """A number for each sample, beside the image, is added to what the convolution computes."""
    model = onnx.load(_small(tmp_path))
    last, output = model.graph.node[-1], model.graph.output[0].name
    last.output[0] = "image"
    model.graph.input.append(onnx.helper.make_tensor_value_info("number", onnx.TensorProto.INT64, ["batch", 1, 1, 1]))
    model.graph.node.append(onnx.helper.make_node("Cast", ["number"], ["value"], to=onnx.TensorProto.FLOAT))
    model.graph.node.append(onnx.helper.make_node("Add", ["image", "value"], [output]))
    onnx.save(model, tmp_path / "two.onnx")
    draw = np.random.default_rng(0)
    samples = {"input": draw.random((4, 8, 8, 8), dtype=np.float32), "number": draw.integers(9, size=(4, 1, 1, 1))}
    tuned = tune_for_host(tmp_path / "two.onnx", tmp_path / "t.onnx", samples=samples, calls=2, minimum_gain=-100.0, exact=True)
    first, second = (
        start_session(path, session_options()).run(None, samples)[0] for path in (tmp_path / "two.onnx", tmp_path / "t.onnx")
    )
    np.testing.assert_array_equal(first, second)
    assert tuned.layers == ("conv/Conv",)
    with pytest.raises(ExportError, match="input 'number' holds int64, which is not drawn at random: pass samples"):
        tune_for_host(tmp_path / "two.onnx", tmp_path / "t.onnx")
    with pytest.raises(ExportError, match="samples: inputs: the file takes 'input', 'number', got 1 without a name"):
        tune_for_host(tmp_path / "two.onnx", tmp_path / "t.onnx", samples=samples["input"])
    with pytest.raises(ExportError, match=r"as many of each input; got 'input' \[3, 8, 8, 8\], 'number' \[4, 1, 1, 1\]"):
        tune_for_host(tmp_path / "two.onnx", tmp_path / "t.onnx", samples=samples | {"input": samples["input"][:3]})


@pytest.mark.parametrize("options", [{"batch": 0}, {"calls": 0}, {"threads": -1}, {"calls": 2.5}])
def test_numbers_that_cannot_be_used_are_named(options, tmp_path):
    with pytest.raises(ExportError, match=f"{next(iter(options))}="):
        tune_for_host(_small(tmp_path), tmp_path / "tuned.onnx", **options)


def test_a_weight_that_the_graph_computes_is_left_alone(tmp_path):
    graph = QdqGraph(("batch", 8, 8, 8))
    x = graph.quantize("input", "in", dtype=UINT8)
    plain = graph.add("MatMul", [x, graph.constant("eye", np.eye(8, dtype=np.float32))], "plain/MatMul")
    weight = graph.quantize(graph.add("ReduceMean", [plain], "w", keepdims=1), "w")
    path = graph.save(tmp_path / "s.onnx", graph.add("Conv", [x, weight], "dynamic/Conv"), rank=4)
    assert eligible_layers(ir.load(path)) == ()
