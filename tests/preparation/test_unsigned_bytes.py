"""prepare(target="onnxruntime"): codes 0..255 for what cannot be negative, trained, exported and run as such."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
import torch
from agreement import openvino_sqnr_db, require_same_but_for_ties, tolerated_sqnr_db
from torch import nn

from qakd_plugin import (
    LSQ,
    QAT,
    ExportError,
    NotPreparedError,
    QakdError,
    UnsupportedQuantizerError,
    configuration,
    describe,
    distill,
    export_onnx,
    prepare,
    restore_quantizers,
    use_quantizers,
)
from qakd_plugin.placement.calibration import observe_inputs
from qakd_plugin.toolkits import adapter_for

TOOLKITS = ["modelopt", "pt2e", "torch_ao", "torch_ao_eager"]
SIGNED, UNSIGNED = (-128, 127), (0, 255)
BEFORE_RELU = {"modelopt": 1, "pt2e": 0, "torch_ao": 0, "torch_ao_eager": 4}
"""Quantizers that stand in front of a ReLU; those are signed, and the ReLU ends at their highest code. ModelOpt's repeats its
grid after a pooling, where codes that were clipped are not clipped again."""


def _activations(model):
    """Code ranges of the activation quantizers, by name."""
    return {q.name: (q.quant_min, q.quant_max) for q in describe(model).quantizers if q.role == "activation"}


@pytest.fixture
def make(network, digits):
    """A fresh student: ``make("pt2e", "onnxruntime")``."""

    def make(toolkit, target, bits=8):
        return prepare(network, [digits.train[0][:128]], toolkit, weight_bits=bits, activation_bits=bits, target=target)

    return make


@pytest.fixture(params=TOOLKITS)
def student(request, make):
    return make(request.param, "onnxruntime")


def test_what_is_behind_a_relu_is_unsigned_and_nothing_that_can_be_negative(student, make, digits):
    ranges = _activations(student)
    assert set(ranges.values()) == {SIGNED, UNSIGNED}
    adapter = adapter_for(student)
    adapter.set_fake_quant(student, False)
    observers = observe_inputs(student, {name: student.get_submodule(name) for name in ranges}, [digits.train[0][:128]], {})
    adapter.set_fake_quant(student, True)
    signs = {name: observers[name].minimum >= 0 for name in ranges}
    assert all(signs[name] for name, kind in ranges.items() if kind == UNSIGNED)
    # The images are not negative either, but nothing in the network says so.
    assert len([name for name, kind in ranges.items() if kind == SIGNED and signs[name]]) == 1
    assert set(_activations(make(adapter.name, "tensorrt")).values()) == {SIGNED}


def test_the_files_compute_what_was_prepared_and_clip_no_unsigned_code(student, digits, tmp_path):
    images = digits.test[0][:64]
    exported = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime")
    least = tolerated_sqnr_db(student, images)
    assert min(exported.parity.unfused.sqnr_db, exported.parity.fused.sqnr_db) > least
    graph = ir.load(exported.path).graph
    clips = [node for node in graph if node.op_type == "Clip" and node.inputs[0].dtype == ir.DataType.UINT8]
    assert len(clips) == BEFORE_RELU[describe(student).toolkit]
    assert openvino_sqnr_db(export_onnx(student, images, tmp_path / "v.onnx", target="openvino").path, student, images) > least


def test_tensorrt_is_refused_by_the_name_of_the_first_quantizer(student, digits, tmp_path):
    first = next(name for name, kind in _activations(student).items() if kind == UNSIGNED)
    problems = {q.name: q.problems for q in describe(student).quantizers}
    assert problems[first].keys() == {"tensorrt"}
    with pytest.raises(UnsupportedQuantizerError, match=f"{first}: codes up to 255 do not fit TensorRT"):
        export_onnx(student, digits.test[0][:8], tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


def test_training_moves_ranges_and_leaves_zero_points_at_zero(student, mentor, batches, digits, tmp_path):
    before = _activations(student)
    scales = {q.name: q.scale_min for q in describe(student).quantizers if q.role == "activation"}
    result = distill(student, mentor, batches, epochs=1, method=QAT(), seed=0)
    rows = [q for q in describe(result.model).quantizers if q.role == "activation"]
    assert _activations(result.model) == before
    assert {q.zero_point for q in rows} == {0}
    if describe(student).toolkit != "modelopt":  # whose ranges are calibrated once
        assert any(q.scale_min != scales[q.name] for q in rows if q.quant_min == 0)
    images = digits.test[0][:64]
    parity = export_onnx(result.model, images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert parity.fused.sqnr_db > tolerated_sqnr_db(student, images)


def test_learned_quantizers_keep_the_grid_and_give_it_back(student, digits, tmp_path):
    before = _activations(student)
    images = digits.test[0][:64]
    use_quantizers(student, LSQ())
    assert _activations(student) == before
    parity = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert parity.fused.sqnr_db > tolerated_sqnr_db(student, images)
    learned = adapter_for(student).export_form(student)
    restore_quantizers(student)
    assert _activations(student) == before
    # Rounding ties fall one way in one arithmetic and the other way in the other.
    adapter_for(student).freeze_ranges(student, True)
    require_same_but_for_ties(learned, student, images)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_fewer_bits_have_the_grids_they_always_had_and_learned_bytes_stay_signed_for_tensorrt(toolkit, make):
    ranges = _activations(make(toolkit, "openvino", 4))
    assert (0, 15) in set(ranges.values())
    assert (-8, 7) not in set(ranges.values())
    student = make(toolkit, "tensorrt", 4)
    for target, expected in (("tensorrt", {SIGNED}), ("onnxruntime", {SIGNED, UNSIGNED})):
        again = use_quantizers(copy.deepcopy(student), LSQ(weight_bits=8, activation_bits=8), target=target)
        assert set(_activations(again).values()) == expected


def test_the_grid_is_about_twice_as_fine(student, make):
    def scales(model):
        return {q.name: q.scale_min for q in describe(model).quantizers if q.role == "activation"}

    fine, coarse = scales(student), scales(make(describe(student).toolkit, "tensorrt"))
    # ModelOpt's after a convolution stand in front of the ReLU where they are signed, on another module.
    unsigned = [name for name, kind in _activations(student).items() if kind == UNSIGNED and name in coarse]
    assert unsigned
    assert all(0.4 < fine[name] / coarse[name] < 0.6 for name in unsigned)


class _Separate(nn.Module):
    """ReLUs that no toolkit fuses into the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        y = self.first(x)
        y = torch.relu(self.second(y) + y)
        return self.last(torch.relu(self.third(y)).mean((2, 3)))


def test_fx_quantizes_behind_relus_that_it_does_not_fuse(digits, tmp_path):
    torch.manual_seed(0)
    images = digits.test[0][:32]
    model = _Separate().eval()
    student = prepare(model, [images], "torch_ao", target="onnxruntime")
    ranges = _activations(student)
    assert list(ranges.values()).count(UNSIGNED) == 4  # behind each ReLU, and the mean's
    nodes = list(student.graph.nodes)
    for node in nodes:
        if node.op == "call_module" and _activations(student).get(node.target) == SIGNED:
            assert not any(user.target in {torch.relu, "first.2"} for user in node.users)
    adapter = adapter_for(student)
    adapter.set_fake_quant(student, False)
    with torch.no_grad():
        torch.testing.assert_close(student(images), model(images), atol=1e-5, rtol=1e-5)
    adapter.set_fake_quant(student, True)
    parity = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert parity.fused.sqnr_db > tolerated_sqnr_db(student, images)


@pytest.mark.filterwarnings("ignore")
def test_configurations_have_it_where_the_toolkit_can_say_it(teacher):
    entries = configuration(teacher, "modelopt", target="onnxruntime")["quant_cfg"]
    assert any(entry.get("cfg", {}).get("unsigned") and entry["cfg"]["num_bits"] == 8 for entry in entries)
    assert configuration(teacher, "pt2e", target="openvino").precision.unsigned_bytes
    for toolkit in ("torch_ao", "torch_ao_eager"):
        with pytest.raises(QakdError, match="target other than TensorRT"):
            configuration(teacher, toolkit, target="onnxruntime")


class _Hidden(nn.Module):
    """torch.fx writes ``y -= 0.5`` down as a difference, and takes the tensor behind it for what the ReLU put out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = x
        y -= 0.5
        return self.head(torch.relu(self.second(x)).mean([2, 3]))


@pytest.mark.parametrize(("toolkit", "bits"), [("modelopt", 4), ("pt2e", 8), ("pt2e", 4)])
def test_a_negative_value_that_no_graph_shows_is_found_in_calibration(toolkit, bits, digits):
    with pytest.raises(NotPreparedError, match=r"second.*saw -0\.5 in calibration"):
        prepare(_Hidden().eval(), [digits.train[0][:32]], toolkit, bits, bits, target="onnxruntime")


def test_an_unknown_target_is_named(teacher, calibration):
    with pytest.raises(QakdError, match="target='ncnn' is unknown"):
        prepare(teacher, calibration, target="ncnn")
    with pytest.raises(QakdError, match="target='ncnn' is unknown"):
        use_quantizers(prepare(teacher, calibration), LSQ(), target="ncnn")
    with pytest.raises(ExportError, match="target='ncnn' is unknown"):
        export_onnx(teacher, torch.zeros(1, 1, 8, 8), "s.onnx", target="ncnn")


def test_codes_behind_a_relu_fill_the_byte(make, digits, tmp_path):
    """Read from the file by ONNX Runtime, not from our own description of it."""
    import onnxruntime

    images = digits.test[0][:64]
    path = export_onnx(make("pt2e", "onnxruntime"), images, tmp_path / "s.onnx", target="onnxruntime").path
    model = ir.load(path)
    codes = [node.outputs[0] for node in model.graph if node.op_type == "QuantizeLinear"]
    model.graph.outputs.extend(codes)
    data = ir.serde.serialize_model(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options)
    found = session.run([value.name for value in codes], {"input": images.numpy()})
    assert all(array.dtype == np.uint8 for array in found)
    assert sum(int(array.max()) == 255 and int(array.min()) == 0 for array in found) >= 3
