"""What each toolkit does behind its user's back, found by running it, and what this package makes of it."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from nets import Structures, trained
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, QConfig, QConfigMapping, prepare_qat
from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver as PerChannel
from torch.ao.quantization.backend_config import get_tensorrt_backend_config
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torchvision.ops import StochasticDepth

from qakd_plugin import LSQ, SQAKD, NotPreparedError, describe, distill, export_onnx, prepare, use_quantizers
from qakd_plugin.toolkits import adapter_for

pytestmark = pytest.mark.filterwarnings("ignore")
SYMMETRIC = QConfig(
    activation=FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    ),
    weight=FakeQuantize.with_args(
        observer=PerChannel, quant_min=-127, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    ),
)


@pytest.fixture(scope="module")
def net(digits):
    torch.manual_seed(0)
    return trained(Structures(), *digits.train, steps=40)


@pytest.fixture
def images(digits):
    return digits.train[0][:64]


def _fx(model, images, **options):
    return prepare_qat_fx(copy.deepcopy(model).train(), QConfigMapping().set_global(SYMMETRIC), (images,), **options)


def _eager(model):
    prepared = copy.deepcopy(model).train()
    prepared.qconfig = SYMMETRIC
    return prepare_qat(nn.Sequential(torch.ao.quantization.QuantStub(SYMMETRIC), prepared).train())


def test_fx_without_tensorrts_backend_config_drops_all_activation_quantizers_and_is_warned_about(net, images, caplog):
    student = _fx(net, images)
    student(images)
    with caplog.at_level(logging.WARNING):
        distill(student, net, [images], epochs=1, seed=0)
    assert "quantizes weights only" in caplog.text
    assert "get_tensorrt_backend_config" in caplog.text


def test_fx_quantizers_that_are_shared_stay_shared(net, images, tmp_path):
    student = _fx(net, images, backend_config=get_tensorrt_backend_config())
    student(images)
    modules = {id(m) for _, m in student.named_modules(remove_duplicate=False) if isinstance(m, FakeQuantize)}
    names = [n for n, m in student.named_modules(remove_duplicate=False) if isinstance(m, FakeQuantize)]
    assert len(names) > len(modules)
    form = adapter_for(student).export_form(student)
    calls = [node.target for node in form.graph.nodes if node.op == "call_module" and "activation_post" in str(node.target)]
    assert len({id(form.get_submodule(name)) for name in calls}) < len(calls)
    assert export_onnx(student, images, tmp_path / "s.onnx").parity.toolkit_deviation < 1e-4


@pytest.mark.parametrize("make", [_fx, lambda model, _: _eager(model)], ids=["fx", "eager"])
def test_observers_that_go_on_in_eval_mode_are_stopped_at_the_end(make, net, images):
    student = make(net, images) if make is not _fx else _fx(net, images, backend_config=get_tensorrt_backend_config())
    student(images)
    scales = lambda: [q.module.scale.clone() for q in adapter_for(student).quantizers(student)]  # noqa: E731
    student.eval()
    before = scales()
    student(5 * images)
    assert any(not torch.equal(a, b) for a, b in zip(before, scales(), strict=True))  # the trap
    distill(student, net, [images], epochs=1, seed=0)
    before = scales()
    student(5 * images)
    assert all(torch.equal(a, b) for a, b in zip(before, scales(), strict=True))


@pytest.mark.parametrize("make", [_fx, lambda model, _: _eager(model)], ids=["fx", "eager"])
def test_a_model_that_was_never_calibrated_is_named(make, net, images):
    with pytest.raises(NotPreparedError, match="never saw a batch"):
        distill(make(net, images), net, [images], epochs=1)


@pytest.mark.parametrize("toolkit", ["torch_ao", "torch_ao_eager"])
def test_a_gamma_of_zero_in_a_fused_layer_is_named(toolkit, digits, calibration):
    torch.manual_seed(0)
    model = trained(Structures(functional=toolkit == "torch_ao_eager"), *digits.train, steps=5)
    with torch.no_grad():
        model.second[1].weight[3] = 0  # as zero_init_residual does
    with pytest.raises(NotPreparedError, match=r"second\.0: its BatchNorm has gamma = 0 in channel 3"):
        prepare(model, calibration, toolkit)


def test_modelopt_takes_a_gamma_of_zero(digits, calibration, tmp_path):
    torch.manual_seed(0)
    model = trained(Structures(), *digits.train, steps=5)
    with torch.no_grad():
        model.second[1].weight[3] = 0
    student = prepare(model, calibration, "modelopt")
    distill(student, model, [calibration[0]], epochs=1)
    assert export_onnx(student, calibration[0], tmp_path / "s.onnx").parity.toolkit_deviation < 1e-4


def test_a_scale_is_read_and_not_computed_again(net, images):
    """torch.ao divides by 127.5 where others divide by 127."""
    student = _fx(net, images, backend_config=get_tensorrt_backend_config())
    student(images)
    adapter = adapter_for(student)
    quantizer = next(q for q in adapter.quantizers(student) if q.role == "activation")
    observer = quantizer.module.activation_post_process
    largest = float(torch.maximum(-observer.min_val, observer.max_val))
    assert float(adapter.qparams(quantizer).scale) == pytest.approx(largest / 127.5, rel=1e-6)


# -- ModelOpt


def _modelopt(model, images, config):
    import modelopt.torch.quantization as mtq

    return mtq.quantize(copy.deepcopy(model), config, lambda network: network(images))


def test_modelopts_wildcards_in_front_of_poolings_and_norms_are_exported_exactly(net, images, tmp_path):
    import modelopt.torch.quantization as mtq

    student = _modelopt(net, images, mtq.INT8_DEFAULT_CFG)
    names = {q.name for q in describe(student).quantizers}
    assert "pool.input_quantizer" in names
    assert "mean.input_quantizer" in names
    proof = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert proof.toolkit_deviation < 1e-4
    four_bits = {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}, "enable": True},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 4, "axis": None}, "enable": True},
            {"quantizer_name": "*output_quantizer", "enable": False},
        ],
        "algorithm": "max",
    }
    student = _modelopt(net, images, four_bits)
    assert "stem.1.input_quantizer" in {q.name for q in describe(student).quantizers}  # in front of BatchNorm
    proof = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime").parity
    assert proof.toolkit_deviation < 1e-4


@pytest.mark.parametrize("switch", ["disable", "disable_quant"])
def test_a_quantizer_that_the_user_disabled_stays_disabled(switch, calibration, net, mentor, tmp_path):
    student = prepare(net, calibration, "modelopt")
    quantizer = student.first[0][0].weight_quantizer
    getattr(quantizer, switch)()
    before = len(describe(student).quantizers)
    adapter_for(student).set_fake_quant(student, False)
    adapter_for(student).set_fake_quant(student, True)
    assert len(describe(student).quantizers) == before
    distill(student, mentor, [calibration[0]], epochs=1, seed=0)
    assert "first.0.0.weight_quantizer" not in {q.name for q in describe(student).quantizers}
    assert quantizer._disabled or not quantizer._if_quant
    assert export_onnx(student, calibration[0], tmp_path / "s.onnx").parity.toolkit_deviation < 1e-4


@pytest.mark.parametrize("toolkit", ["torch_ao", pytest.param("torch_ao_eager", marks=pytest.mark.matrix), "pt2e"])
def test_a_fake_quantizer_that_the_user_switched_off_stays_off_and_is_exported_in_floating_point(
    toolkit, prepared, mentor, images, tmp_path
):
    student = prepared(toolkit)
    adapter = adapter_for(student)
    everything = adapter.quantizers(student)
    # A convolution and a linear layer, both with a ReLU, and an operand of the add.
    off = [q for q in everything if any(part in name for part in ("last", "hidden", "second") for name in (q.fqn, *q.layers))]
    assert {q.role for q in off} == {"weight", "activation"}
    for quantizer in off:
        quantizer.module.disable_fake_quant()
    left = [q.fqn for q in everything if q.fqn not in {q.fqn for q in off}]

    def unchanged():
        assert [q.fqn for q in adapter.quantizers(student)] == left
        assert [q.name for q in describe(student).quantizers] == left
        assert not any(bool(student.get_submodule(q.fqn).fake_quant_enabled) for q in off)

    unchanged()
    adapter.set_fake_quant(student, False)
    assert [q.fqn for q in adapter.quantizers(student)] == left, "what is only paused is not lost"
    adapter.set_fake_quant(student, True)
    unchanged()
    distill(student, mentor, [images], epochs=1, seed=0)
    unchanged()
    use_quantizers(student, LSQ(activation_bits=6), calibration_batches=[images])
    unchanged()
    distill(student, mentor, [images], epochs=1, seed=0)
    unchanged()
    removed = sum(q.weight().numel() for q in off if q.weight is not None)
    whole = sum(q.weight().numel() for q in everything if q.weight is not None)
    for target in ("tensorrt", "onnxruntime", "openvino"):
        parity = export_onnx(student, images, tmp_path / f"{target}.onnx", target=target).parity
        assert max(parity.runtime_deviation, parity.toolkit_deviation) < 1e-4
        assert parity.weight_codes == whole - removed


# -- torch.fx


class _OnlyInTraining(nn.Module):
    """Dropout and stochastic depth as functions, and a head that training alone uses."""

    def __init__(self, auxiliary):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block, self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), StochasticDepth(0.5, "row")
        self.head, self.auxiliary = nn.Linear(8, 10), nn.Linear(8, 10) if auxiliary else None

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.depth(self.block(x))).mean([2, 3])
        logits = self.head(F.dropout(x, 0.3, self.training))
        return logits + self.auxiliary(x) if self.training and self.auxiliary is not None else logits


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_what_a_network_does_in_training_alone_is_not_part_of_the_deployed_one(toolkit, training, auxiliary, images, tmp_path):
    torch.manual_seed(0)
    model = _OnlyInTraining(auxiliary).train()
    for _ in range(5):
        model(images)
    student = prepare(model.train(training), [images], toolkit)
    adapter = adapter_for(student)
    assert model.training is training
    adapter.freeze_ranges(student, True)
    with torch.no_grad():
        assert torch.equal(student(images), student(images))
        parity = export_onnx(student, images, tmp_path / "student.onnx").parity
        assert max(parity.runtime_deviation, parity.toolkit_deviation) < 1e-4
        adapter.set_fake_quant(student, False)
        torch.testing.assert_close(student(images), model.eval()(images), atol=1e-5, rtol=1e-5)


def test_functions_that_know_training_follow_the_mode_of_an_fx_model(images):
    torch.manual_seed(0)
    model = _OnlyInTraining(False).train()
    model(images)
    student = prepare(model, [images], "torch_ao")
    adapter_for(student).set_fake_quant(student, False)
    student = copy.deepcopy(student)
    outputs = {}
    for name, network in (("float", copy.deepcopy(model)), ("student", student)):
        for training in (True, False):
            network.train(training)
            torch.manual_seed(1)
            outputs[name, training] = network(images)
    for training in (True, False):
        torch.testing.assert_close(outputs["student", training], outputs["float", training], atol=1e-5, rtol=1e-5)
    assert (outputs["student", True] - outputs["student", False]).abs().max() > 1e-2


# -- PT2E


def _pt2e(model, images):
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from qakd_plugin.toolkits.pt2e.quantizer import SymmetricQuantizer

    graph = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    return prepare_qat_pt2e(graph, SymmetricQuantizer())


def test_pt2e_changes_the_eps_of_batch_norm_and_distill_says_so(images, digits, caplog):
    torch.manual_seed(0)
    model = Structures()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-1
    model = trained(model, *digits.train, steps=20)
    student = _pt2e(copy.deepcopy(model), images)
    student(images)
    with caplog.at_level(logging.WARNING):
        distill(student, model, [images], epochs=1, seed=0)
    assert "is not the teacher although all weights are equal" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        distill(prepare(model, [images], "pt2e"), model, [images], epochs=1, seed=0)
    assert "is not the teacher" not in caplog.text


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_nothing_is_said_about_a_student_that_is_its_teacher(toolkit, net, calibration, caplog):
    with caplog.at_level(logging.WARNING):
        distill(prepare(net, calibration, toolkit), net, [calibration[0]], epochs=1, lr=1e-3, seed=0)
    assert not [record for record in caplog.records if record.name.startswith("qakd_plugin")]


def test_a_target_that_cannot_take_the_model_is_named_before_the_first_epoch(net, images, caplog):
    affine = QConfig(
        activation=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8),
        weight=SYMMETRIC.weight,
    )
    student = prepare_qat_fx(copy.deepcopy(net).train(), QConfigMapping().set_global(affine), (images,))
    student(images - 0.5)
    warned = []

    class First:
        def on_step_end(self, step, losses):
            warned.append(caplog.text)

    with caplog.at_level(logging.WARNING):
        distill(student, net, [images], epochs=1, seed=0, callbacks=[First()])
    assert "cannot be exported for tensorrt: activation_post_process" in warned[0]
    assert "TensorRT takes zero point 0 only" in warned[0]


def test_control_flow_that_cannot_be_traced_is_named_before_the_first_epoch(calibration, caplog):
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

        def forward(self, x):
            x = self.first(x)
            return self.second((-x if float(x.mean()) > 1e9 else x).mean([2, 3]))

    model = Dynamic().eval()
    with caplog.at_level(logging.WARNING):
        distill(prepare(model, calibration), model, [calibration[0]], method=SQAKD(), epochs=1)
    assert "cannot be exported for tensorrt and onnxruntime and openvino: torch.export cannot trace" in caplog.text


def test_learnable_quantizers_of_torchao_get_their_parameters_before_the_optimizer_is_made(net, images, tmp_path):
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

    student = prepare(net, [images], "pt2e")
    learnable = pytest.importorskip("torchao.quantization.pt2e.learnable_fake_quantize").LearnableFakeQuantize
    replaced = []
    for name, module in list(student.named_modules()):
        if isinstance(module, FakeQuantizeBase) and name.endswith("input_fake_quant"):
            made = learnable(observer=module.activation_post_process.__class__, quant_min=-128, quant_max=127,
                             dtype=torch.int8, qscheme=torch.per_tensor_symmetric)  # fmt: skip
            made.enable_range_learning()
            parent, _, child = name.rpartition(".")
            setattr(student.get_submodule(parent), child, made)
            replaced.append(made)
    assert replaced
    student(images)
    distill(student, net, [images] * 3, epochs=1, seed=0, quantizer_lr=1e-2)
    assert export_onnx(student, images, tmp_path / "s.onnx").parity.toolkit_deviation < 1e-4
