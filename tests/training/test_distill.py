"""distill(): what it must leave alone, what it must refuse, and that it goes on where it stopped."""

import copy
from typing import ClassVar

import pytest
import torch
from interruption import Stop, StopAt
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from qakd_plugin import KD, QAT, QKD, SQAKD, LabelsRequiredError, NotPreparedError, QakdError, TrainingError, distill
from qakd_plugin._common.rng_state import generators_of, undisturbed
from qakd_plugin.demo.net import DigitNet
from qakd_plugin.toolkits import adapter_for

TOOLKITS = ["modelopt", "torch_ao"]


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class _Untouchable:
    """A label that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"the label was touched: {name}")


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_training_reduces_the_loss_and_freezes_ranges(toolkit, make_student, teacher, batches):
    student = make_student(toolkit, 4)
    result = distill(student, teacher, batches, epochs=3, seed=0)
    assert result.model is student
    assert result.history[-1]["kl"] < result.history[0]["kl"]
    before = [adapter_for(student).qparams(q).scale.clone() for q in adapter_for(student).quantizers(student)]
    student(10 * batches[0][0])
    after = [adapter_for(student).qparams(q).scale for q in adapter_for(student).quantizers(student)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_sqakd_gives_the_same_weights_whatever_the_labels(make_student, teacher, batches):
    images = [x for x, _ in batches]
    untouchable = [(x, _Untouchable()) for x in images]
    poisoned = [(x, torch.full((len(x),), float("nan"))) for x in images]
    results = [
        _weights(distill(make_student(), teacher, data, epochs=1, lr=1e-3, seed=1).model)
        for data in (images, untouchable, poisoned)
    ]
    assert _same(results[0], results[1])
    assert _same(results[0], results[2])


@pytest.mark.parametrize("method", [SQAKD(), KD(), QKD(0.3, 0.4, 0.3)])
def test_the_teacher_is_left_bit_for_bit_as_it_was(method, make_student, teacher, batches):
    teacher.train()
    teacher.stages[0].eval()
    teacher.head.weight.requires_grad_(False)
    before = _weights(teacher)
    modes = [module.training for module in teacher.modules()]
    result = distill(make_student(), teacher, batches, method=method, epochs=3)
    assert _same(before, _weights(teacher))
    assert modes == [module.training for module in teacher.modules()]
    assert not teacher.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert (result.teacher is teacher) == (not isinstance(method, QKD))


def test_the_teachers_mode_is_put_back_after_an_error(make_student, teacher, batches):
    teacher.train()
    bad = [*batches[:2], (torch.full_like(batches[0][0], float("nan")), batches[0][1])]
    with pytest.raises(TrainingError):
        distill(make_student(), teacher, bad, epochs=1)
    assert all(module.training for module in teacher.modules())


def test_co_studying_trains_the_copy_of_the_teacher(make_student, teacher, batches):
    result = distill(make_student(), teacher, batches, method=QKD(0, 1, 0), epochs=1)
    assert not _same(_weights(teacher), _weights(result.teacher))
    assert {"teacher_ce", "teacher_kl", "ce", "kl"} <= result.history[0].keys()


def test_qkd_without_co_studying_equals_qat_and_kd(make_student, teacher, batches):
    def weights(method):
        return _weights(distill(make_student(), teacher, batches, method=method, epochs=2, seed=3).model)

    assert _same(weights(QKD(1, 0, 0)), weights(QAT()))


@pytest.mark.parametrize("method", [QAT(), KD(), QKD()])
def test_methods_that_need_labels_say_so(method, make_student, teacher, batches):
    with pytest.raises(LabelsRequiredError, match=type(method).__name__):
        distill(make_student(), teacher, [x for x, _ in batches], method=method, epochs=1)


def test_qat_needs_no_teacher_and_the_others_do(make_student, batches):
    distill(make_student(), None, batches, method=QAT(), epochs=1)
    with pytest.raises(QakdError, match="teacher=None"):
        distill(make_student(), None, batches, epochs=1)


def test_the_best_epoch_of_the_held_out_split_is_kept(make_student, teacher, digits, batches):
    accuracies = []

    class Spoiler:
        """Ruin the weights in the last epoch."""

        def on_step_end(self, step, losses):
            if step > 2 * len(batches):
                with torch.no_grad():
                    student.head.weight.zero_()

    student = make_student()
    result = distill(student, teacher, batches, epochs=3, val_loader=digits.loader("validation"), callbacks=[Spoiler()], seed=0)
    accuracies = [row["val_accuracy"] for row in result.history]
    assert len(accuracies) == 4  # of the start, too
    assert accuracies[-1] < 0.5 < max(accuracies)
    assert result.metrics["val_accuracy"] == max(accuracies)
    with torch.no_grad():  # in the same batches: a code on a tie may be another in a batch of another size
        correct = [int((result.model(x).argmax(1) == y).sum()) for x, y in digits.loader("validation")]
    assert sum(correct) / len(digits.validation[1]) == pytest.approx(max(accuracies), abs=1e-6)


def test_augmentation_sees_unit_range_images(make_student, teacher, batches):
    seen = []

    def augment(images):
        seen.append((float(images.min()), float(images.max())))
        return images.flip(-1)

    normalised = [((x - 0.5) / 0.25, y) for x, y in batches]
    distill(make_student(), teacher, normalised, epochs=1, augment=augment, input_stats=([0.5], [0.25]))
    assert len(seen) == len(batches)
    assert all(low >= -1e-6 and high <= 1 + 1e-6 for low, high in seen)


def test_an_augmentation_that_changes_the_shape_is_named(make_student, teacher, batches):
    with pytest.raises(QakdError, match="augment must keep shape"):
        distill(make_student(), teacher, batches, epochs=1, augment=lambda images: images[..., :16])


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_bf16_trains_and_quantizers_see_float32(toolkit, make_student, teacher, batches):
    student = make_student(toolkit)
    dtypes = set()
    for quantizer in adapter_for(student).quantizers(student):
        quantizer.module.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    result = distill(student, teacher, batches, epochs=1, mixed_precision="bf16")
    assert dtypes == {torch.float32}
    assert result.history[0]["kl"] < 5


@pytest.mark.parametrize(
    ("toolkit", "method", "stop"),
    [
        pytest.param("modelopt", SQAKD(), 4, marks=pytest.mark.matrix),
        pytest.param("torch_ao", SQAKD(), 17, marks=pytest.mark.matrix),  # in the middle of an epoch
        pytest.param("modelopt", QKD(0.25, 0.5, 0.25), 11, marks=pytest.mark.matrix),  # while the teacher learns too
        pytest.param("torch_ao", QKD(0.25, 0.5, 0.25), 18, marks=pytest.mark.matrix),  # between two phases
    ],
)
def test_resume_is_bit_identical(toolkit, method, stop, tmp_path, make_student, teacher, digits):
    def run(folder, **options):
        loader = digits.loader("train", batch_size=180, shuffle=True, seed=5)  # draws its order from a generator of its own
        student = make_student(toolkit)
        noisy = lambda images: (images + 0.02 * torch.randn_like(images)).clamp(0, 1)  # noqa: E731 - draws from the global generator
        result = distill(
            student, teacher, loader, method=method, epochs=4, augment=noisy, seed=2, checkpoint_dir=folder, checkpoint_every=3,
            val_loader=digits.loader("validation"), **options,
        )  # fmt: skip
        history = [{k: v for k, v in row.items() if k != "images_per_second"} for row in result.history]
        return _weights(result.model), history

    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", callbacks=[StopAt(stop)])
    torch.manual_seed(99)
    resumed = run(tmp_path / "stopped", resume=True)
    assert _same(expected[0], resumed[0])
    assert expected[1] == resumed[1]


@pytest.mark.parametrize("toolkit", ["torch_ao", "pt2e"])
def test_ranges_follow_again_when_a_trained_student_is_trained_once_more(toolkit, make_student, teacher, batches):
    def scales(student):
        adapter = adapter_for(student)
        return [adapter.qparams(q).scale.clone() for q in adapter.quantizers(student) if q.role == "weight"]

    student = make_student(toolkit)
    distill(student, teacher, batches, epochs=1, lr=1e-2)
    first = scales(student)
    distill(student, teacher, batches, epochs=1, lr=1e-2)
    assert not any(torch.equal(a, b) for a, b in zip(first, scales(student), strict=True))
    second = scales(student)
    student(10 * batches[0][0])
    assert all(torch.equal(a, b) for a, b in zip(second, scales(student), strict=True))


class _WithLogits(nn.Module):
    """As the classifiers of some libraries: an object that holds the logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return {"logits": self.network(x)}


def test_teachers_whose_output_holds_logits_teach_like_those_that_put_out_logits(make_student, teacher, batches):
    found = []
    for mentor in (teacher, _WithLogits(teacher), [teacher, _WithLogits(teacher)]):
        result = distill(make_student("modelopt"), mentor, batches, epochs=1, val_loader=batches[:2])
        found.append(_weights(result.model))
    assert _same(found[0], found[1])
    assert _same(found[0], found[2])


@pytest.mark.parametrize("nesting", ["sampler", "batch sampler", "sampler of batches"])
def test_a_pass_that_leaves_no_trace_puts_the_order_back_however_samplers_are_nested(nesting):
    data = TensorDataset(torch.arange(20))
    order = RandomSampler(data, generator=torch.Generator().manual_seed(1))
    batches = BatchSampler(order, 4, drop_last=False)
    loader = {
        "sampler": DataLoader(data, 4, sampler=order),
        "batch sampler": DataLoader(data, batch_sampler=batches),
        "sampler of batches": DataLoader(data, batch_size=None, sampler=batches),
    }[nesting]
    with undisturbed(generators_of(loader)):
        before = torch.cat([x for (x,) in loader])
    after = torch.cat([x for (x,) in loader])
    assert torch.equal(before, after)
    assert not torch.equal(after, torch.cat([x for (x,) in loader]))


@pytest.mark.parametrize("nested", [False, True])
def test_a_sampler_is_told_of_each_epoch_once(nested, make_student, teacher, digits):
    class Told(SequentialSampler):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    Told.epochs.clear()
    data = TensorDataset(*(part[:32] for part in digits.train))
    told = Told(data)
    loader = (
        DataLoader(data, batch_size=None, sampler=BatchSampler(told, 16, drop_last=False))
        if nested
        else DataLoader(data, 16, sampler=told)
    )
    distill(make_student("modelopt"), teacher, loader, epochs=3)
    assert Told.epochs == [0, 1, 2]


# -- bad input


def test_a_float_model_is_not_prepared(teacher, batches):
    with pytest.raises(NotPreparedError, match="DigitNet"):
        distill(copy.deepcopy(teacher), teacher, batches)


def test_an_uncalibrated_range_is_named(make_student, teacher, batches):
    student = make_student("modelopt")
    del student.stages[1].conv2.input_quantizer._amax
    with pytest.raises(NotPreparedError, match=r"stages\.1\.conv2\.input_quantizer"):
        distill(student, teacher, batches)


def test_an_fx_model_that_never_saw_a_batch_is_refused(teacher, batches):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    student = prepare_qat_fx(copy.deepcopy(teacher).train(), get_default_qat_qconfig_mapping("x86"), (batches[0][0],))
    with pytest.raises(NotPreparedError, match="never saw a batch"):
        distill(student, teacher, batches)


def test_different_numbers_of_classes_are_named(make_student, batches):
    teacher = DigitNet(width=4)
    teacher.head = nn.Linear(16, 7)
    with pytest.raises(QakdError, match=r"\(32, 7\).*\(32, 10\)"):
        distill(make_student(), teacher, batches)


@pytest.mark.parametrize("loader", [[], iter([])])
def test_an_empty_or_endless_loader_is_refused(loader, make_student, teacher):
    with pytest.raises(QakdError, match="loader"):
        distill(make_student(), teacher, loader)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_student_without_gradients_is_refused(toolkit, make_student, teacher, batches):
    student = make_student(toolkit).requires_grad_(False)
    with pytest.raises(TrainingError, match="requires a gradient"):
        distill(student, teacher, batches)


def test_nan_in_the_input_names_the_batch(make_student, teacher, batches):
    bad = [*batches[:3], (torch.full_like(batches[0][0], float("nan")), batches[0][1])]
    with pytest.raises(TrainingError, match="batch 3"):
        distill(make_student(), teacher, bad, epochs=1)


def test_nan_in_a_layer_names_the_layer(make_student, teacher, batches):
    student = make_student()

    class Break:
        def on_step_end(self, step, losses):
            student.stages[1].bn1.weight.data[0] = float("nan")

    with pytest.raises(TrainingError, match=r"stages\.1\.bn1"):
        distill(student, teacher, batches, epochs=1, callbacks=[Break()])


def test_a_zero_gamma_in_a_fused_layer_is_named(make_student, teacher, batches):
    student = make_student("torch_ao")
    with torch.no_grad():
        student.get_submodule("stages.0.conv1").bn.weight[3] = 0
    with pytest.raises(TrainingError, match=r"stages\.0\.conv1.*gamma = 0 in channel 3"):
        distill(student, teacher, batches)


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"mixed_precision": "fp16"}, {"resume": True}, {"checkpoint_every": 5}, {"augment": 3}]
)
def test_bad_arguments_are_named(options, make_student, teacher, batches):
    with pytest.raises(QakdError, match=next(iter(options))):
        distill(make_student(), teacher, batches, **options)
