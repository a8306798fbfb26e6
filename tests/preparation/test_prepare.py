"""prepare() and describe(): a configuration that every target can take."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from qakd_plugin import (
    QAT,
    MissingPackageError,
    NotPreparedError,
    QakdError,
    attach,
    configuration,
    describe,
    export_onnx,
    prepare,
    restore_modelopt,
)
from qakd_plugin.placement.calibration import RangeObserver, best_weight_clip
from qakd_plugin.placement.placement import OutputQuantizer, place_quantizers
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.toolkits.adapter import require_no_negative
from qakd_plugin.toolkits.pt2e.graph import CONVOLUTIONS, layer_name
from qakd_plugin.toolkits.pt2e.sign_analysis import non_negative

TOOLKITS = ["modelopt", "torch_ao"]


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_target_can_take_what_prepare_makes(toolkit, bits, make_student):
    description = describe(make_student(toolkit, bits))
    assert description.toolkit == toolkit
    assert description.weight_quantizers == 10
    assert description.activation_quantizers >= 10
    assert all(not q.problems for q in description.quantizers)
    weights = {q.name: q.bits for q in description.quantizers if q.role == "weight"}
    edges = {name: b for name, b in weights.items() if name.startswith(("stem", "head"))}
    assert set(edges.values()) == {8}
    assert {b for name, b in weights.items() if name not in edges} == {bits}
    assert "stages.0.conv1" in str(description)
    assert description.as_dict()["quantizers"][0]["name"]


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_low_bit_inputs_behind_a_relu_are_unsigned(toolkit, make_student):
    student = make_student(toolkit, 4)
    adapter = adapter_for(student)
    ranges = [
        (p.quant_min, p.quant_max) for q in adapter.quantizers(student) if q.role == "activation" for p in [adapter.qparams(q)]
    ]
    assert (0, 15) in ranges
    assert (-8, 7) not in ranges


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_calibration_alone_keeps_the_accuracy_at_eight_bits(toolkit, make_student, teacher, digits):
    images, labels = digits.validation
    with torch.no_grad():
        exact, quantized = ((model(images).argmax(1) == labels).float().mean() for model in (teacher, make_student(toolkit)))
    assert float(exact - quantized) < 0.02


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_with_fake_quant_off_the_student_is_the_teacher(toolkit, make_student, teacher, digits):
    student, images = make_student(toolkit, 4), digits.test[0][:64]
    adapter_for(student).set_fake_quant(student, False)
    with torch.no_grad():
        torch.testing.assert_close(student(images), teacher(images), atol=1e-4, rtol=1e-4)
        adapter_for(student).set_fake_quant(student, True)
        assert (student(images) - teacher(images)).abs().max() > 1e-2


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_kept_layers_stay_in_floating_point(toolkit, make_student):
    names = [q.name for q in describe(make_student(toolkit, keep=("head", "stages.1.*"))).quantizers if q.role == "weight"]
    assert len(names) == 6
    assert not any(name.startswith(("head", "stages.1")) for name in names)


def test_prepare_leaves_the_float_model_alone(teacher, calibration):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    prepare(teacher.train(), calibration)
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_modelopt_saves_and_restores_what_prepare_made(tmp_path, make_student, teacher, digits):
    import modelopt.torch.opt as mto

    student, images = make_student("modelopt", 4), digits.test[0][:16]
    mto.save(student, tmp_path / "student.pth")
    restored = restore_modelopt(teacher, tmp_path / "student.pth")
    with torch.no_grad():
        assert torch.equal(student(images), restored(images))


def test_an_output_quantizer_goes_behind_convolutions_that_feed_an_add(teacher):
    placement = place_quantizers(teacher)
    assert OutputQuantizer("stages.0.bn2", None) in placement.outputs
    after_relu = OutputQuantizer("stem.1", (0.0, float("inf")), after_clamp="stem.2")
    assert after_relu in placement.outputs  # read by a convolution and by an add
    assert placement.edges == {"stem.0", "head"}
    assert "stem.0" not in placement.unsigned
    assert "stages.0.conv2" in placement.unsigned


class _Between(nn.Module):
    """Two convolutions, with something between the first one's ReLU and the second."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.factor, self.upsample = nn.Parameter(torch.ones(1)), nn.Upsample(scale_factor=2, mode="bicubic")
        self.between = between

    def forward(self, x):
        return self.head(torch.relu(self.second(self.between(self, torch.relu(self.first(x))))).mean([2, 3]))


def _through_a_view(_, x):
    x.view(-1)[0].neg_()
    return x


MAYBE_NEGATIVE = {
    "in place": lambda _, x: (x.sub_(0.5), x)[1],
    "in place by keyword": lambda _, x: (F.elu(x.sub_(1), inplace=True), x)[1],
    "through a view": _through_a_view,
    "product": lambda _, x: x * -1.0,
    "reversed": lambda _, x: -2 * x,
    "sum": lambda _, x: x + -0.5,
    "method": lambda _, x: x.mul(-1.0),
    "function": lambda _, x: torch.add(x, -0.5),
    "keyword": lambda _, x: torch.mul(x, other=-1.0),
    "alpha": lambda _, x: torch.add(x, x, alpha=-2),
    "difference": lambda _, x: x - 0.5,
    "parameter": lambda self, x: x * self.factor,
    "list": lambda self, x: torch.cat([x, x * -1.0], 2),
    "bicubic": lambda _, x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "upsample": lambda self, x: self.upsample(x),
}
NEVER_NEGATIVE = {
    "in place": lambda _, x: (x.add_(0.5), x)[1],
    "a copy in place": lambda _, x: ((-x).sub_(1), x)[1],
    "product": lambda _, x: x * 0.5,
    "sum": lambda _, x: 1 + x,
    "both": lambda _, x: torch.add(x, torch.sigmoid(x), alpha=2),
    "list": lambda _, x: torch.cat([x, 2 * x], 2),
    "pool": lambda _, x: F.max_pool2d(x, 2),
    "nearest": lambda _, x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("between", MAYBE_NEGATIVE)
def test_what_may_be_negative_is_not_taken_for_unsigned(between):
    assert "second" not in place_quantizers(_Between(MAYBE_NEGATIVE[between])).unsigned


@pytest.mark.parametrize("between", MAYBE_NEGATIVE)
def test_what_may_be_negative_is_not_taken_for_unsigned_in_an_exported_graph(between):
    model = _Between(MAYBE_NEGATIVE[between]).eval()
    graph = torch.export.export(model, (torch.rand(2, 1, 12, 12),)).module().graph
    (second,) = (node for node in graph.nodes if node.target in CONVOLUTIONS and layer_name(node) == "second")
    assert second.args[0] not in non_negative(graph)


class _NamedLikeAReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3)

    def forward(self, relu):
        return self.first(relu.flatten(1).view(-1, 1, 8, 8)) + self.second(relu)


def test_an_input_that_is_called_like_a_function_is_not_one():
    assert not place_quantizers(_NamedLikeAReLU()).unsigned


def test_sums_in_place_of_a_residual_network_take_nothing_away():
    unsigned = place_quantizers(resnet18()).unsigned
    assert unsigned == {name for name, kind in resnet18().named_modules() if isinstance(kind, nn.Conv2d | nn.Linear)} - {
        "conv1"
    }


def test_an_unsigned_quantizer_that_saw_a_negative_value_is_named():
    require_no_negative("layer.input", 0.0)
    with pytest.raises(NotPreparedError, match=r"layer\.input: an unsigned grid was chosen.*it saw -0\.25"):
        require_no_negative("layer.input", -0.25)


@pytest.mark.parametrize("between", NEVER_NEGATIVE)
def test_what_is_never_negative_is_taken_for_unsigned(between):
    assert "second" in place_quantizers(_Between(NEVER_NEGATIVE[between])).unsigned


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
@pytest.mark.parametrize("between", ["product", "sum", "alpha"])
def test_negative_inputs_of_four_bits_survive(between, toolkit):
    torch.manual_seed(0)
    model, images = _Between(MAYBE_NEGATIVE[between]).eval(), torch.randn(32, 1, 12, 12)
    student = prepare(model, [images], toolkit, weight_bits=8, activation_bits=4)
    with torch.no_grad():
        exact, quantized = model(images), student(images)
    centred = exact - exact.mean(0)
    assert (quantized - exact).square().mean() < 0.2 * centred.square().mean()


def test_a_model_that_cannot_be_traced_is_prepared_with_a_warning(caplog):
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = self.first(x)
            if float(x.mean()) > 1e9:
                x = -x
            return self.second(x.mean([2, 3]))

    student = prepare(Dynamic(), [torch.rand(4, 1, 8, 8)])
    assert "cannot be traced" in caplog.text
    assert describe(student).weight_quantizers == 2


def test_the_observer_keeps_what_it_saw_over_batches_of_growing_range():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5000, generator=generator) * scale for scale in (0.1, 3.0, 0.5, 9.0)]
    observer = RangeObserver()
    for value in values:
        observer.observe(value)
    everything = torch.cat(values).abs()
    assert observer.maximum == float(everything.max())

    def error(clip):
        step = clip / 15
        return float(((torch.clamp(torch.round(everything / step), max=15) * step - everything) ** 2).mean())

    best = min(error(clip) for clip in torch.linspace(0.1, float(everything.max()), 500).tolist())
    assert error(observer.best_clip(15)) <= 1.02 * best


def test_weight_clips_beat_the_maximum_and_survive_zero_channels():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    clips = best_weight_clip(weight, -8, 7, axis=0)

    def error(clip):
        step = (clip / 7).clamp(min=1e-12)[:, None]
        return ((torch.clamp(torch.round(weight / step), -8, 7) * step - weight) ** 2).sum(1)

    assert clips[2] == 0
    assert bool((error(clips) <= error(weight.abs().amax(1)) + 1e-9).all())


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("low", "high", "shift"), [(-8, 7, 0.0), (-1.5, 1.5, 0.5)])
def test_weight_clips_are_those_of_the_least_squared_error_however_weights_are_cut(axis, low, high, shift, monkeypatch):
    monkeypatch.setattr("qakd_plugin.placement.calibration._PIECE", 37)
    weight = torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(0))
    rows = weight.double().numpy().reshape(1, -1) if axis is None else np.moveaxis(weight.double().numpy(), axis, 0)
    expected = []
    for row in rows.reshape(len(rows), -1):
        clips = np.linspace(0.2, 1.0, 81) * abs(row).max()
        codes = [np.rint(np.clip(row / (clip / high), low, high) + shift) - shift for clip in clips]
        errors = [((found * clip / high - row) ** 2).sum() for found, clip in zip(codes, clips, strict=True)]
        expected.append(clips[int(np.argmin(errors))])
    np.testing.assert_allclose(best_weight_clip(weight, low, high, axis, shift).reshape(-1), expected, rtol=1e-6)


def _fx(model, configuration, images):
    from torch.ao.quantization.backend_config import get_tensorrt_backend_config
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), configuration, (images,), backend_config=get_tensorrt_backend_config())


def _modelopt(model, configuration, images):
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model, configuration, lambda network: network(images))


def _pt2e(model, configuration, images):
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    graph = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    return prepare_qat_pt2e(graph, configuration)


def _torchao(model, configuration, images):
    from torchao.quantization import quantize_

    for config, chosen in configuration:
        quantize_(model, config, chosen)
    return model


def _eager(model, configuration, images):
    from torch.ao.quantization import QuantWrapper, prepare_qat

    for name, qconfig in configuration.items():
        model.get_submodule(name).qconfig = qconfig
    wrapped = QuantWrapper(model.train())
    wrapped.quant.qconfig = next(iter(configuration.values()))
    return prepare_qat(wrapped)


CALLS = {"modelopt": _modelopt, "pt2e": _pt2e, "torchao": _torchao, "torch_ao": _fx, "torch_ao_eager": _eager}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("toolkit", CALLS)
def test_the_configuration_can_be_had_on_its_own(toolkit, teacher, calibration, tmp_path):
    configured = configuration(teacher, toolkit, keep=("stages.1.*",))
    student = CALLS[toolkit](copy.deepcopy(teacher), configured, calibration[0])
    student(calibration[0])
    described = describe(student)
    assert described.toolkit == toolkit
    weights = [q.name for q in described.quantizers if q.role == "weight"]
    assert weights
    if toolkit != "pt2e":  # whose names torchao makes
        assert not [name for name in weights if "stages.1." in name]
    adapter_for(student).set_mode(student, False)
    assert export_onnx(student, calibration[0], tmp_path / "s.onnx").parity.toolkit_deviation < 1e-4


@pytest.mark.parametrize("toolkit", ["torch_ao", "torch_ao_eager"])
def test_torch_ao_has_no_configuration_for_fewer_activation_bits(toolkit, teacher):
    with pytest.raises(QakdError, match="activation_bits=4"):
        configuration(teacher, toolkit, activation_bits=4)


# -- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"toolkit": "brevitas"}, "toolkit='brevitas'"),
        ({"weight_bits": 1}, "weight_bits=1"),
        ({"activation_bits": 9}, "activation_bits=9"),
        ({"keep": ("nothing*",)}, "keep: 'nothing"),
        ({"keep": ("*",)}, "no convolution or linear layer"),
    ],
)
def test_bad_arguments_are_named(options, message, teacher, calibration):
    with pytest.raises(QakdError, match=message):
        prepare(teacher, calibration, **options)


def test_missing_or_bad_calibration_data_is_named(teacher):
    with pytest.raises(QakdError, match="calibration_batches is empty"):
        prepare(teacher, [])
    with pytest.raises(QakdError, match="batch 1"):
        prepare(teacher, [torch.rand(2, 1, 32, 32), torch.full((2, 1, 32, 32), float("nan"))])


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_batches_that_the_network_cannot_compute_are_named(toolkit, teacher):
    good, colours = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    for batches, index in (([colours], 0), ([good, colours], 1)):
        expected = rf"cannot compute batch {index}, 'input' \(2, 3, 32, 32\) float32: .*3 channels.*batch_fn="
        with pytest.raises(QakdError, match=expected):
            prepare(teacher, batches, toolkit)
    if toolkit != "torch_ao":  # which folds BatchNorm first: what is left computes a single image
        with pytest.raises(QakdError, match=r"'input' \(1, 32, 32\) float32: .*pass a list of batches, \[images\]"):
            prepare(teacher, good, toolkit)


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_a_layer_that_an_infinite_value_reaches_in_calibration_is_named(toolkit):
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(torch.exp(1e3 * self.first(x)))

    torch.manual_seed(0)
    with pytest.raises(
        NotPreparedError, match=r"^(second|activation_post_process_\d).*: what is quantized there is not finite"
    ):
        prepare(Overflows(), [torch.rand(8, 4)], toolkit)


def test_a_prepared_model_is_not_prepared_again(make_student, calibration):
    with pytest.raises(NotPreparedError, match="prepared by modelopt already"):
        prepare(make_student(), calibration)


def test_describe_refuses_a_float_model(teacher):
    with pytest.raises(NotPreparedError):
        describe(teacher)


def test_a_missing_toolkit_is_named_with_its_pip_line(teacher, calibration, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[modelopt\]'"):
        prepare(teacher, calibration)


@pytest.mark.parametrize("toolkit", [*TOOLKITS, "pt2e"])
def test_looking_at_a_prepared_model_does_not_change_it(toolkit, make_student, digits):
    """FX's and PT2E's ranges follow what the model is called on, in eval mode as well."""
    student, images = make_student(toolkit), digits.train[0][:32]
    with torch.no_grad():
        before = student(images)
        student(5 * images - 1)
        assert torch.equal(student(images), before)


@pytest.mark.parametrize("toolkit", ["torch_ao", "pt2e"])
def test_ranges_of_a_prepared_model_follow_its_training(toolkit, make_student, digits):
    student, images = make_student(toolkit), digits.train[0][:32]
    before = _scales(student)
    with attach(student, None, method=QAT()) as attached:
        attached.train()
        student(5 * images - 1)
    assert any(not torch.equal(before[name], scale) for name, scale in _scales(student).items())


def _scales(student):
    adapter = adapter_for(student)
    return {q.fqn: adapter.qparams(q).scale.clone() for q in adapter.quantizers(student) if q.role == "activation"}
