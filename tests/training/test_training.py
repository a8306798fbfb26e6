"""What the loop offers beside the methods: each option does what its name says, and nothing else."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

from qakd_plugin import (
    KD,
    LSQ,
    QAT,
    QKD,
    SQAKD,
    CheckpointError,
    Features,
    QakdError,
    TrainingError,
    attach,
    configuration,
    distill,
    use_quantizers,
)
from qakd_plugin.losses import kl_divergence
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.config import Settings
from qakd_plugin.training.ema import Ema
from qakd_plugin.training.optimizers import student_optimizer, teacher_optimizer
from qakd_plugin.training.teachers import MeanOfTeachers


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- accumulation


def test_accumulated_gradients_are_those_of_the_union(make_student, teacher, batches):
    """BatchNorm sees smaller batches, so the student is in eval mode: the gradient of a mean is all that is compared.

    In float64: sums in another order would move single activations across a rounding tie in float32.
    """
    gradients = []
    parts = [(x.double(), y) for x, y in (batches[0], (batches[1][0][:8], batches[1][1][:8]))]
    for data, accumulate in ((parts, 2), ([tuple(torch.cat(part) for part in zip(*parts, strict=True))], 1)):
        student = make_student("modelopt", 8).double()
        seen = {}
        original = torch.optim.AdamW.step

        def step(self, *args, student=student, seen=seen, original=original, **kwargs):
            seen.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
            return original(self, *args, **kwargs)

        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train = lambda mode=True, module=module: module
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            distill(student, teacher.double(), data, method=KD(), epochs=1, accumulate=accumulate, grad_clip=None)
        gradients.append(seen)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-9, atol=1e-12)


def test_steps_count_groups_of_batches_and_the_last_may_be_short(make_student, teacher, batches):
    steps = []

    class Count:
        def on_step_end(self, step, losses):
            steps.append(step)

    result = distill(make_student(), teacher, batches[:5], epochs=2, accumulate=2, callbacks=[Count()])
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(result.history) == 2


# -- moving average, statistics, early stop


def test_the_moving_average_is_the_formula(batches):
    layer = nn.Linear(3, 2)
    ema = Ema(layer, 0.9)
    expected = layer.weight.detach().double().clone()
    for update in range(4):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    trained = layer.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(layer.weight, trained)


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_averaged_weights_are_kept_and_training_goes_on_from_its_own(toolkit, make_student, teacher, batches):
    plain = distill(make_student(toolkit, 4), teacher, batches, epochs=2, seed=0, val_loader=batches)
    averaged = distill(make_student(toolkit, 4), teacher, batches, epochs=2, seed=0, val_loader=batches, ema=0.9)
    assert [row["kl"] for row in averaged.history[1:]] == [row["kl"] for row in plain.history[1:]]
    assert not _same(_weights(plain.model), _weights(averaged.model))


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e"])
def test_statistics_are_refreshed_for_evaluation_and_training_is_not_touched(toolkit, make_student, teacher, batches):
    plain = distill(make_student(toolkit, 4), teacher, batches, epochs=1, lr=1e-3, seed=0)
    fresh = distill(make_student(toolkit, 4), teacher, batches, epochs=1, lr=1e-3, seed=0, recalibrate_batches=6)
    assert [row["kl"] for row in fresh.history] == [row["kl"] for row in plain.history]
    differing = {
        name for name, value in _weights(plain.model).items() if not torch.equal(value, fresh.model.state_dict()[name])
    }
    assert differing
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in differing)


def test_training_stops_when_the_last_phase_no_longer_helps(make_student, teacher, batches):
    held_out = [(x, torch.full_like(y, 3)) for x, y in batches]  # nothing to gain: the labels are wrong
    result = distill(make_student(), teacher, batches, epochs=8, lr=0.0, quantizer_lr=0.0, val_loader=held_out, patience=2)
    assert [row["epoch"] for row in result.history] == [-1, 0, 1, 2]
    method = QKD(2, 0, 6)
    result = distill(make_student(), teacher, batches, method=method, lr=0.0, quantizer_lr=0.0, val_loader=held_out, patience=1)
    assert [row["phase"] for row in result.history] == ["start", "self-studying", "self-studying", "tutoring"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"recalibrate_batches": -1}, "recalibrate_batches=-1"),
        ({"patience": 2}, "patience needs val_loader"),
        ({"warmup": 2500}, "warmup=2500 must be a share"),
        ({"grad_clip": 0.0}, "grad_clip=0.0 must be positive"),
        ({"method": QAT(), "cache_teacher": "x"}, "QAT needs no teacher"),
        ({"method": QKD(), "cache_teacher": "x"}, "QKD learns too"),
        ({"method": SQAKD(features=Features(["head"])), "cache_teacher": "x"}, "features need"),
    ],
)
def test_bad_options_are_named(options, message, make_student, teacher, batches):
    with pytest.raises(QakdError, match=message):
        distill(make_student(), teacher, batches, epochs=1, **options)


def test_weights_and_both_kinds_of_quantizers_have_rates_of_their_own(make_student):
    student = use_quantizers(make_student(), LSQ())
    adapter = adapter_for(student)
    settings = Settings(lr=0.1, quantizer_lr=0.01, activation_quantizer_lr=0.5, weight_decay=0.2)
    rates = {}
    for group in student_optimizer(adapter, student, settings).param_groups:
        rates |= {id(p): (group["lr"], group["weight_decay"]) for p in group["params"]}
    for quantizer in adapter.quantizers(student):
        expected = 0.01 if quantizer.role == "weight" else 0.5
        assert {rates[id(p)] for p in quantizer.module.parameters()} == {(expected, 0.0)}
    assert rates[id(student.head.weight)] == (0.1, 0.2)


def test_norms_and_biases_of_a_teacher_that_learns_do_not_decay(teacher):
    decays = {}
    for group in teacher_optimizer(teacher, Settings(weight_decay=0.2, teacher_lr=0.3)).param_groups:
        assert group["lr"] == 0.3
        decays |= {id(p): group["weight_decay"] for p in group["params"]}
    assert [decays[id(p)] for p in teacher.parameters()] == [0.2 if p.ndim > 1 else 0.0 for p in teacher.parameters()]
    assert {0.0, 0.2} == set(decays.values())


def test_another_optimizer_takes_the_steps_that_it_takes_by_hand(make_student, teacher, batches):
    student, expected = make_student(), make_student()
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    options = {"lr": 0.05, "weight_decay": 0.0, "warmup": 0.0, "grad_clip": None}
    distill(student, teacher, batches, epochs=2, optimizer=sgd, **options)
    optimizer = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], 0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * len(batches))
    with attach(expected, teacher, SQAKD()) as kd:
        kd.train()
        for x, _ in 2 * batches:
            expected(x)
            kd.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        kd.eval()
    torch.testing.assert_close(dict(student.named_parameters()), dict(expected.named_parameters()))


def test_a_checkpoint_of_another_optimizer_is_refused(make_student, teacher, batches, tmp_path):
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "trackers": ()}
    distill(make_student(), teacher, batches, **options)
    with pytest.raises(CheckpointError, match="belongs to another run: optimizer"):
        distill(make_student(), teacher, batches, resume=True, optimizer=partial(torch.optim.SGD, momentum=0.9), **options)


# -- teachers


def test_a_teacher_that_shares_tensors_with_its_student_is_refused(teacher, batches):
    graph = torch.export.export(teacher, (batches[0][0],)).module()
    student = prepare_qat_pt2e(graph, configuration(teacher, "pt2e"))
    student(batches[0][0])
    before = _weights(teacher)
    for call in (lambda: distill(student, teacher, batches, epochs=1), lambda: attach(student, [teacher, teacher])):
        with pytest.raises(QakdError, match=r"teacher: its '.*' is the same tensor as .* of prepared_model"):
            call()
    assert _same(_weights(teacher), before)


def test_several_teachers_teach_their_mean(make_student, teacher, batches):
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.head.weight.mul_(0.5)
    x = batches[0][0]
    teacher.eval(), other.eval()
    assert torch.equal(MeanOfTeachers([teacher, other])(x), (teacher(x) + other(x)) / 2)
    several = distill(make_student(), [teacher, other], batches, epochs=1, lr=1e-3, seed=0)
    one = distill(make_student(), MeanOfTeachers([teacher, other]), batches, epochs=1, lr=1e-3, seed=0)
    assert _same(_weights(several.model), _weights(one.model))
    alone = distill(make_student(), [teacher], batches, epochs=1, seed=0)
    assert alone.teacher is teacher
    with pytest.raises(QakdError, match="sequence of networks"):
        distill(make_student(), [], batches, epochs=1)


def test_a_larger_teacher_may_learn_too(make_student, batches):
    from qakd_plugin.demo.net import DigitNet

    torch.manual_seed(1)
    large = DigitNet(width=16)
    result = distill(make_student(), large, batches, method=QKD(0, 1, 1), epochs=2, seed=0)
    assert not _same(_weights(large), _weights(result.teacher))


# -- features


def _relative_error(student, teacher):
    student, teacher = student.double().flatten(1), teacher.double().flatten(1)
    return ((student - teacher) ** 2).sum(1) / (teacher**2).sum(1)


@pytest.mark.parametrize("toolkit", ["modelopt", "torchao"])
def test_features_are_what_named_layers_read(toolkit, make_student, teacher, batches):
    student = make_student(toolkit, 4)
    x = batches[0][0]
    with attach(student, teacher, SQAKD(features=Features(["head"], weight=0.5))) as kd:
        found = {}
        handles = [
            network.head.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
            for name, network in (("student", student), ("teacher", teacher))
        ]
        logits = student(x)
        loss = kd.loss()
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        expected = _relative_error(found["student"], found["teacher"]).mean()
        logits_loss = kl_divergence(logits, teacher.eval()(x), 4.0).mean()
    assert float(kd.parts["features"]) == pytest.approx(float(expected), rel=1e-5)
    assert loss.item() == pytest.approx(float(logits_loss + 0.5 * expected), rel=1e-5)


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e"])
def test_features_on_the_students_grid(toolkit, make_student, teacher, batches):
    """SQuaT: codes of the teacher's features, computed here from the quantizer's numbers in float64."""
    student = make_student(toolkit, 4)
    adapter = adapter_for(student)
    adapter.freeze_ranges(student, True)
    x = batches[0][0]
    (quantizer,) = [q for q in adapter.quantizers(student) if q.role == "activation" and "head" in q.layers]
    found = {}
    with attach(student, teacher, SQAKD(features=Features(["head"], through_quantizer=True))) as kd:
        handles = [
            quantizer.module.register_forward_hook(lambda _, args, out: found.update(student=out)),
            teacher.head.register_forward_pre_hook(lambda _, args: found.update(teacher=args[0])),
        ]
        student(x)
        kd.loss().backward()
        for handle in handles:
            handle.remove()
    params = adapter.qparams(quantizer)
    scale = params.scale.double()
    codes = (found["teacher"].double() / scale).round().clamp(params.quant_min, params.quant_max)
    assert float(kd.parts["features"]) == pytest.approx(
        _relative_error(found["student"], codes * scale).mean().item(), rel=1e-5
    )


def test_features_that_all_round_to_zero_count_in_codes_and_leave_gradients_finite(make_student, teacher, batches):
    student = make_student("modelopt", 2)
    adapter = adapter_for(student)
    adapter.freeze_ranges(student, True)
    (quantizer,) = [q for q in adapter.quantizers(student) if q.role == "activation" and "head" in q.layers]
    found = {}
    small = teacher.head.register_forward_pre_hook(lambda _, args: (1e-3 * args[0],))
    with attach(student, teacher, SQAKD(features=Features(["head"], through_quantizer=True))) as kd:
        handle = quantizer.module.register_forward_hook(lambda _, args, out: found.update(student=out))
        student(batches[0][0])
        kd.loss().backward()
        handle.remove()
    small.remove()
    codes = found["student"].double() / adapter.qparams(quantizer).scale.double()
    assert codes.abs().sum() > 0
    assert float(kd.parts["features"]) == pytest.approx(codes.flatten(1).square().sum(1).mean().item(), rel=1e-4)
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_features_are_learned_in_the_loop(make_student, teacher, batches):
    method = SQAKD(features=Features({"head": "head"}, through_quantizer=True))
    result = distill(make_student("modelopt", 4), teacher, batches, method=method, epochs=3, seed=0)
    assert result.history[-1]["features"] < result.history[0]["features"]
    assert not any(module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize(
    ("toolkit", "features", "message"),
    [
        ("pt2e", Features(["head"]), "PT2E has captured"),
        ("modelopt", Features(["nowhere"]), "no layer 'nowhere'"),
        ("modelopt", Features(["nowhere"], through_quantizer=True), "no layer 'nowhere'"),
        ("modelopt", Features({"stages": "head"}, through_quantizer=True), "no activation quantizer is read by 'stages'"),
        ("torch_ao", Features({"stages": "head"}), "does not call 'stages'|no layer 'stages'"),
        ("modelopt", Features({"stages.0": "head"}), "Name layers that read the same shape"),
    ],
)
def test_features_that_cannot_be_seen_are_named(toolkit, features, message, make_student, teacher, batches):
    with pytest.raises(QakdError, match=message):
        distill(make_student(toolkit), teacher, batches, method=SQAKD(features=features), epochs=1)


@pytest.mark.parametrize("make", [lambda: Features([]), lambda: Features("head"), lambda: Features(["head"], weight=0)])
def test_bad_features_are_named(make):
    with pytest.raises(QakdError, match="Features"):
        make()


# -- cached logits


class _CountCalls(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def test_cached_logits_are_the_teachers_and_spare_its_forward_passes(tmp_path, make_student, teacher, batches):
    plain = distill(make_student(), teacher, batches, epochs=3, lr=1e-3, seed=0)
    path = tmp_path / "logits.pt"
    counted = _CountCalls(teacher)
    first = distill(make_student(), counted, batches, epochs=3, lr=1e-3, seed=0, cache_teacher=path)
    calls = counted.calls
    assert _same(_weights(first.model), _weights(plain.model))
    again = distill(make_student(), counted, list(reversed(batches)), epochs=3, lr=1e-3, seed=0, cache_teacher=path)
    assert counted.calls - calls == calls - len(batches)  # the checks before training, and no batch
    assert again.history[0]["kl"] == pytest.approx(first.history[0]["kl"], rel=0.5)


def test_another_teacher_or_other_data_are_refused(tmp_path, make_student, teacher, batches):
    path = tmp_path / "logits.pt"
    distill(make_student(), teacher, batches, epochs=1, cache_teacher=path)
    with pytest.raises(QakdError, match="are not in"):
        distill(make_student(), teacher, [(x + 0.5, y) for x, y in batches], epochs=1, cache_teacher=path)
    with pytest.raises(QakdError, match="augmentation"):
        distill(make_student(), teacher, batches, epochs=1, cache_teacher=path, augment=lambda x: x * torch.rand(()))
    with torch.no_grad():
        teacher.head.bias.add_(1)
    with pytest.raises(CheckpointError, match="another teacher"):
        distill(make_student(), teacher, batches, epochs=1, cache_teacher=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is no file of a teacher's outputs: it is damaged"):
        distill(make_student(), teacher, batches, epochs=1, cache_teacher=path)


# -- phases of QKD, by hand, in float64


def test_each_phase_of_qkd_equals_a_hand_written_loop_bit_for_bit(make_student, teacher, batches):
    """Both networks step on every batch of co-studying, each with the other's logits detached; then the teacher is frozen."""
    data = [(x.double(), y) for x, y in batches[:2]]
    student, expected = make_student("modelopt", 8).double(), make_student("modelopt", 8).double()
    teacher = teacher.double()
    tau, steps = 2.0, 6
    options = {"lr": 1e-3, "quantizer_lr": 1e-3, "teacher_lr": 1e-4, "weight_decay": 1e-4, "grad_clip": 1.0, "warmup": 0.0}
    result = distill(student, teacher, data, method=QKD(1, 1, 1, temperature=tau), epochs=3, **options)

    other = copy.deepcopy(teacher)
    adapter = adapter_for(expected)
    optimizer = student_optimizer(adapter, expected, Settings(warmup=0.0, lr=1e-3))
    groups = [
        {"params": [p for p in other.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in other.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    learner = torch.optim.AdamW(groups, lr=1e-4)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + _cos(step / steps)))
    taught = torch.optim.lr_scheduler.LambdaLR(learner, lambda step: 0.5 * (1 + _cos(step / 2)))

    def kl(own, target):
        target = target.detach()
        log_p, log_q = F.log_softmax(own / tau, 1), F.log_softmax(target / tau, 1)
        return (tau**2 * (log_q.exp() * (log_q - log_p)).sum(1)).mean()

    for phase in ("self-studying", "co-studying", "tutoring"):
        for x, y in data:
            expected.train()
            z_s = expected(x)
            loss = F.cross_entropy(z_s, y, reduction="none").mean()
            if phase == "co-studying":
                other.train()
                z_t = other(x)
            elif phase == "tutoring":
                other.eval()
                with torch.no_grad():
                    z_t = other(x)
            if phase != "self-studying":
                loss = loss + kl(z_s, z_t)
            loss.backward()
            nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
            if phase == "co-studying":
                (F.cross_entropy(z_t, y, reduction="none").mean() + kl(z_t, z_s)).backward()
                nn.utils.clip_grad_norm_(other.parameters(), 1.0)
                learner.step()
                learner.zero_grad()
                taught.step()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
    expected.eval()
    trained = expected.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, trained[name]), name
    for name, value in result.teacher.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def _cos(share):
    import math

    return math.cos(math.pi * min(1.0, share))


def test_skipped_phases_leave_qat_and_kd_bit_for_bit(make_student, teacher, batches):
    def weights(method):
        return _weights(distill(make_student(), teacher, batches, method=method, epochs=2, seed=3).model)

    assert _same(weights(QKD(1, 0, 0)), weights(QAT()))
    # KD weighs both terms by 1/2, and so does half of QKD's loss: AdamW's step does not depend on the loss's size, its epsilon
    # and the clipped norm do. So the loss itself is compared.
    rows = [
        distill(make_student(), teacher, batches[:1], method=method, epochs=1, seed=3).history[0]
        for method in (QKD(0, 0, 1, temperature=3.0), KD(temperature=3.0, alpha=0.5))
    ]
    assert rows[0]["kl"] == rows[1]["kl"]
    assert rows[0]["ce"] == rows[1]["ce"]


def test_a_diverging_loss_says_where_and_what_is_left(tmp_path, make_student, teacher, batches):
    data = [*batches, (torch.full_like(batches[0][0], 3e38), None)]
    where = r"step \d+.*phase 'distill'.*gradient.*last good checkpoint is .*step-"
    with pytest.raises(TrainingError, match=where) as caught:
        distill(make_student(), teacher, data, epochs=2, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert "Lower lr" in str(caught.value)


# -- trackers


def test_tensorboard_gets_the_numbers_of_the_history(tmp_path, make_student, teacher, batches):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = distill(make_student(), teacher, batches, epochs=2, checkpoint_dir=tmp_path, val_loader=batches[:1])
    written = accumulator.EventAccumulator(str(tmp_path / "tracking")).Reload()
    assert {"kl", "lr", "val_accuracy", "agreement"} <= set(written.Tags()["scalars"])
    for name in ("kl", "val_accuracy"):
        assert [event.value for event in written.Scalars(name)] == pytest.approx([row[name] for row in result.history[1:]])


def test_trackers_are_left_out_on_request_and_unknown_ones_are_named(tmp_path, make_student, teacher, batches):
    distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path, trackers=())
    assert not (tmp_path / "tracking").exists()
    for tracker in ("no such tracker", "tensorboard"):  # the latter writes files, and there is no folder
        with pytest.raises(QakdError, match=f"trackers: '{tracker}'"):
            distill(make_student(), teacher, batches, epochs=1, trackers=[tracker])
