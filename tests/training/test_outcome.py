"""What a run says at its end, and that it returns nothing worse than it was given."""

import copy
import json
import logging

import pytest
import torch
from interruption import Stop, StopAt
from torch import nn

from qakd_plugin import (
    KD,
    KL,
    LSQ,
    QAT,
    QKD,
    SQAKD,
    CheckpointError,
    QakdError,
    TrainingError,
    attach,
    default_batch,
    distill,
    evaluate,
    prepare,
    use_quantizers,
)
from qakd_plugin._common.history import below_start, kept_of
from qakd_plugin._common.training_record import training_records
from qakd_plugin.losses import kl_divergence
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training import optimizers
from qakd_plugin.training.methods import left_out
from qakd_plugin.training.outcome import at_chance, line_of
from qakd_plugin.training.trainer import Trainer

HARMFUL = 0.3
"""A learning rate that ruins any student here."""


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _held_out(digits):
    images, labels = (part[:64] for part in digits.validation)
    return [(images[:32], labels[:32]), (images[32:], labels[32:])]


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e"])
def test_the_start_is_kept_where_training_only_harms(toolkit, make_student, teacher, batches, digits, caplog):
    student, held_out = make_student(toolkit), _held_out(digits)
    counted = evaluate(copy.deepcopy(student), teacher, held_out, default_batch, torch.device("cpu"))
    prepared = _weights(student)
    result = distill(student, teacher, batches, epochs=2, val_loader=held_out, lr=HARMFUL, seed=0)
    start, *epochs = result.history
    assert start == {"epoch": -1, "phase": "start", "best": True, **counted}
    assert [row["epoch"] for row in epochs] == [0, 1]
    assert not any(row["best"] for row in epochs)
    assert result.metrics == start
    trained = [name for name, _ in student.named_parameters()]
    assert all(torch.equal(prepared[name], student.state_dict()[name]) for name in trained)
    (said,) = [record.getMessage() for record in caplog.records if "Training lost" in record.getMessage()]
    lost = 100 * (start["val_accuracy"] - epochs[-1]["val_accuracy"])
    assert f"{lost:.3g} points of accuracy" in said
    assert "the prepared model was kept" in said
    assert f"lr={HARMFUL}" in said


@pytest.mark.parametrize(("toolkit", "method"), [("modelopt", SQAKD()), ("torch_ao", QKD(0, 1, 0)), ("pt2e", QAT())])
def test_evaluating_the_start_changes_nothing_that_is_trained(toolkit, method, make_student, teacher, digits):
    """The loaders draw their order from the global generator, as does the augmentation."""

    def run(val_loader):
        data = torch.utils.data.TensorDataset(*(part[:96] for part in digits.train))
        loader = torch.utils.data.DataLoader(data, 32, shuffle=True)
        noisy = lambda images: (images + 0.05 * torch.randn_like(images)).clamp(0, 1)  # noqa: E731
        seen = []

        class Epochs:
            def on_epoch_end(self, row):
                seen.append(_weights(student))

        student = make_student(toolkit, 4)
        distill(
            student,
            teacher,
            loader,
            method=method,
            epochs=1,
            val_loader=val_loader,
            augment=noisy,
            seed=1,
            callbacks=[Epochs()],
        )
        return seen[0]

    held_out = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits.validation), 64, shuffle=True)
    assert _same(run(None), run(held_out))


def test_the_start_survives_a_resume(make_student, teacher, batches, digits, tmp_path):
    def run(folder, **options):
        student = make_student()
        result = distill(
            student, teacher, batches, epochs=2, val_loader=_held_out(digits), lr=HARMFUL, seed=0, checkpoint_dir=folder,
            checkpoint_every=4, trackers=(), **options,
        )  # fmt: skip
        return _weights(student), [{k: v for k, v in row.items() if k != "images_per_second"} for row in result.history]

    whole = run(tmp_path / "whole")
    for stop in (5, 9):
        with pytest.raises(Stop):
            run(tmp_path / f"{stop}", callbacks=[StopAt(stop)])
        resumed = run(tmp_path / f"{stop}", resume=True)
        assert _same(whole[0], resumed[0])
        assert whole[1] == resumed[1]
    first = json.loads((tmp_path / "whole" / "history.jsonl").read_text().splitlines()[0])
    assert first["epoch"] == -1


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e"])
def test_without_a_held_out_split_the_start_is_kept_where_training_leads_away_from_the_teacher(
    toolkit, harmful, make_student, teacher, batches, tmp_path, caplog
):
    images = [x for x, _ in batches]
    student = make_student(toolkit)
    prepared, before = _weights(student), _distance(student, teacher, images)
    result = distill(student, teacher, images, epochs=1, seed=0, checkpoint_dir=tmp_path, trackers=())
    assert result.metrics == {"epoch": -1, "phase": "start", "loss": pytest.approx(before, rel=1e-3)}
    (row,) = result.history
    assert row["eval_loss"] > row["start_eval_loss"] == result.metrics["loss"]
    assert row.items() <= json.loads((tmp_path / "history.jsonl").read_text()).items()
    assert all(torch.equal(prepared[name], student.state_dict()[name]) for name, _ in student.named_parameters())
    assert _distance(student, teacher, images) == pytest.approx(before, rel=1e-6)
    assert training_records(student)[-1].kept == -1
    (said,) = [record.getMessage() for record in caplog.records if "away from its teacher" in record.getMessage()]
    assert "the prepared model was kept" in said
    assert f"lr={HARMFUL}" in said


@pytest.mark.parametrize(("share", "kept"), [(0.76, -1), (0.74, 0)])
def test_without_a_held_out_split_the_last_epoch_counts_where_it_is_clearly_nearer_the_teacher(
    share, kept, make_student, teacher, batches, monkeypatch
):
    student = make_student()
    distances = iter([share, 1.0])
    monkeypatch.setattr(Trainer, "_distance", lambda self: next(distances))
    result = distill(student, teacher, [x for x, _ in batches[:2]], epochs=1, seed=0)
    assert result.metrics["epoch"] == kept


@pytest.fixture
def harmful(monkeypatch):
    """The rate that distill chooses by itself ruins any student."""
    monkeypatch.setattr(optimizers, "_RATE_OF_MANY_BITS", HARMFUL)


def _distance(student, teacher, images):
    student = copy.deepcopy(student)
    adapter_for(student).set_mode(student, False)
    adapter_for(student).freeze_ranges(student, True)
    with torch.no_grad():
        losses = [kl_divergence(student(x), teacher(x), 1.0).mean() for x in images]
    return float(sum(losses)) / len(losses)


def test_without_a_held_out_split_a_better_last_epoch_is_what_it_was(make_student, teacher, digits):
    """Comparing it with the start draws nothing, and leaves no trace in the history."""

    def run(**options):
        loader = torch.utils.data.DataLoader(digits.train[0][:96], 32, shuffle=True)
        return distill(make_student("modelopt", 3), teacher, loader, epochs=2, seed=0, **options)

    last = []

    class Look:
        def on_epoch_end(self, row):
            last.append({name: value.clone() for name, value in result_of.state_dict().items()})

    result_of = make_student("modelopt", 3)
    loader = torch.utils.data.DataLoader(digits.train[0][:96], 32, shuffle=True)
    result = distill(result_of, teacher, loader, epochs=2, seed=0, callbacks=[Look()])
    assert _same(last[-1], _weights(result.model))
    assert [row["epoch"] for row in result.history] == [0, 1]
    assert not any("eval_loss" in row for row in result.history)
    assert result.metrics == result.history[-1]
    assert _same(_weights(run(lr=1e-3).model), _weights(result.model)), "the default for 3 bits, and nothing compared"


def test_without_a_held_out_split_the_start_survives_a_resume(harmful, make_student, teacher, batches, tmp_path):
    def run(folder, **options):
        student = make_student()
        result = distill(
            student, teacher, batches, epochs=2, seed=0, checkpoint_dir=folder, checkpoint_every=4, trackers=(), **options
        )
        return _weights(student), result.metrics

    whole = run(tmp_path / "whole")
    assert whole[1]["epoch"] == -1
    with pytest.raises(Stop):
        run(tmp_path / "stopped", callbacks=[StopAt(9)])
    for folder in ("stopped", "whole"):  # "whole" is done already
        resumed = run(tmp_path / folder, resume=True)
        assert _same(whole[0], resumed[0])
        assert whole[1] == resumed[1]


@pytest.mark.parametrize(
    ("method", "options"),
    [(QAT(), {}), (KD(), {}), (QKD(0, 1, 0), {}), (SQAKD(), {"lr": HARMFUL}), (SQAKD(), {"steps_per_epoch": 2})],
    ids=repr,
)
def test_labels_a_rate_of_the_users_and_a_stream_may_lead_away_from_the_teacher(
    method, options, harmful, make_student, teacher, batches
):
    result = distill(make_student(), teacher, batches[:2], method=method, epochs=1, **options)
    assert result.metrics == result.history[-1]
    assert "eval_loss" not in result.metrics


def test_outputs_that_eval_mode_lacks_are_not_compared_with_the_start(harmful, batches):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.side = nn.Conv2d(1, 8, 3), nn.Linear(8, 10), nn.Linear(8, 10)

        def forward(self, x):
            features = self.body(x).relu().mean((2, 3))
            return {"out": self.head(features)} | ({"side": self.side(features)} if self.training else {})

    torch.manual_seed(0)
    network, images = Auxiliary().eval(), [x for x, _ in batches[:2]]
    method = SQAKD(match={"out": KL(), "side": KL()})
    taught = Always(copy.deepcopy(network))
    result = distill(prepare(network, images), taught, images, method=method, epochs=1)
    assert result.metrics == result.history[-1]


class Always(nn.Module):
    """A teacher with all outputs in both modes."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        features = self.network.body(x).relu().mean((2, 3))
        return {"out": self.network.head(features), "side": self.network.side(features)}


def test_gradients_left_on_the_model_are_not_applied(make_student, teacher, batches):
    def run(dirty):
        student = make_student()
        if dirty:
            for parameter in student.parameters():
                parameter.grad = torch.full_like(parameter, 100.0)
        return _weights(distill(student, teacher, batches[:2], epochs=1, seed=0).model)

    assert _same(run(False), run(True))


def test_a_line_is_logged_for_the_start_and_each_epoch(make_student, teacher, batches, digits, caplog):
    caplog.set_level(logging.INFO, "qakd_plugin")
    history = distill(make_student(), teacher, batches, epochs=2, val_loader=_held_out(digits)).history
    lines = [record.getMessage() for record in caplog.records if record.name == "qakd_plugin.training.trainer"]
    lines = [line for line in lines if line.startswith(("start", "epoch"))]
    assert [line.partition(":")[0] for line in lines] == ["start", "epoch 1 of 2, distill", "epoch 2 of 2, distill"]
    for line, row in zip(lines, history, strict=True):
        assert f"agreement {row['val_agreement']:.2%}" in line


def test_of_a_metric_with_many_numbers_a_line_shows_the_one_that_picks():
    names = ("map", "map_50", "map_75", "map_small", "teacher_map", "teacher_map_50", "mar_1")
    row = {**_row(1, **dict.fromkeys(names, 0.25)), "loss": 0.5, "lr": 0.1}
    line = line_of(row, 3, lambda row: (["val_map"], 1))
    assert line == "epoch 2 of 3, distill: map 0.25, teacher_map 0.25, loss 0.5, lr 0.1"


@pytest.mark.parametrize(("level", "printed"), [("WARNING", True), ("INFO", False), ("ERROR", False)])
def test_the_lines_are_printed_once_where_there_is_no_terminal(level, printed, make_student, teacher, batches, capsys, caplog):
    caplog.set_level(level, "qakd_plugin")
    distill(make_student(), teacher, batches[:2], epochs=1)
    assert ("epoch 1 of 1, distill: loss" in capsys.readouterr().err) == printed


# -- sentences


def _row(epoch, best=False, **numbers):
    return {"epoch": epoch, "phase": "distill", "best": best, **{f"val_{name}": value for name, value in numbers.items()}}


def _by(name, sign=1):
    return lambda row: ([name], sign)


def test_a_loss_of_agreement_is_said_though_accuracy_rose():
    history = [_row(-1, True, accuracy=0.944, agreement=0.996), _row(0, True, accuracy=0.952, agreement=0.972)]
    said = below_start(history, _by("val_accuracy"))
    assert said == (
        "Training lost 2.4 points of agreement (99.60% at the start, 97.20%) in epoch 1, which was kept."
    )  # fmt: skip


@pytest.mark.parametrize(("teacher", "said"), [(0.95, False), (0.98, True)])
def test_a_loss_of_agreement_with_a_teacher_that_errs_more_often_is_none(teacher, said):
    history = [
        _row(-1, True, accuracy=0.944, teacher_accuracy=teacher, agreement=0.996),
        _row(0, True, accuracy=0.962, teacher_accuracy=teacher, agreement=0.972),
    ]
    assert (below_start(history, _by("val_accuracy")) is not None) == said


def test_which_epoch_was_kept_is_said_where_the_last_is_below_the_start():
    history = [_row(-1, True, accuracy=0.9), _row(0, True, accuracy=0.95), _row(1, accuracy=0.85)]
    assert below_start(history, _by("val_accuracy")).endswith("after the last epoch; epoch 1 was kept.")
    assert kept_of(history)["epoch"] == 0


def test_an_error_that_fell_is_no_loss():
    history = [_row(-1, True, mean_squared_error=2.0), _row(0, True, mean_squared_error=1.0)]
    assert below_start(history, _by("val_mean_squared_error", -1)) is None
    assert "mean_squared_error (1 at the start, 2)" in below_start(
        [history[1] | {"epoch": -1}, history[0] | {"epoch": 0}], _by("val_mean_squared_error", -1)
    )


def test_a_start_that_was_kept_though_nothing_was_held_out_is_said_and_is_the_row_that_counts():
    history = [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5, "eval_loss": 0.25, "start_eval_loss": 0.125}]
    said = below_start(history, lambda row: ([], 1))
    assert "the loss was 0.125 at the start and is 0.25 after the last epoch; the prepared model was kept." in said
    assert kept_of(history) == {"epoch": -1, "phase": "start", "loss": 0.125}
    assert kept_of(history[:1]) is history[0]


def test_a_start_that_was_kept_since_training_gained_little_is_said_to_be_that():
    history = [{"epoch": 0, "loss": 1.0, "eval_loss": 0.11, "start_eval_loss": 0.125}]
    said = below_start(history, lambda row: ([], 1))
    assert "hardly nearer its teacher" in said
    assert "the loss was 0.125 at the start and is 0.11 after the last epoch, above 75% of it" in said
    assert kept_of(history)["epoch"] == -1


@pytest.mark.parametrize("history", [[], [{"epoch": 0, "loss": 1.0}], [_row(-1, True, accuracy=0.9)]])
def test_nothing_is_said_without_a_start_or_an_epoch(history):
    assert below_start(history, _by("val_accuracy")) is None


@pytest.mark.parametrize(
    ("numbers", "classes", "warned"),
    [
        ({"accuracy": 0.103, "teacher_accuracy": 0.98}, 10, True),
        ({"accuracy": 0.103, "teacher_accuracy": 0.11}, 10, False),
        ({"accuracy": 0.5}, 10, False),
        ({"agreement": 0.1}, 10, True),
        ({"mean_squared_error": 0.1}, None, False),
    ],
)
def test_chance_level_is_said(numbers, classes, warned):
    assert (at_chance(_row(0, **numbers), classes) is not None) == warned


def test_a_student_at_chance_level_is_named_at_the_end(make_student, teacher, batches, digits, caplog):
    student = make_student("modelopt")

    class Spoiler:
        def on_step_end(self, step, losses):
            with torch.no_grad():
                student.head.weight.zero_()

    with torch.no_grad():
        student.head.weight.zero_()  # the start is no better
    distill(student, teacher, batches, epochs=1, val_loader=digits.loader("validation"), callbacks=[Spoiler()])
    assert any("chance among 10 classes" in record.getMessage() for record in caplog.records)


def test_labels_of_one_class_are_named(make_student, teacher, batches, caplog):
    one = [(x, torch.full_like(y, 3)) for x, y in batches[:2]]
    distill(make_student(), teacher, one, method=KD(), epochs=2, val_loader=one)
    said = [record.getMessage() for record in caplog.records if "all labels are 3" in record.getMessage()]
    assert [text.partition(":")[0] for text in said] == ["val_loader", "loader"]
    caplog.clear()
    distill(make_student(), teacher, batches[:2], method=KD(), epochs=1, val_loader=batches[:2])
    assert not any("all labels" in record.getMessage() for record in caplog.records)


def test_the_start_leaves_the_ranges_of_observers_where_calibration_put_them(make_student, teacher, batches, digits):
    student = make_student("torch_ao")
    adapter = adapter_for(student)
    before = [adapter.qparams(q).scale.clone() for q in adapter.quantizers(student) if q.role == "activation"]
    distill(student, teacher, batches, epochs=1, val_loader=_held_out(digits), lr=HARMFUL, seed=0)
    after = [adapter.qparams(q).scale for q in adapter.quantizers(student) if q.role == "activation"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -- runs that are prolonged, and phases that are left out


def test_a_finished_run_is_prolonged_by_resuming_with_more_epochs(make_student, teacher, batches, tmp_path):
    """The weights go on, and the rates are those that the longer run has there."""

    def run(folder, epochs, **options):
        student = make_student()
        rates = distill(
            student, teacher, batches[:3], epochs=epochs, lr=1e-3, seed=0, checkpoint_dir=folder, trackers=(), **options
        ).history
        return _weights(student), [row["lr"] for row in rates]

    first, _ = run(tmp_path / "run", 2)
    second, rates = run(tmp_path / "run", 4, resume=True)
    _, whole = run(tmp_path / "whole", 4)
    assert not _same(first, second)
    assert rates[2:] == whole[2:]
    with pytest.raises(CheckpointError, match="epochs is 4 there and 3 here"):
        run(tmp_path / "run", 3, resume=True)


def test_a_prolonged_run_starts_with_the_rate_of_the_longer_schedule(make_student, teacher, batches, tmp_path):
    moved = []

    class Look:
        def on_step_end(self, step, losses):
            moved.append(student.head.weight.detach().clone())

    options = {"lr": 1e-3, "checkpoint_dir": tmp_path, "trackers": ()}
    student = make_student()
    distill(student, teacher, batches[:2], epochs=1, **options)
    before = student.head.weight.detach().clone()
    student = make_student()
    distill(student, teacher, batches[:2], epochs=2, resume=True, callbacks=[Look()], **options)
    assert not torch.equal(moved[0], before)  # the shorter run had come to a rate of 0


def test_a_run_of_several_phases_is_not_prolonged(make_student, teacher, batches, tmp_path):
    options = {"method": QKD(), "checkpoint_dir": tmp_path, "trackers": ()}
    distill(make_student(), teacher, batches[:1], epochs=4, **options)
    with pytest.raises(CheckpointError, match="phases is"):
        distill(make_student(), teacher, batches[:1], epochs=8, resume=True, **options)


@pytest.mark.parametrize(("epochs", "missing"), [(1, "self-studying and tutoring"), (3, "self-studying"), (4, None)])
def test_phases_that_a_short_run_leaves_out_are_named(epochs, missing, make_student, teacher, batches, caplog):
    distill(make_student(), teacher, batches[:1], method=QKD(), epochs=epochs)
    said = [record.getMessage() for record in caplog.records if "leaves out" in record.getMessage()]
    assert (missing is None) == (not said)
    if missing is not None:
        assert f"QKD leaves out {missing} in {epochs} epochs" in said[0]
        assert "at least 4" in said[0]


def test_phases_of_no_length_are_not_missed():
    assert left_out(QKD(0, 1, 0), QKD(0, 1, 0).phases(2)) == ([], 0)
    assert left_out(SQAKD(), SQAKD().phases(1)) == ([], 0)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("sqakd", r"'sqakd' is no method: pass method=qakd\.SQAKD\(\)"),
        (SQAKD, r"SQAKD is a class: pass method=qakd\.SQAKD\(\)"),
    ],
)
def test_what_is_no_method_is_refused_with_the_line_to_write(method, line, make_student, teacher, batches):
    for call in (
        lambda: distill(make_student(), teacher, batches, method=method),
        lambda: attach(make_student(), teacher, method),
    ):
        with pytest.raises(QakdError, match=line):
            call()


def test_a_class_of_quantizers_is_refused_with_the_line_to_write(make_student):
    with pytest.raises(QakdError, match=r"LSQ is a class: pass qakd\.LSQ\(\)"):
        use_quantizers(make_student(), LSQ)


# -- labels and inputs that do not fit


@pytest.mark.parametrize("method", [QAT(), KD(), QKD(0, 1, 0)])
def test_labels_out_of_range_are_named(method, make_student, teacher, batches):
    wrong = [(x, y + 1) for x, y in batches]
    with pytest.raises(QakdError, match=r"loader: labels must lie between 0 and 9, .* got 10\..*batch\[1\] - 1"):
        distill(make_student(), teacher, wrong, method=method, epochs=1)


def test_held_out_labels_out_of_range_are_named_before_the_first_step(make_student, teacher, batches):
    steps = []

    class Count:
        def on_step_end(self, step, losses):
            steps.append(step)

    wrong = [(x, y - 1) for x, y in batches]
    with pytest.raises(QakdError, match=r"val_loader: labels must lie between 0 and 9, .* got -1"):
        distill(make_student(), teacher, batches, epochs=1, val_loader=wrong, callbacks=[Count()])
    assert not steps


def test_positions_that_are_ignored_may_have_any_network(make_student, teacher, batches):
    x, y = batches[0]
    ignored = y.clone()
    ignored[::2] = -100
    history = distill(make_student(), teacher, [(x, ignored)], method=QAT(), epochs=1, val_loader=[(x, ignored)]).history
    assert history[0]["val_accuracy"] == evaluate(
        make_student(), teacher, [(x[1::2], y[1::2])], default_batch, torch.device("cpu")
    )["val_accuracy"]  # fmt: skip


def test_inputs_of_another_shape_are_named(make_student, teacher, batches):
    with pytest.raises(TrainingError, match=r"loader: .* first batch, 'input' \(32, 3, 32, 32\) float32: Given groups=1"):
        distill(make_student(), teacher, [x.repeat(1, 3, 1, 1) for x, _ in batches], epochs=1)


def test_held_out_images_of_another_type_are_named(make_student, teacher, batches):
    held_out = [((255 * x).byte(), y) for x, y in batches]
    with pytest.raises(QakdError, match=r"val_loader: 'input' .* is uint8"):
        distill(make_student(), teacher, batches, epochs=1, val_loader=held_out)


def test_a_teacher_that_learns_keeps_the_hooks_of_the_one_that_was_passed_in(make_student, teacher, batches):
    mentor = torch.fx.symbolic_trace(teacher)  # of which a plain copy has none
    mentor.register_forward_pre_hook(lambda module, given: (given[0] * 2 - 1,))
    result = distill(make_student(), mentor, batches, method=QKD(0, 1, 0), epochs=1, seed=0)
    assert result.teacher is not mentor
    assert list(result.teacher._forward_pre_hooks.values()) == list(mentor._forward_pre_hooks.values())
