"""FP16 beside the integers: in the file, in the plan, and within what FP16 can explain."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from qakd_plugin import ExportError, ParityError, build_engine, export_onnx, prepare
from qakd_plugin.deploy.canonical.graph import constant
from qakd_plugin.deploy.canonical.write import export_canonical
from qakd_plugin.deploy.export import export_float
from qakd_plugin.deploy.parity.float16 import check_float16
from qakd_plugin.deploy.targets.float16 import to_float16
from qakd_plugin.toolkits import adapter_for

ONE = {"runtime": "tensorrt_rtx", "capabilities": ["SM86"]}
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Attention(nn.Module):
    """Float work between integer layers: LayerNorm, a softmax, a GELU, constants of the graph."""

    def __init__(self):
        super().__init__()
        self.norm, self.queries, self.values = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.hidden, self.head = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x):
        y = self.norm(x)
        queries = self.queries(y)
        x = x + torch.softmax(queries @ queries.transpose(1, 2) / 32**0.5, -1) @ self.values(y)
        return self.head(torch.nn.functional.gelu(self.hidden(x)).mean(1))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(16, 7, 32)


@pytest.fixture
def student(x):
    return prepare(Attention().eval(), [x])


def test_what_is_not_quantized_is_fp16_in_the_file_and_in_the_plan(student, x, tmp_path):
    exported = export_onnx(student, x, tmp_path / "student.onnx", float16=True)
    model = onnx.load(exported.path)
    assert {tensor.data_type for tensor in model.graph.initializer} & {FLOAT, FLOAT16} == {FLOAT16}
    assert {value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]} == {FLOAT}
    assert exported.parity.runtime_deviation < 1e-4, "the gate on the float32 form stays"
    assert exported.float16.deviation < 1e-2
    assert exported.float16.ties < 0.05 * exported.float16.codes
    pytest.importorskip("tensorrt_rtx_bindings")
    info = build_engine(exported, tmp_path / "student.engine", require_int8=1.0, **ONE)
    assert info.manifest["float_type"] == "float16"
    # Attention in FP16 becomes a kernel of its own; query and value are one product.
    assert info.manifest["matmuls"] == {"total": 3, "int8": 3}
    assert info.path.read_bytes().count(b"type=half") > 10


def test_weight_codes_are_untouched(student, x, tmp_path):
    codes = []
    for float16 in (False, True):
        model = onnx.load(export_onnx(student, x, tmp_path / "student.onnx", float16=float16).path)
        weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
        codes.append({tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in weights})
    assert codes[0] == codes[1]
    assert codes[0]


def test_a_float_network_in_fp16_is_the_baseline(x, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    sizes = {}
    for float16, kind in ((False, "float"), (True, "half")):
        path = export_float(Attention(), x, tmp_path / f"{kind}.onnx", float16=float16)
        manifest = build_engine(path, tmp_path / f"{kind}.engine", allow_float=True, **ONE).manifest
        assert manifest["matmuls"]["int8"] == 0
        assert {tuple(layer["inputs"]) for layer in manifest["layers"]} == {(kind, kind)}
        sizes[kind] = path.stat().st_size
    assert sizes["half"] < 0.7 * sizes["float"]


def _canonical(student, x):
    form = adapter_for(student).export_form(student)
    return export_canonical(form, x), form


@pytest.mark.parametrize(
    ("value", "message"), [(1e5, r"1e\+05 is beyond FP16's largest number, 65504"), (-7e4, r"-7e\+04 is beyond FP16")]
)
def test_numbers_beyond_fp16_are_refused_by_name(value, message, student, x, tmp_path):
    with torch.no_grad():
        student.head.bias[3] = value
    with pytest.raises(ExportError, match=rf"head\.bias: {message}"):
        export_onnx(student, x, tmp_path / "student.onnx", float16=True)
    assert not list(tmp_path.iterdir())


def test_an_activation_scale_that_vanishes_is_refused_by_name(student, x):
    student.hidden.input_quantizer.amax = torch.tensor(1e-6)
    model, _ = _canonical(student, x)
    with pytest.raises(ExportError, match=r"a scale of 7\.87e-09 is too small for FP16"):
        to_float16(model)


@pytest.mark.parametrize(("factor", "layer"), [(1.02, "values"), (0.9, "hidden")])
def test_a_wrong_scale_is_more_than_fp16_explains(factor, layer, student, x):
    """Not each wrong number can be told from FP16's rounding, but one that moves codes by a step can, and is named."""
    model, form = _canonical(student, x)
    broken = copy.deepcopy(form)
    broken.get_submodule(layer).input_qdq.scale.mul_(factor)
    with pytest.raises(ParityError, match=rf"{layer}\.input_qdq") as caught:
        check_float16(to_float16(model), broken, x)
    assert caught.value.layer == f"{layer}.input_qdq"


def test_a_file_that_truncates_is_refused(student, x):
    """Half a step less in front of a quantizer: every code is a neighbour at most, and the logits follow the codes."""
    model, form = _canonical(student, x)
    file = to_float16(model)
    quantize = next(node for node in file.graph if node.op_type == "QuantizeLinear")
    half = ir.Value(name="half_a_step", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([]))
    half.const_value = ir.tensor(np.asarray(0.5 * constant(quantize.inputs[1]), dtype=np.float16), name=half.name)
    file.graph.initializers[half.name] = half
    less = ir.node("Sub", [quantize.inputs[0], half], name="less")
    less.outputs[0].name = "less:out"
    file.graph.insert_before(quantize, less)
    quantize.replace_input_with(0, less.outputs[0])
    with pytest.raises(ParityError, match=r"by up to 1 steps"):
        check_float16(file, form, x)


def test_a_wrong_bias_of_the_last_layer_is_caught(student, x):
    model, form = _canonical(student, x)
    file = to_float16(model)  # before, the file's bias is the form's own memory
    with torch.no_grad():
        form.head.bias[0] += 0.1
    with pytest.raises(ParityError, match=r"differ by .* of the logit range"):
        check_float16(file, form, x)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_fp16_is_for_tensorrt(target, student, x, tmp_path):
    with pytest.raises(ExportError, match=rf"float16=True is for target='tensorrt': {target}"):
        export_onnx(student, x, tmp_path / "student.onnx", target, float16=True)


def test_scales_that_stay_float32_by_the_standard_are_left_alone(tmp_path):
    class Resized(nn.Module):
        def forward(self, x):
            return torch.nn.functional.interpolate(x, scale_factor=2.0) + 0.5

    images = torch.rand(2, 3, 8, 8)
    path = export_float(Resized(), images, tmp_path / "net.onnx", float16=True)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    model = ir.serde.deserialize_model(onnx.load(path))
    assert "Resize" in {node.op_type for node in model.graph}
    import onnxruntime

    result = onnxruntime.InferenceSession(path).run(None, {"input": images.numpy()})[0]
    np.testing.assert_allclose(result, Resized()(images).numpy(), atol=1e-3)
