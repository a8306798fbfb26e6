"""What was trained is what is deployed."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from agreement import openvino_sqnr_db, run_openvino_as_written, ties_are_rare, tolerated_sqnr_db
from torch import nn

from qakd_plugin import (
    LSQ,
    SQAKD,
    ExportError,
    NotPreparedError,
    ParityError,
    UnsupportedQuantizerError,
    distill,
    export_onnx,
    prepare,
    use_quantizers,
)
from qakd_plugin._common.cpu_features import onednn_adds_products_in_16_bits
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.canonical.graph import QUANTIZER_KEY, activation_quantizers, constant, copied, read_onnx, scalar
from qakd_plugin.deploy.canonical.write import export_canonical, to_proto
from qakd_plugin.deploy.diagnosis import diagnose
from qakd_plugin.deploy.parity import openvino as openvino_parity
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.deploy.parity.openvino import check_openvino
from qakd_plugin.deploy.parity.recorded_codes import check_same_bits, run_labelled, run_recorded
from qakd_plugin.deploy.parity.report import agreement, least_agreement
from qakd_plugin.deploy.targets.onnxruntime import to_onnxruntime_form
from qakd_plugin.deploy.targets.openvino import to_openvino_form
from qakd_plugin.deploy.targets.openvino_kernels import DropRepeatedQuantizers
from qakd_plugin.runtimes.onnxruntime import session_options, start_session
from qakd_plugin.runtimes.openvino import OpenVINORunner
from qakd_plugin.toolkits import adapter_for

TOOLKITS = ["modelopt", "torch_ao"]


def _run(file, images, *, optimize):
    """Of a path, or of the file's bytes; with the options that keep sums from saturating on processors where they would."""
    return start_session(file, session_options(fusions=optimize)).run(None, {"input": images.numpy()})[0]


@pytest.fixture(scope="module")
def random_net():
    """Torchvision networks with random weights and plausible BatchNorm statistics, and images."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = getattr(torchvision.models, name)(num_classes=10).train()
            images = torch.randn(8, 3, 64, 64)
            with torch.no_grad():
                for _ in range(8):
                    model(images)
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):  # also negative gammas, which flip the sign of folded codes
                        module.weight.uniform_(-1.5, 1.5)
                for _ in range(8):
                    model(images)
            made[name] = (model.eval(), images)
        return made[name]

    return make


@pytest.mark.parametrize(("toolkit", "bits"), [("modelopt", 8), pytest.param("torch_ao", 4, marks=pytest.mark.matrix)])
def test_a_trained_student_is_exported_exactly(toolkit, bits, tmp_path, make_student, teacher, digits):
    student = make_student(toolkit, bits)
    distill(student, teacher, digits.loader("train", labels=False, shuffle=True), method=SQAKD(), epochs=4, seed=0)
    images = digits.test[0]
    for target in ("tensorrt", "onnxruntime"):
        exported = export_onnx(student, images, tmp_path / f"{target}.onnx", target=target)
        proof = exported.parity
        assert proof.weight_codes == sum(p.numel() for p in student.parameters() if p.ndim > 1)
        assert proof.runtime_deviation < 1e-4
        assert proof.toolkit_deviation < 1e-4
        assert ties_are_rare(proof)
        least = tolerated_sqnr_db(student, images)
        assert proof.unfused.sqnr_db > least
        with torch.no_grad():
            expected = student(images).numpy()
        deployed = _run(exported.path, images, optimize=target == "onnxruntime")
        assert agreement(expected, deployed).sqnr_db > least
        print(toolkit, bits, target, proof, least)
    counted = census(tmp_path / "onnxruntime.onnx")
    assert counted.integer == counted.total == 10


COVERED = {(0, 1, 8), (1, 0, 8)}
"""Rows, columns and bits of the networks below that run by default."""


@pytest.mark.parametrize(
    ("name", "toolkit", "bits"),
    [
        pytest.param(name, toolkit, bits, marks=() if (row, column, bits) in COVERED else pytest.mark.matrix)
        for row, name in enumerate(["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0"])
        for column, toolkit in enumerate(TOOLKITS)
        for bits in (8, 4)
    ],
)
def test_torchvision_networks_are_exported_exactly(name, toolkit, bits, random_net, tmp_path):
    model, images = random_net(name)
    student = prepare(model, [images[:4], images[4:]], toolkit, weight_bits=bits, activation_bits=bits)
    proof = export_onnx(student, images, tmp_path / "student.onnx", target="onnxruntime").parity
    assert proof.runtime_deviation < 1e-4
    assert proof.toolkit_deviation < 1e-4
    # Single codes are rounded the other way, on ties only, and rarely; in a random network the difference grows on its way.
    assert ties_are_rare(proof)
    assert proof.unfused.sqnr_db > tolerated_sqnr_db(student, images)


def test_the_onnxruntime_form_is_bit_exact_without_fusions(tmp_path, make_student, digits):
    student, images = make_student("modelopt", 4), digits.test[0][:64]
    canonical = export_onnx(student, images, tmp_path / "canonical.onnx")
    rewritten = export_onnx(student, images, tmp_path / "ort.onnx", target="onnxruntime")
    np.testing.assert_array_equal(_run(canonical.path, images, optimize=False), _run(rewritten.path, images, optimize=False))


def test_batch_norm_is_folded_and_nothing_local_is_left(tmp_path, make_student, digits):
    path = export_onnx(make_student(), digits.test[0][:8], tmp_path / "s.onnx").path
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert {entry.domain for entry in model.opset_import} == {""}
    text = path.read_bytes()
    for forbidden in (b"site-packages", b"stack_trace", b".py", str(tmp_path).encode(), b"File "):
        assert forbidden not in text


def test_the_batch_dimension_is_dynamic(tmp_path, make_student, digits):
    path = export_onnx(make_student(), digits.test[0][:1], tmp_path / "s.onnx").path
    whole = _run(path, digits.test[0][:7], optimize=False)
    single = np.concatenate([_run(path, digits.test[0][k : k + 1], optimize=False) for k in range(7)])
    np.testing.assert_allclose(whole, single, atol=1e-4)


def _exported(student, images):
    form = adapter_for(student).export_form(student)
    return export_canonical(form, images), form


def test_a_corrupted_activation_scale_is_named(make_student, digits):
    student, images = make_student(), digits.test[0][:16]
    file, form = _exported(student, images)
    form.get_submodule("stages.1.conv2").input_qdq.scale.mul_(1.01)
    with pytest.raises(ParityError, match=r"stages\.1\.conv2\.input_qdq") as caught:
        check_parity(file, form, student, images, fused=False)
    assert caught.value.layer == "stages.1.conv2.input_qdq"


def _weight_node(file, layer):
    return next(n for n in file.graph if n.op_type == "DequantizeLinear" and n.metadata_props.get("qakd.weight") == layer)


def test_a_corrupted_weight_scale_of_the_file_is_caught_at_the_next_quantizer(make_student, digits):
    student, images = make_student(), digits.test[0][:16]
    file, form = _exported(student, images)
    scale = _weight_node(file, "stages.0.conv1.weight").inputs[1]
    scale.const_value = ir.tensor(1.02 * scale.const_value.numpy())
    with pytest.raises(ParityError, match=r"stages\.0\.conv2\.input_qdq"):
        check_parity(file, form, student, images, fused=False)


def test_a_flipped_weight_code_is_named_with_its_channel(make_student, digits):
    student, images = make_student(), digits.test[0][:16]
    file, form = _exported(student, images)
    codes = _weight_node(file, "stages.2.conv1.weight").inputs[0]
    changed = codes.const_value.numpy().copy()
    changed[5, 0, 0, 0] += 1
    codes.const_value = ir.tensor(changed)
    with pytest.raises(ParityError, match=r"stages\.2\.conv1: .*output channel 5"):
        check_parity(file, form, student, images, fused=False)


def test_a_wrong_bias_of_the_last_layer_is_caught(make_student, digits):
    student, images = make_student(), digits.test[0][:16]
    file, form = _exported(student, images)
    form.head.bias[3] += 0.5
    with pytest.raises(ParityError, match=r"^head: .*after the last quantizer") as caught:
        check_parity(file, form, student, images, fused=False)
    assert caught.value.layer == "head"


class _TwoHeads(nn.Module):
    """Ten classes, and one number."""

    def __init__(self):
        super().__init__()
        self.conv, self.classes, self.number = nn.Conv2d(1, 16, 3, 2), nn.Linear(16, 10), nn.Linear(16, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        return {"classes": self.classes(x), "number": self.number(x).squeeze(1)}


@pytest.fixture
def two_heads(digits):
    torch.manual_seed(0)
    images = digits.test[0][:32]
    return prepare(_TwoHeads().eval(), [images]), images


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_every_output_is_exported_exactly(target, two_heads, tmp_path):
    student, images = two_heads
    exported = export_onnx(student, images, tmp_path / "s.onnx", target=target)
    with torch.no_grad():
        expected = [one.numpy() for one in student(images).values()]
    session = onnxruntime.InferenceSession(exported.path, session_options(fusions=False))
    found = session.run(None, {"input": images.numpy()})
    assert least_agreement(expected, found) == exported.parity.unfused
    proof = exported.parity
    assert max(proof.runtime_deviation, proof.toolkit_deviation) < 1e-4
    assert ties_are_rare(proof)
    least = tolerated_sqnr_db(student, images)
    assert min(one.sqnr_db for one in (proof.unfused, proof.fused) if one is not None) > least
    assert openvino_sqnr_db(exported.path, student, images) > least


@pytest.mark.parametrize("head", ["classes", "number"])
@pytest.mark.parametrize("where", ["file", "prepared model"])
def test_a_wrong_bias_of_either_head_is_caught(head, where, two_heads):
    student, images = two_heads
    file, form = _exported(student, images)
    check_parity(file, form, student, images, fused=False)
    with torch.no_grad():
        (form if where == "file" else student).get_submodule(head).bias[0] += 0.1
    with pytest.raises(ParityError, match=rf"^{head}: .*after the last quantizer") as caught:
        check_parity(file, form, student, images, fused=False)
    assert caught.value.layer == head


@pytest.mark.skipif(onednn_adds_products_in_16_bits(), reason="sums of integer kernels saturate here")
def test_a_wrong_second_output_of_openvino_is_caught(two_heads):
    student, images = two_heads
    file, form = _exported(student, images)
    with torch.no_grad():
        classes, number = (one.numpy() for one in student(images).values())
    assert check_openvino(file, form, images, [classes, number]).sqnr_db > 20
    with pytest.raises(ParityError, match="OpenVINO computes something else"):
        check_openvino(file, form, images, [classes, -number[::-1]])


class _FloatEnd(nn.Module):
    """Three float layers behind the last quantizer."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 8, 3, 2), nn.AdaptiveAvgPool2d(1)
        self.first, self.norm, self.last = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x):
        return self.last(self.norm(torch.relu(self.first(self.pool(torch.relu(self.conv(x))).flatten(1)))))


@pytest.mark.parametrize("layer", ["first", "norm", "last"])
@pytest.mark.parametrize("where", ["file", "prepared model"])
def test_a_difference_behind_the_last_quantizer_is_bisected_to_its_layer(layer, where, digits):
    images = digits.test[0][:16]
    torch.manual_seed(0)
    student = prepare(_FloatEnd().eval(), [images], keep=("first", "last"))
    file, form = _exported(student, images)
    check_parity(file, form, student, images, fused=False)
    if where == "file":
        bias = file.graph.initializers[f"{layer}.bias"]
        values = bias.const_value.numpy()
        bias.const_value = ir.tensor(values + 0.3 * np.arange(len(values), dtype=np.float32))
    else:
        with torch.no_grad():
            student.get_submodule(layer).bias.add_(0.3 * torch.arange(student.get_submodule(layer).bias.numel()))
    with pytest.raises(ParityError, match=rf"^{layer}: ") as caught:
        check_parity(file, form, student, images, fused=False)
    assert caught.value.layer == layer


def test_nothing_is_written_when_parity_fails(tmp_path, make_student, digits, monkeypatch):
    student = make_student()
    monkeypatch.setattr("qakd_plugin.deploy.parity.programs.LOGIT_TOLERANCE", -1.0)
    with pytest.raises(ParityError):
        export_onnx(student, digits.test[0][:8], tmp_path / "sub" / "s.onnx")
    assert not (tmp_path / "sub").exists()


def test_export_leaves_the_model_as_it_was(tmp_path, make_student, digits):
    student = make_student("torch_ao").train()
    before = copy.deepcopy(student.state_dict())
    export_onnx(student, digits.test[0][:8], tmp_path / "s.onnx")
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


class _TwoReads(nn.Module):
    """A convolution read by a max pooling, an add and a concatenation, a grouped one, and a linear layer in the middle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Conv2d(8, 8, 1)
        self.transposed = nn.ConvTranspose2d(16, 8, 2, 2)
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = torch.cat([self.depthwise(x) + x, self.branch(x)], 1)
        y = torch.relu(self.transposed(y)).mean([2, 3])
        return self.head(torch.nn.functional.gelu(self.hidden(y)))


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_unusual_structures_are_exported_exactly(bits, tmp_path):
    torch.manual_seed(1)
    model, images = _TwoReads().train(), torch.rand(16, 3, 16, 16)
    for _ in range(20):
        model(images)
    student = prepare(model.eval(), [images], "modelopt", weight_bits=bits, activation_bits=bits)
    proof = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert proof.runtime_deviation < 1e-4


class _Joined(nn.Module):
    """A parameter with negative numbers meets what comes out of a ReLU."""

    def __init__(self, join):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 16, 3, 2), nn.Linear(16, 10)
        self.join, self.parameter = join, nn.Parameter(torch.linspace(-0.5, 0.5, 16).reshape(1, 16, 1, 1))

    def forward(self, x):
        x = self.join(torch.relu(self.first(x)), self.parameter)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture(params=[torch.add, torch.mul], ids=["add", "mul"])
def joined(request, digits):
    torch.manual_seed(0)
    images = digits.test[0][:32]
    return prepare(_Joined(request.param).eval(), [images]), images


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_a_parameter_makes_negative_behind_a_relu_stays_negative(target, joined, tmp_path):
    student, images = joined
    exported = export_onnx(student, images, tmp_path / "s.onnx", target=target)
    with torch.no_grad():
        expected = student(images).numpy()
    if target == "onnxruntime":
        deployed = _run(exported.path, images, optimize=True)
    else:
        (deployed,) = run_openvino_as_written(exported.path, images)
    least = tolerated_sqnr_db(student, images)
    assert agreement(expected, _run(exported.path, images, optimize=False)).sqnr_db > least
    assert agreement(expected, deployed).sqnr_db > least
    _, codes = run_recorded(read_onnx(exported.path), images, optimize=False)
    assert min(call.min() for call in codes["second.input_qdq"]) < -30


def test_codes_that_no_relu_drops_are_missed_where_they_are_dropped(joined, tmp_path, monkeypatch):
    student, images = joined
    monkeypatch.setattr(
        "qakd_plugin.deploy.canonical.sign_analysis._holds_no_negative", lambda value: constant(value) is not None
    )
    with pytest.raises(ParityError, match=r"^second\.input_qdq: .* quantize differently") as caught:
        export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime")
    assert caught.value.layer == "second.input_qdq"


@pytest.mark.parametrize("layer", ["stem.0", "stages.1.conv1", "stages.1.shortcut.0"])
def test_layers_that_are_kept_in_float_stay_so_in_onnxruntime(layer, tmp_path, teacher, calibration, digits):
    # Left alone, ONNX Runtime quantizes a float weight that it finds between two quantizers.
    student, images = prepare(teacher, calibration, keep=(layer,)), digits.test[0][:64]
    path = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").path
    assert len(census(path).float_layers) == 1


class BetweenConvolutions(nn.Module):
    """A function of what one convolution makes, read by another."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    "function",
    [nn.Softmax(-1), nn.Sigmoid(), nn.LeakyReLU(0.3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)],
    ids=lambda function: type(function).__name__,
)
def test_functions_between_quantizers_are_computed_as_trained_in_onnxruntime(function, tmp_path):
    """The runtime has integer kernels of its own for all of these; that of softmax rounds exponentials to whole numbers."""
    torch.manual_seed(0)
    images = 3 * torch.randn(8, 8, 16, 16)
    student = prepare(BetweenConvolutions(function).eval(), [images], "pt2e")
    file = export_onnx(student, images, tmp_path / "student.onnx", "onnxruntime")
    assert file.parity.fused.sqnr_db > 40


@pytest.mark.parametrize("bits", [8, 4])
def test_agreement_in_openvino_is_recorded(bits, tmp_path, make_student, digits, monkeypatch):
    student, images, ran, run = make_student("modelopt", bits), digits.test[0][:128], [], openvino_parity._run
    monkeypatch.setattr(openvino_parity, "_run", lambda *args: ran.append(run(*args)) or ran[-1])
    exported = export_onnx(student, images, tmp_path / "s.onnx", target="openvino")
    found = exported.parity.openvino
    with torch.no_grad():
        expected = student(images).numpy()
    ((got,),) = ran
    assert found == agreement(expected, got)
    assert openvino_sqnr_db(exported.path, student, images) > tolerated_sqnr_db(student, images)
    assert found.samples == 128
    assert exported.parity.fused is None
    assert export_onnx(student, images[:8], tmp_path / "t.onnx").parity.openvino is None


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.matrix)])
def test_openvino_gets_unsigned_codes_behind_every_relu_and_the_same_numbers(bits, make_student, digits):
    images = digits.test[0][:64]
    canonical, _ = _exported(make_student("pt2e", bits), images)
    form = to_openvino_form(canonical)
    expected, codes = run_recorded(canonical, images, optimize=False)
    got, same = run_recorded(form, images, optimize=False)
    np.testing.assert_array_equal(got, expected)
    assert all(np.array_equal(*calls) for name in codes for calls in zip(codes[name], same[name], strict=True))
    non_negative = {name for name, calls in codes.items() if min(call.min() for call in calls) >= 0}
    unsigned = {node for node in activation_quantizers(form.graph) if node.outputs[0].dtype == ir.DataType.UINT8}
    assert 0 < len(unsigned) < len(list(activation_quantizers(form.graph)))
    assert {node.metadata_props[QUANTIZER_KEY].partition("#")[0] for node in unsigned} <= non_negative
    assert not any(node.op_type == "Relu" for node in form.graph)  # one clamp is left, which ends where the codes did


@pytest.mark.parametrize("dynamic", [None, {}])
def test_openvino_computes_what_comes_from_several_grids_and_is_concatenated(dynamic, digits, tmp_path):
    """Left to itself it brings both parts onto one coarser grid first: 29 dB with a dynamic batch."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.high = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            self.low = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
            self.up, self.head = nn.Sequential(nn.Conv2d(24, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 1, 1)

        def forward(self, x):
            high = self.high(x)
            return self.head(self.up(torch.cat([high, F.interpolate(self.low(high), scale_factor=2.0)], 1)))

    torch.manual_seed(0)
    images = digits.test[0][:16]
    student = prepare(Skip().eval(), [images])
    exported = export_onnx(student, images, tmp_path / "s.onnx", target="openvino", dynamic=dynamic)
    assert exported.parity.openvino.sqnr_db > 40


def test_openvino_computes_strided_shortcuts_in_integers_and_the_same_numbers(make_student, digits, tmp_path):
    student, images = use_quantizers(make_student("modelopt", 4), LSQ()), digits.test[0][:64]
    with torch.no_grad():
        for number, (name, parameter) in enumerate(student.named_parameters()):
            if "input_quantizer" in name:  # as training does: a shortcut and its block read a tensor by quantizers of their own
                parameter.add_(0.01 * number)
    exported = export_onnx(student, images, tmp_path / "s.onnx", target="openvino")
    picking = [node for node in read_onnx(exported.path).graph if node.op_type == "MaxPool"]
    assert len(picking) == 2
    integer, layers = OpenVINORunner(exported.path, 1).count_layers()
    assert integer == layers == 10
    canonical, _ = _exported(student, images)
    expected, codes = run_recorded(canonical, images, optimize=False)
    got, same = run_recorded(to_openvino_form(canonical), images, optimize=False)
    np.testing.assert_array_equal(got, expected)
    assert all(np.array_equal(*calls) for name in codes for calls in zip(codes[name], same[name], strict=True))


@pytest.mark.filterwarnings("ignore")
def test_openvino_gets_no_quantizer_that_repeats_another_and_the_same_numbers(tmp_path):
    torch.manual_seed(0)
    network, images = torchvision.models.shufflenet_v2_x0_5(num_classes=10).train(), torch.rand(8, 3, 64, 64)
    for _ in range(10):
        network(images)
    student = prepare(network.eval(), [images], "torch_ao")
    form = to_openvino_form(_exported(student, images)[0])
    dropped = DropRepeatedQuantizers()(copied(form)).model
    before, after = (list(activation_quantizers(model.graph)) for model in (form, dropped))
    assert len(after) < 0.8 * len(before)  # torch.ao FX puts five behind each shuffle of channels
    expected, codes = run_labelled(form, images, optimize=False)
    got, kept = run_labelled(dropped, images, optimize=False)
    np.testing.assert_array_equal(got, expected)
    assert all(np.array_equal(dict(codes)[label], array) for label, array in kept)
    for name, model in (("form", form), ("dropped", dropped)):
        (tmp_path / name).write_bytes(to_proto(model).SerializeToString())
    assert diagnose(tmp_path / "form") == diagnose(tmp_path / "dropped")


@pytest.mark.parametrize(
    ("moves", "top", "high", "scale", "left"),
    [
        ("m = Reshape(x0, shape)", 1.27, 1.27, 0.01, 2),
        ("m = Concat<axis=0>(x0, x1)", 1.27, 1.27, 0.01, 2),
        ("m = Reshape(x0, shape)", 1.27, 1.0, 0.01, 3),  # a clamp below the range of what it reads
        ("m = Reshape(x0, shape)", 1.9, 1.5, 0.01, 3),  # likewise, in the upper half of the codes
        ("m = Reshape(x0, shape)", 1.27, 1.27, 0.02, 3),  # another grid
        ("m = Concat<axis=0>(x0, input)", 1.27, 1.27, 0.01, 3),  # partly not quantized
        ("m = Add(x0, x1)", 1.27, 1.27, 0.01, 3),  # sums lie on the grid but may leave the range
        ("m = Identity(x0) l = MatMul(d, w)", 1.27, 1.27, 0.01, 2),  # a layer reads it, and reads the first one then
        ("m = Identity(x0) l = Concat<axis=0>(d, x1)", 1.27, 1.27, 0.01, 2),  # likewise a concatenation
    ],
)
def test_only_quantizers_of_what_lies_on_their_grid_and_in_their_range_are_dropped(moves, top, high, scale, left):
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        graph (float[2, 3] input) => (float[N, M] y)
        <float s = {{0.01}}, float t = {{{scale}}}, uint8 zero = {{0}}, float low = {{0.0}}, float top = {{{top}}},
         float high = {{{high}}}, int64[2] shape = {{3, 2}}, float[3, 1] w = {{1.0, 1.0, 1.0}}> {{
            a0 = Clip(input, low, top)
            q0 = QuantizeLinear(a0, s, zero)
            x0 = DequantizeLinear(q0, s, zero)
            b = Neg(input)
            b0 = Clip(b, low, top)
            q1 = QuantizeLinear(b0, s, zero)
            x1 = DequantizeLinear(q1, s, zero)
            {moves}
            c = Clip(m, low, high)
            q = QuantizeLinear(c, t, zero)
            d = DequantizeLinear(q, t, zero)
            e = Concat<axis=0>(x1, x1)
            n = ReduceSum(e)
            f = Flatten<axis=0>(d)
            y = Add(f, n)
        }}"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    dropped = DropRepeatedQuantizers()(copied(model)).model
    assert len(list(activation_quantizers(dropped.graph))) == left
    values = torch.empty(2, 3).uniform_(-2, 2, generator=torch.Generator().manual_seed(0))
    files = (ir.serde.serialize_model(one).SerializeToString() for one in (model, dropped))
    expected, got = (_run(file, values, optimize=False) for file in files)
    np.testing.assert_array_equal(got, expected)


def test_a_rewrite_that_changes_one_bit_is_refused_by_name(make_student, digits):
    images = digits.test[0][:16]
    file, _ = _exported(make_student(), images)

    def with_more(name, factor):
        other = ir.serde.deserialize_model(ir.serde.serialize_model(file))
        value = other.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)
        return other

    check_same_bits(file, with_more("head.bias", 1), images)
    with pytest.raises(ParityError, match=r"^logits: the file computes other numbers"):
        check_same_bits(file, with_more("head.bias", 1.001), images)
    with pytest.raises(ParityError, match=r"^stages\.1\.conv2\.input_qdq: "):
        check_same_bits(file, with_more(_weight_node(file, "stages.1.conv1.weight").inputs[1].name, 1.1), images)


@pytest.mark.skipif(onednn_adds_products_in_16_bits(), reason="sums of integer kernels saturate here")
def test_a_file_that_openvino_computes_differently_is_refused_and_its_layer_named(make_student, digits, tmp_path, monkeypatch):
    def as_written(file, samples):  # with integer kernels it names a layer where their sums saturate
        (tmp_path / "s.onnx").write_bytes(ir.serde.serialize_model(file).SerializeToString())
        return run_openvino_as_written(tmp_path / "s.onnx", samples)

    monkeypatch.setattr(openvino_parity, "_run", as_written)
    student, images = make_student(), digits.test[0][:64]
    file, form = _exported(student, images)
    with torch.no_grad():
        reference = student(images).numpy()
    good = check_openvino(file, form, images, [reference])
    assert good.sqnr_db > tolerated_sqnr_db(student, images)
    with pytest.raises(ParityError, match=r"OpenVINO computes something else .* labels agree") as caught:
        check_openvino(file, form, images, [-reference])
    assert caught.value.layer == "logits"  # ONNX Runtime and OpenVINO agree on all codes of this file


# -- bad input


def test_a_float_model_cannot_be_exported(tmp_path, teacher, digits):
    with pytest.raises(NotPreparedError):
        export_onnx(teacher, digits.test[0][:4], tmp_path / "s.onnx")


def test_an_asymmetric_quantizer_is_named_for_tensorrt_and_exported_elsewhere(tmp_path, teacher, digits):
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver as PerChannel
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    affine = QConfig(
        activation=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8),
        weight=FakeQuantize.with_args(
            observer=PerChannel, quant_min=-127, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
        ),
    )
    images = digits.test[0][:32]
    student = prepare_qat_fx(copy.deepcopy(teacher).train(), QConfigMapping().set_global(affine), (images,))
    student(images)
    with pytest.raises(UnsupportedQuantizerError, match=r"activation_post_process_\d+: asymmetric"):
        export_onnx(student, images, tmp_path / "s.onnx", target="tensorrt")
    proof = export_onnx(student.eval(), images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert proof.runtime_deviation < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_torch_aos_default_configurations_compute_in_integers(backend, teacher, digits, tmp_path):
    """Unsigned codes with zero points: 0 to 127 of them, or all."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    images = digits.test[0][:64]
    student = prepare_qat_fx(teacher.train(), get_default_qat_qconfig_mapping(backend), (images,))
    for start in range(0, 256, 64):
        student(digits.train[0][start : start + 64])
    canonical, _ = _exported(student.eval(), images)
    zero_points = {int(scalar(node.inputs[2], 0)) for node in activation_quantizers(canonical.graph)}
    assert len(zero_points) > 1
    expected, codes = run_recorded(canonical, images, optimize=False)
    path = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").path
    got, _ = run_recorded(read_onnx(path), images, optimize=False)
    np.testing.assert_array_equal(got, expected)
    _, same = run_recorded(to_onnxruntime_form(canonical), images, optimize=False)  # the file repeats no quantizer
    assert all(np.array_equal(*calls) for name in codes for calls in zip(codes[name], same[name], strict=True))
    counted = census(path)
    assert counted.integer == counted.total == 10, counted.float_layers
    assert {finding.kind for finding in diagnose(path, counted.float_layers)} <= {"narrow"}


def test_a_scale_that_is_not_positive_is_named(tmp_path, make_student, digits):
    student = make_student("torch_ao")
    student.activation_post_process_0.scale.fill_(-0.1)
    with pytest.raises(ExportError, match="activation_post_process_0"):
        export_onnx(student, digits.test[0][:4], tmp_path / "s.onnx")


@pytest.mark.parametrize("example", [None, torch.zeros(3), torch.zeros(2, 1, 32, 32, dtype=torch.int64)])
def test_a_bad_example_is_named(example, tmp_path, make_student):
    with pytest.raises(ExportError, match="example_inputs"):
        export_onnx(make_student(), example, tmp_path / "s.onnx")


def test_an_unknown_target_is_named(tmp_path, make_student, digits):
    with pytest.raises(ExportError, match="target='tflite'"):
        export_onnx(make_student(), digits.test[0][:4], tmp_path / "s.onnx", target="tflite")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_student, digits):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        export_onnx(make_student(), digits.test[0][:4], tmp_path / "file" / "s.onnx")
