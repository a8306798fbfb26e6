"""use_quantizers() and back: inside each toolkit's structure, with its own save, restore and convert."""

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from agreement import require_same_but_for_ties, tolerated_sqnr_db
from nets import Structures, trained
from torch import nn

from qakd_plugin import (
    EWGS,
    LSQ,
    PACT,
    QAT,
    QKD,
    SQAKD,
    DoReFa,
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
from qakd_plugin.deploy.parity.report import agreement
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training import trainer as loop
from qakd_plugin.training.config import Settings
from qakd_plugin.training.optimizers import student_optimizer

TOOLKITS = ["modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager"]
QUANTIZERS = [LSQ(), PACT(), DoReFa(), EWGS()]


@pytest.fixture(scope="module")
def float_nets(digits):
    torch.manual_seed(0)
    return {functional: trained(Structures(functional=functional), *digits.train, steps=60) for functional in (False, True)}


@pytest.fixture
def student_of(float_nets, calibration):
    def make(toolkit, bits=4):
        model = float_nets[toolkit == "torch_ao_eager"]
        return prepare(model, calibration, toolkit, weight_bits=bits, activation_bits=bits)

    return make


def _logits(model, images):
    adapter_for(model).freeze_ranges(model, True)
    with torch.no_grad():
        return model(images)


def _covering(toolkits):
    """Every quantizer with the toolkit that is prepared fastest, and one with every other; the rest is for the matrix."""
    for toolkit in toolkits:
        for index, config in enumerate(QUANTIZERS):
            marks = () if toolkit == "modelopt" or index == 0 else pytest.mark.matrix
            yield pytest.param(config, toolkit, id=f"{type(config).__name__}-{toolkit}", marks=marks)


@pytest.mark.parametrize(("config", "toolkit"), _covering(TOOLKITS))
def test_there_and_back_computes_the_same(config, toolkit, student_of, float_nets, batches, digits):
    student, images = student_of(toolkit), digits.test[0]
    teacher = float_nets[toolkit == "torch_ao_eager"]
    use_quantizers(student, config)
    distill(student, teacher, [x for x, _ in batches[:2]], epochs=1, lr=1e-3, seed=0)
    adapter = adapter_for(student)
    adapter.freeze_ranges(student, True)
    learned = adapter.export_form(student)
    require_same_but_for_ties(learned, student, images)
    assert restore_quantizers(student) is student
    assert all(adapter.learned(quantizer) is None for quantizer in adapter.quantizers(student))
    assert not [name for name, _ in student.named_parameters() if "qakd_" in name]
    # Rounding ties fall one way in one arithmetic and the other way in the other.
    adapter.freeze_ranges(student, True)
    require_same_but_for_ties(learned, student, images)
    # And the toolkit's own quantizers go on from there.
    distill(student, teacher, [x for x, _ in batches[:1]], epochs=1, seed=0)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_state_and_copies_carry_learned_quantizers(toolkit, student_of, digits):
    images = digits.test[0][:16]
    student, fresh = (use_quantizers(student_of(toolkit), EWGS(delta=0.3)) for _ in range(2))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "qakd_" in name:
                parameter.add_(0.1)
    assert not torch.equal(_logits(student, images), _logits(fresh, images))
    fresh.load_state_dict(student.state_dict())
    assert torch.equal(_logits(student, images), _logits(fresh, images))
    assert torch.equal(_logits(copy.deepcopy(student), images), _logits(student, images))


@pytest.mark.parametrize("config", QUANTIZERS, ids=lambda c: type(c).__name__)
def test_modelopt_saves_and_restores_learned_quantizers(config, tmp_path, student_of, float_nets, batches, digits):
    import modelopt.torch.opt as mto

    student, images = use_quantizers(student_of("modelopt"), config), digits.test[0][:32]
    distill(student, float_nets[False], [x for x, _ in batches[:2]], epochs=1, lr=1e-3, seed=0)
    mto.save(student, tmp_path / "student.pth")
    restored = mto.restore(copy.deepcopy(float_nets[False]), tmp_path / "student.pth").eval()
    assert torch.equal(_logits(restored, images), _logits(student, images))
    assert str(describe(restored)) == str(describe(student))
    assert export_onnx(restored, images, tmp_path / "s.onnx").parity.toolkit_deviation < 1e-4


def _require_close(converted, expected, student, images):
    """Another program for the same student: codes on ties may be others, and nothing else."""
    assert agreement(expected.numpy(), converted.numpy()).sqnr_db > tolerated_sqnr_db(student, images)
    assert float((converted - expected).abs().median()) < 0.02 * float(expected.max() - expected.min())


def test_torch_ao_converts_learned_quantizers(student_of, digits):
    from torch.ao.quantization.backend_config import get_tensorrt_backend_config
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx

    student, images = use_quantizers(student_of("torch_ao", 8), LSQ()), digits.test[0]
    expected = _logits(student, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = convert_to_reference_fx(copy.deepcopy(student), backend_config=get_tensorrt_backend_config())
    with torch.no_grad():
        converted = reference(images)
    _require_close(converted, expected, student, images)


def test_torch_ao_eager_converts_learned_quantizers(student_of):
    from torch.ao.quantization import convert

    student = use_quantizers(student_of("torch_ao_eager", 8), LSQ())
    adapter = adapter_for(student)
    quantizer = next(q for q in adapter.quantizers(student) if q.fqn == "module.second.0.weight_fake_quant")
    weight, params = quantizer.layer.weight.detach(), adapter.qparams(quantizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = convert(copy.deepcopy(student))
    stored = converted.get_submodule("module.second.0").weight()
    torch.testing.assert_close(stored.q_per_channel_scales().float(), params.scale)
    assert stored.int_repr().shape == weight.shape
    exported = adapter.export_form(student).get_submodule("module.second.0").weight
    assert float((stored.int_repr() == exported.codes).float().mean()) > 0.999


@pytest.mark.matrix
def test_pt2e_converts_learned_quantizers(student_of, digits):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    student, images = use_quantizers(student_of("pt2e", 8), LSQ()), digits.test[0]
    expected = _logits(student, images)
    with torch.no_grad():
        converted = convert_pt2e(copy.deepcopy(student))(images)
    _require_close(converted, expected, student, images)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_converts_learned_quantizers(bits, student_of, digits):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig

    student, images = use_quantizers(student_of("torchao", bits), LSQ(weight_bits=bits)), digits.test[0][:64]
    expected = _logits(student, images)
    base = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity=PerAxis(0))
    quantize_(student, QATConfig(base, step="convert"))
    with torch.no_grad():
        torch.testing.assert_close(student(images), expected, atol=1e-4, rtol=1e-4)


def _convert_torch_ao(student):
    from torch.ao.quantization.backend_config import get_tensorrt_backend_config
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx

    convert_to_reference_fx(student, backend_config=get_tensorrt_backend_config())


def _convert_torchao(student):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig

    quantize_(student, QATConfig(IntxWeightOnlyConfig(torch.int8, granularity=PerAxis(0)), step="convert"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("toolkit", "convert"), [("torch_ao", _convert_torch_ao), ("torchao", _convert_torchao)])
def test_a_convert_that_would_change_the_model_is_refused(toolkit, convert, student_of):
    student = use_quantizers(student_of(toolkit, 8), DoReFa())
    with pytest.raises(UnsupportedQuantizerError, match="restore_quantizers"):
        convert(student)


def test_bits_that_are_not_given_stay_and_bits_that_are_given_hold(student_of, calibration, caplog):
    student = student_of("modelopt", 4)
    before = {q.name: q.bits for q in describe(student).quantizers}
    use_quantizers(student, LSQ())
    assert {q.name: q.bits for q in describe(student).quantizers} == before
    assert "fewer bits" not in caplog.text
    use_quantizers(student, LSQ(weight_bits=3, activation_bits=2), keep=("head", "stem*"), calibration_batches=calibration)
    after = {q.name: q for q in describe(student).quantizers}
    kept = {name for name in after if name.startswith(("head.", "stem."))}
    assert {name: after[name].bits for name in kept} == {name: before[name] for name in kept}
    assert {q.bits for name, q in after.items() if name not in kept and q.role == "weight"} == {3}
    assert {q.bits for name, q in after.items() if name not in kept and q.role == "activation"} == {2}
    assert "fewer bits" in caplog.text  # the residual's 8 bits, which prepare() gave it


def test_kept_quantizers_stay_the_toolkits_own(student_of):
    for toolkit, pattern in (("modelopt", "left*"), ("torch_ao", "left*"), ("pt2e", "left*"), ("torchao", "head")):
        student = student_of(toolkit)
        use_quantizers(student, LSQ(), keep=(pattern,))
        adapter = adapter_for(student)
        learned = {q.fqn: adapter.learned(q) is not None for q in adapter.quantizers(student)}
        weights = [fqn for fqn in learned if pattern.rstrip("*") in fqn and "weight" in fqn]
        assert weights, toolkit
        assert not any(learned[fqn] for fqn in weights)
        assert any(learned.values())


def test_calibration_finds_ranges_and_signs(float_nets, calibration, digits):
    """A signed 8-bit configuration behind a ReLU becomes unsigned at 4 bits, with a range from all batches."""
    import modelopt.torch.quantization as mtq

    model = copy.deepcopy(float_nets[False])
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}, "enable": True},
            {"quantizer_name": "last.0.0.input_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True},
            {"quantizer_name": "stem.0.input_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True},
        ],
        "algorithm": "max",
    }
    student = mtq.quantize(model, config, lambda net: [net(batch) for batch in calibration])
    use_quantizers(student, LSQ(activation_bits=4), calibration_batches=[x - 0.5 for x in calibration])
    codes = {q.name: (q.quant_min, q.quant_max) for q in describe(student).quantizers}
    assert codes["last.0.0.input_quantizer"] == (0, 15)
    assert codes["stem.0.input_quantizer"] == (-8, 7)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao", "torch_ao_eager"])
def test_calibration_does_not_depend_on_the_mode_and_changes_nothing_else(frozen, toolkit, student_of, calibration):
    student, evaluated = student_of(toolkit, 8), student_of(toolkit, 8)
    adapter = adapter_for(student)
    adapter.set_mode(student, True)
    adapter.freeze_ranges(student, frozen)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    for model in (student, evaluated):
        use_quantizers(model, LSQ(activation_bits=3), keep=("*stem*",), calibration_batches=calibration)
    assert str(describe(student)) == str(describe(evaluated))
    assert student.training
    # Statistics of BatchNorm and the quantizers that were kept: ranges, and whether their observers are on.
    modules = {q.module for q in adapter.quantizers(student) if adapter.learned(q) is not None}
    learned = tuple(f"{name}." for name, module in student.named_modules(remove_duplicate=False) if module in modules)
    others = {name: value for name, value in student.state_dict().items() if not name.startswith(learned)}
    assert any("running_mean" in name for name in others)
    assert all(torch.equal(before[name], value) for name, value in others.items())
    observers = [bool(value) for name, value in others.items() if name.endswith("observer_enabled")]
    assert set(observers) == (set() if toolkit == "modelopt" else {not frozen})


def test_quantizer_parameters_have_groups_of_their_own(student_of):
    student = use_quantizers(student_of("modelopt"), EWGS())
    optimizer = student_optimizer(adapter_for(student), student, Settings(lr=0.1, quantizer_lr=0.03, weight_decay=0.2))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = [group for group in optimizer.param_groups if group["lr"] == 0.03]  # of weights, and of activations
    assert [group["weight_decay"] for group in groups] == [0, 0]
    assert {names[id(p)] for group in groups for p in group["params"]} == {name for name in names.values() if "qakd_" in name}
    assert len({id(p) for g in optimizer.param_groups for p in g["params"]}) == len(names)


def test_delta_is_refreshed_on_schedule_and_resumed_with_the_run(tmp_path, student_of, float_nets, batches):
    def deltas(student):
        return {name: float(value) for name, value in student.named_buffers() if name.endswith("qakd_delta")}

    images = [x for x, _ in batches[:2]]
    frozen = use_quantizers(student_of("modelopt"), EWGS(delta=0.25, refresh_every=0))
    distill(frozen, float_nets[False], images, epochs=1, seed=0)
    assert set(deltas(frozen).values()) == {0.25}
    seen = []

    class Watch:
        def on_epoch_end(self, row):
            seen.append(deltas(student))

    student = use_quantizers(student_of("modelopt"), EWGS(delta=0.25, refresh_every=2))
    distill(student, float_nets[False], images, epochs=3, lr=1e-3, seed=0, callbacks=[Watch()])
    assert all(value >= 0 for value in seen[0].values())
    assert len(set(seen[0].values())) > len(seen[0]) // 2
    assert seen[0] == seen[1]
    assert seen[1] != seen[2]

    class Stop(Exception):
        pass

    class StopAfterTwo:
        def on_epoch_end(self, row):
            if row["epoch"] == 1:
                raise Stop

    resumed = use_quantizers(student_of("modelopt"), EWGS(delta=0.25, refresh_every=2))
    options = {"epochs": 3, "lr": 1e-3, "seed": 0, "checkpoint_dir": tmp_path}
    with pytest.raises(Stop):
        distill(resumed, float_nets[False], images, callbacks=[StopAfterTwo()], **options)
    distill(resumed, float_nets[False], images, resume=True, **options)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_new_delta_leaves_a_teacher_that_learns_as_it_was(student_of, float_nets, batches, monkeypatch):
    seen = []
    refresh = loop.Trainer._refresh_curvature

    def watched(trainer, phase):
        before = [buffer.clone() for buffer in trainer.networks.teacher.buffers()]
        refresh(trainer, phase)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, trainer.networks.teacher.buffers(), strict=True)))

    monkeypatch.setattr(loop.Trainer, "_refresh_curvature", watched)
    student = use_quantizers(student_of("modelopt"), EWGS(delta=0.25, refresh_every=1))
    distill(student, float_nets[True], batches[:2], method=QKD(0, 3, 0), seed=0)
    assert seen == [True] * 3


@pytest.mark.parametrize(("config", "toolkit"), _covering(TOOLKITS))
def test_weights_that_moved_since_the_last_pass_are_exported_exactly(config, toolkit, student_of, digits, tmp_path):
    student, images = use_quantizers(student_of(toolkit), config), digits.test[0][:16]
    adapter_for(student).freeze_ranges(student, True)
    with torch.no_grad():
        student(images)
        for quantizer in adapter_for(student).quantizers(student):
            if quantizer.layer is not None:
                quantizer.layer.weight.mul_(1.3)
    parity = export_onnx(student, images, tmp_path / "student.onnx").parity
    assert max(parity.runtime_deviation, parity.toolkit_deviation) < 1e-4


def test_learned_quantizers_train_under_bfloat16(student_of, float_nets, batches):
    student = use_quantizers(student_of("modelopt"), LSQ())
    before = {name: p.detach().clone() for name, p in student.named_parameters() if "qakd_" in name}
    distill(student, float_nets[False], batches[:2], method=QAT(), epochs=1, seed=0, mixed_precision="bf16")
    after = dict(student.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


# -- bad input


def test_bad_arguments_leave_the_model_as_it_was(student_of, float_nets, digits):
    student, images = student_of("modelopt"), digits.test[0][:8]
    before = _logits(student, images)
    for arguments, error, message in (
        ({"config": LSQ(), "keep": ("nothing*",)}, QakdError, "keep: 'nothing"),
        ({"config": LSQ(), "keep": ("*",)}, QakdError, "nothing is left to swap"),
        ({"config": DoReFa(activation_bits=1)}, QakdError, "activation_bits=1"),
        ({"config": LSQ(activation_bits=2), "calibration_batches": []}, QakdError, "calibration_batches is empty"),
    ):
        with pytest.raises(error, match=message):
            use_quantizers(student, **arguments)
        assert torch.equal(_logits(student, images), before)
    with pytest.raises(QakdError, match="to take back"):
        restore_quantizers(student)
    with pytest.raises(NotPreparedError):
        use_quantizers(copy.deepcopy(float_nets[False]), LSQ())


def test_fewer_bits_without_calibration_are_warned_about(student_of, caplog):
    with caplog.at_level(logging.WARNING):
        use_quantizers(student_of("modelopt", 8), LSQ(activation_bits=4))
    assert "without calibration_batches" in caplog.text


def test_an_asymmetric_quantizer_is_named(float_nets, digits):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    images = digits.test[0][:32]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student = prepare_qat_fx(copy.deepcopy(float_nets[False]).train(), get_default_qat_qconfig_mapping("x86"), (images,))
    student(images)
    with pytest.raises(UnsupportedQuantizerError, match=r"activation_post_process_\d+: asymmetric"):
        use_quantizers(student, LSQ())


def test_sqakd_with_a_learned_quantizer_reports_what_it_found(student_of, float_nets, batches, caplog):
    student = use_quantizers(student_of("modelopt", 2), PACT())
    with caplog.at_level(logging.INFO):
        distill(student, float_nets[False], [x for x, _ in batches[:1]], method=SQAKD(), epochs=1, seed=0)
    assert "prepared by modelopt with PACT" in caplog.text


@pytest.mark.parametrize(("config", "toolkit"), _covering(["modelopt", "torch_ao", "pt2e"]))
def test_channels_last_trains_alike_and_stays(config, toolkit, student_of, batches):
    x, y = batches[0]
    gradients = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        student = use_quantizers(student_of(toolkit), config).to(memory_format=layout)
        adapter = adapter_for(student)
        seen = []
        for quantizer in adapter.quantizers(student):
            if quantizer.role == "activation":
                quantizer.module.register_forward_hook(lambda module, args, out, seen=seen: seen.append((args[0], out)))
        torch.nn.functional.cross_entropy(student(x.contiguous(memory_format=layout)), y).backward()
        assert sum(x.is_contiguous(memory_format=layout) for x, _ in seen) > 3
        assert all(x.stride() == out.stride() for x, out in seen)
        gradients[layout] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    one, other = gradients.values()
    assert one.keys() == other.keys()
    # Sums in another order, and values on rounding ties that fall to the other side.
    norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in one.items()}
    difference = torch.stack([torch.linalg.vector_norm(other[name] - gradient) for name, gradient in one.items()])
    assert torch.linalg.vector_norm(difference) <= 0.02 * torch.linalg.vector_norm(torch.stack(list(norms.values())))


def test_a_student_in_channels_last_is_exported_exactly(student_of, digits, tmp_path):
    student = use_quantizers(student_of("modelopt"), LSQ()).to(memory_format=torch.channels_last)
    exported = export_onnx(student, digits.test[0][:8], tmp_path / "student.onnx")
    assert exported.parity.weight_codes > 0


def test_modelopts_own_class_returns_with_its_own_quantizers(student_of):
    from modelopt.torch.quantization.nn import TensorQuantizer

    student = use_quantizers(student_of("modelopt"), LSQ())
    quantizers = [quantizer.module for quantizer in adapter_for(student).quantizers(student)]
    assert all(isinstance(module, TensorQuantizer) and type(module) is not TensorQuantizer for module in quantizers)
    restore_quantizers(student)
    assert all(type(module) is TensorQuantizer for module in quantizers)


class _InPlace(nn.Module):
    """Adds and ReLUs after quantizers, as torchvision's residual networks have them: in place, or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.conv1 = nn.Conv2d(1, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=self.inplace), 2)
        out = self.bn2(self.conv2(x))
        if self.inplace:
            out += x
        else:
            out = out + x
        out = F.relu(out, inplace=self.inplace)
        out = torch.cat([out, F.relu(self.conv3(out), inplace=self.inplace)], 1)[:, ::2]
        return self.head(out.mean([2, 3]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_networks_that_work_in_place_learn_alike(toolkit, digits):
    images, labels = digits.train[0][:32], digits.train[1][:32]
    gradients = []
    for inplace in (True, False):
        torch.manual_seed(0)
        student = use_quantizers(prepare(_InPlace(inplace).eval(), [images], toolkit, weight_bits=4), LSQ())
        adapter_for(student).set_mode(student, True)
        F.cross_entropy(student(images), labels).backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
