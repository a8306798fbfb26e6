"""Files from outside: what tune, diagnose, the benchmark and engines say of damaged and hostile ones is one line, soon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qakd_plugin import QakdError, benchmark, build_engine, diagnose, tune_for_host
from qakd_plugin.runtimes.base import Input, random_inputs


def _file() -> onnx.ModelProto:
    """A convolution as ONNX Runtime takes it in integers, and a product after it."""
    draw = np.random.default_rng(0)
    stored = {
        "weight": draw.integers(-100, 100, (8, 4, 3, 3), dtype=np.int8),
        "scale": np.float32(0.02),
        "scales": np.full(8, 0.01, np.float32),
        "zero": np.uint8(0),
        "zeros": np.zeros(8, np.int8),
        "bias": np.zeros(8, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["codes"], name="input_q"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["x"], name="input_dq"),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], name="weight_dq", axis=0),
        helper.make_node("Conv", ["x", "w", "bias"], ["y"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["ycodes"], name="y_q"),
        helper.make_node("DequantizeLinear", ["ycodes", "scale", "zero"], ["logits"], name="y_dq"),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "Convv"


def _weight_cut_short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"\1"


def _opset_beyond_all(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 2**40


def _huge_input(model: onnx.ModelProto) -> None:
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    sizes[2].dim_value = sizes[3].dim_value = 20000


def _beyond_all_sizes(model: onnx.ModelProto) -> None:
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    sizes[2].dim_value = sizes[3].dim_value = 2**31


def _type_without_a_name(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def _inputs_missing(model: onnx.ModelProto) -> None:
    del model.graph.node[3].input[1:]


def _names_for_terminals(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = model.graph.node[4].name = "\x1b]0;title\x07\nqakd: error: all is well"
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(np.asarray(np.uint8(5)), "zero"))
    model.graph.node[3].op_type = "\x1b[31mConv\n"


DAMAGES = [
    _unknown_operator,
    _weight_cut_short,
    _opset_beyond_all,
    _huge_input,
    _beyond_all_sizes,
    _type_without_a_name,
    _inputs_missing,
    _names_for_terminals,
]
READERS: dict[str, Callable[[Path], object]] = {
    "tune": lambda path: tune_for_host(path, path.with_name("tuned.onnx"), calls=1),
    "onnxruntime": lambda path: benchmark([path], calls=1),
    "openvino": lambda path: benchmark([path], runtimes=("openvino",), calls=1),
    "engine": lambda path: build_engine(path, path.with_name("x.engine")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(damage, reader, tmp_path):
    pytest.importorskip({"openvino": "openvino"}.get(reader, "onnxruntime"))
    model = _file()
    damage(model)
    path = tmp_path / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(QakdError) as caught:
        READERS[reader](path)
    assert str(caught.value).isprintable()


def test_the_file_that_is_damaged_here_is_sound(tmp_path):
    path = tmp_path / "sound.onnx"
    onnx.save(_file(), path)
    assert tune_for_host(path, tmp_path / "tuned.onnx", calls=1).eligible == 1
    assert isinstance(diagnose(path), list)
    assert benchmark([path], calls=1)[0].p50_ms > 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_diagnosis_ends_or_says_in_one_line_why_not(damage, tmp_path):
    model = _file()
    damage(model)
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    try:
        said = [finding.advice for finding in diagnose(tmp_path / "bad.onnx")]
    except QakdError as error:
        said = [str(error)]
    assert all(line.isprintable() for line in said)


def test_onnxruntimes_logger_writes_no_name_of_a_file_to_the_terminal(tmp_path, capfd):
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["input", "sizes"], ["logits"], name="\x1b]0;title\x07\nqakd: error: all is well")],
        "foreign",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["a", "b"])],
        [numpy_helper.from_array(np.array([7, 7]), "sizes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "net.onnx")
    with pytest.raises(QakdError, match="cannot compute it") as caught:
        benchmark([tmp_path / "net.onnx"], calls=1)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("size", "count"), [(224, 64), (1024, 21), (5000, 1)])
def test_random_inputs_of_large_samples_are_few(size, count):
    spec = {"input": Input((None, 3, size, size), np.dtype(np.float32))}
    drawn = random_inputs(spec, 64)["input"]
    assert drawn.shape == (count, 3, size, size)
    assert drawn.nbytes <= max(2**28, 3 * 4 * size * size)


def test_random_inputs_are_the_numbers_of_the_seed():
    spec = {name: Input((None, 2), np.dtype(np.float32)) for name in ("a", "b")}
    draw = np.random.default_rng(0)
    expected = [draw.random((64, 2), dtype=np.float32) for _ in spec]
    np.testing.assert_array_equal(list(random_inputs(spec, 64).values()), expected)


@pytest.mark.parametrize("quoted", ["a\nb", "\x1b[31mred", "\x07", "\u202etxt", "line\u2028break", "\udcff"])
def test_an_error_is_one_line_that_a_terminal_does_not_obey(quoted):
    message = str(QakdError(f"{quoted}: wrong"))
    assert message.isprintable()
    assert message.endswith(": wrong")


def test_an_error_says_what_it_is_given():
    assert str(QakdError("'naïve  conv' has 3x3, 日本.")) == "'naïve  conv' has 3x3, 日本."
