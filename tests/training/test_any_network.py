"""Networks that are no image classifiers: they train on what they output, or are told what to write."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelAveragePrecision

import qakd_plugin as qakd
from qakd_plugin import KD, QAT, QKD, SQAKD, QakdError
from qakd_plugin.losses import kl_divergence

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = [X[:8], X[8:]]


class Net(nn.Module):
    """A small convolutional body with heads by name; what they make of the pixels is ``shape``'s."""

    def __init__(self, heads, pixels=False, wrap=lambda outputs: outputs):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Conv2d(8, width, 1) for name, width in heads.items()})
        self.pixels, self.wrap = pixels, wrap

    def forward(self, x):
        features = self.body(x)
        found = {name: head(features) for name, head in self.heads.items()}
        if not self.pixels:
            found = {name: tensor.mean((2, 3)) for name, tensor in found.items()}
        return self.wrap(found)


def _only(outputs):
    return next(iter(outputs.values()))


def _distilled(network, loader=LOADER, toolkit="modelopt", **options):
    teacher = network.eval()
    student = qakd.prepare(teacher, LOADER, toolkit, weight_bits=4, activation_bits=4)
    before = [p.detach().clone() for p in student.parameters()]
    moved = []

    class Look:
        def on_epoch_end(self, row):  # before the start is put back where it was better
            moved.append(any(not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True)))

    callbacks = [*options.pop("callbacks", ()), Look()]
    result = qakd.distill(student, teacher, loader, epochs=1, seed=0, callbacks=callbacks, **options)
    assert moved == [True]
    return result


def test_outputs_that_cannot_be_counted_are_refused_before_training():
    steps = []

    class Steps:
        def on_step_end(self, step, losses):
            steps.append(step)

    labelled = [(X, torch.zeros(12, dtype=torch.long))]
    options = {"method": QAT(), "task_loss": lambda outputs, targets: outputs["a"].square().mean(), "val_loader": labelled}
    with pytest.raises(QakdError, match=r"val_loader: the network outputs .*Pass metric=\.\.\., metric_fn="):
        _distilled(Net({"a": 5, "b": 3}), labelled, callbacks=[Steps()], **options)
    assert not steps


def test_labels_alone_with_a_metric_need_nothing_to_compare_with_the_teacher():
    labelled = [(X, torch.zeros(12, dtype=torch.long))]
    options = {"method": QAT(), "task_loss": lambda outputs, targets: outputs["a"].square().mean(), "val_loader": labelled}
    metric = {"metric": MulticlassAccuracy(5), "metric_fn": lambda outputs, targets: (outputs["a"], targets)}
    _, row = _distilled(Net({"a": 5, "b": 3}), labelled, **options, **metric).history
    assert {"val_multiclass_accuracy", "val_teacher_multiclass_accuracy"} <= row.keys()
    assert not [name for name in row if "agreement" in name or "sqnr" in name]


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_segmentation_learns_from_the_pixels_of_the_teacher(toolkit):
    network = Net({"out": 5}, pixels=True, wrap=_only)
    labels = torch.randint(5, (12, 8, 8))
    held_out = [(X, labels)]
    result = _distilled(network, toolkit=toolkit, val_loader=held_out, metric=MulticlassJaccardIndex(5))
    _, row = result.history
    assert math.isfinite(row["kl"])
    with torch.no_grad():
        own, other = result.model(X), network(X)
    metric = MulticlassJaccardIndex(5)
    metric.update(own, labels)
    assert row["val_multiclass_jaccard_index"] == pytest.approx(float(metric.compute()))
    assert row["val_agreement"] == pytest.approx(float((own.argmax(1) == other.argmax(1)).float().mean()), abs=1e-6)


def test_two_outputs_are_matched_as_the_user_says():
    network = Net({"classes": 4, "boxes": 4})
    with pytest.raises(QakdError, match=r"'classes' \(8, 4\) float32, 'boxes' \(8, 4\) float32.*method=qakd.SQAKD\(match="):
        _distilled(network)
    match = {"classes": qakd.KL(dim=1), "boxes": qakd.SmoothL1(weight=2.0)}
    result = _distilled(network, method=SQAKD(match=match), val_loader=LOADER)
    _, row = result.history
    assert row["kl"] == pytest.approx(row["kl_classes"] + row["kl_boxes"], rel=1e-6)
    assert {"val_agreement_classes", "val_sqnr_db_boxes"} <= row.keys()


def test_the_loss_of_two_outputs_is_that_of_a_loop_by_hand():
    network = Net({"classes": 4, "boxes": 4}).eval()
    student = qakd.prepare(network, LOADER, weight_bits=4, activation_bits=4)
    match = {"classes": qakd.KL(dim=1), "boxes": qakd.L1(weight=0.5)}
    with qakd.attach(student, network, method=SQAKD(temperature=2.0, match=match)) as kd:
        outputs = student(X)
        with torch.no_grad():
            taught = network(X)
        expected = kl_divergence(outputs["classes"], taught["classes"], 2.0).mean()
        expected = expected + 0.5 * (outputs["boxes"] - taught["boxes"]).abs().mean()
        torch.testing.assert_close(kd.loss(), expected)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_one_logit_is_trained(shape):
    network = Net({"out": 1}, wrap=lambda outputs: outputs["out"].reshape(shape))
    result = _distilled(network)
    assert result.history[0]["kl"] > 0
    with pytest.raises(QakdError, match="binary_cross_entropy_with_logits"):
        _distilled(network, loader=[(X, torch.ones(12, dtype=torch.long))], method=QAT())


def test_labels_of_several_classes_at_once_are_refused_and_learned_with_their_own_loss():
    network = Net({"out": 5}, wrap=_only)
    loader = [(X, torch.randint(2, (12, 5), generator=torch.Generator().manual_seed(3)).float())]
    for method in (QAT(), KD(), QKD(0, 0, 1)):
        with pytest.raises(QakdError, match="BCEWithLogitsLoss"):
            _distilled(network, loader=loader, method=method)
    options = {"method": KD(match={"logits": qakd.BinaryKL()}), "task_loss": nn.BCEWithLogitsLoss(reduction="none")}
    metric = MultilabelAveragePrecision(5)
    as_integers = lambda outputs, targets: (outputs, targets.long())  # noqa: E731
    result = _distilled(network, loader=loader, val_loader=loader, metric=metric, metric_fn=as_integers, **options)
    assert 0 <= result.history[0]["val_multilabel_average_precision"] <= 1


def test_the_best_epoch_of_a_metric_that_falls_is_the_lowest():
    network = Net({"depth": 1}, pixels=True, wrap=_only)
    loader = [(X, X[:, :1])]
    student = qakd.prepare(network.eval(), LOADER)
    options = {"method": SQAKD(match={"logits": qakd.L2()}), "epochs": 3, "val_loader": loader, "seed": 0}
    result = qakd.distill(student, network, LOADER, metric=MeanSquaredError(), **options)
    errors = [row["val_mean_squared_error"] for row in result.history]
    assert result.metrics["val_mean_squared_error"] == min(errors)


def test_a_network_that_applies_softmax_in_eval_mode_is_refused():
    class Sloppy(Net):
        def forward(self, x):
            logits = super().forward(x)
            return logits if self.training else logits.softmax(1)

    with pytest.raises(QakdError, match="probabilities"):
        _distilled(Sloppy({"out": 5}, wrap=_only))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": SQAKD(match={"nope": qakd.L2()})}, "match names 'nope'.*'logits'"),
        ({"method": SQAKD(match={"logits": qakd.KL(where="mask")})}, "where='mask' of 'logits' names no input or target"),
        ({"task_loss": 3}, "task_loss=3 must be a callable"),
        ({"metric": "accuracy"}, "metric must be a torchmetrics"),
        ({"monitor": "map"}, "monitor='map' is one of the numbers of metric="),
        ({"metric": MetricCollection([MeanSquaredError()]), "monitor": "recall"}, "there are mean_squared_error"),
        (
            {"metric": MetricCollection([MeanSquaredError(), MulticlassJaccardIndex(5)])},
            "say which number picks the best epoch",
        ),
        ({"batch_fn": lambda batch: ({"image": batch}, None)}, r"does not take the inputs image"),
        ({"augment": lambda x: x, "batch_fn": lambda batch: ((batch,), None)}, "augment works on a batch of images"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(QakdError, match=message) as caught:
        _distilled(Net({"out": 5}, wrap=_only), **options)
    assert "\n" not in str(caught.value)


class Text(nn.Module):
    """Token ids and a mask in, a label per token out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(20, 16)
        self.layer, self.head = nn.Linear(16, 32), nn.Linear(32, 7)

    def forward(self, input_ids, attention_mask):
        hidden = torch.relu(self.layer(self.embed(input_ids) * attention_mask[..., None]))
        return {"logits": self.head(hidden)}


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_tokens_count_where_the_mask_says(toolkit, tmp_path):
    ids = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(6) < torch.arange(1, 9)[:, None].clamp(max=6)).float()
    loader = [{"input_ids": ids, "attention_mask": mask, "labels": ids % 7, "text": ["unread"] * 8}]
    teacher = Text().eval()
    method = SQAKD(match={"logits": qakd.KL(dim=-1, where="attention_mask")})

    def run(**options):
        student = qakd.prepare(teacher, loader, toolkit)
        return qakd.distill(student, teacher, loader, method=method, epochs=2, seed=0, **options)

    whole = run()
    student = qakd.prepare(teacher, loader, toolkit)
    with qakd.attach(student, teacher, method=method) as kd:
        kd.train()
        logits = student(input_ids=ids, attention_mask=mask)["logits"]
        with torch.no_grad():
            taught = teacher(ids, mask)["logits"]
        expected = kl_divergence(logits, taught, 4.0, dim=-1, where=mask).mean()
        torch.testing.assert_close(kd.loss(), expected)
    assert whole.history[0]["kl"] == pytest.approx(float(expected), rel=1e-5)

    # Killed after an epoch, resumed to the last bit.
    class Stop(Exception):
        pass

    class Kill:
        def on_epoch_end(self, row):
            raise Stop

    with pytest.raises(Stop):
        run(checkpoint_dir=tmp_path, callbacks=[Kill()])
    resumed = run(checkpoint_dir=tmp_path, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("method", [SQAKD(), KD(), QKD(0.4, 0.3, 0.3)])
def test_hugging_face_classifiers_learn_and_are_exported(method, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    teacher = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, num_labels=5)).eval()
    images = torch.rand(8, 3, 16, 16)
    loader = [{"pixel_values": images, "labels": torch.arange(8) % 5}]
    student = qakd.prepare(teacher, loader)
    result = qakd.distill(student, teacher, loader, method=method, epochs=3, val_loader=loader, seed=0)
    assert {"val_accuracy", "val_agreement"} <= result.history[-1].keys()
    file = qakd.export_onnx(result.model, images, tmp_path / "vit.onnx", target="onnxruntime")
    assert file.parity.weight_codes > 0


def test_a_networks_own_loss_is_learned():
    class Own(Text):
        def forward(self, input_ids, attention_mask, labels=None):
            outputs = super().forward(input_ids, attention_mask)
            if labels is not None:
                outputs["loss"] = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
            return outputs

    ids, mask = torch.randint(20, (8, 6)), torch.ones(8, 6)
    loader = [{"input_ids": ids, "attention_mask": mask, "labels": ids % 7}]
    teacher = Own().eval()
    student = qakd.prepare(copy.deepcopy(teacher), loader)
    with torch.no_grad():
        expected = float(student(ids, mask, ids % 7)["loss"])
    result = qakd.distill(student, None, loader, method=QAT(), task_loss="model", epochs=1)
    assert result.history[0]["ce"] == pytest.approx(expected, rel=1e-5)


def test_outputs_that_one_mode_alone_has_are_named_before_training():
    class Changing(Net):
        def forward(self, x):
            found = super().forward(x)
            return found if self.training else {"boxes": found["boxes"]}

    network = Changing({"classes": 4, "boxes": 4})
    match = {"boxes": qakd.L2(), "classes": qakd.KL()}
    with pytest.raises(QakdError, match=r"'classes'.*the other network has it: structures differ between training and eval"):
        _distilled(network, method=SQAKD(match=match))
    with pytest.raises(QakdError, match=r"match names 'classes', which the student does not output"):
        _distilled(network, method=SQAKD(match=match), val_loader=LOADER)


def test_a_loss_without_a_gradient_is_refused_at_the_first_batch():
    class Detached(Net):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(QakdError, match="'logits' without a gradient"):
        _distilled(Detached({"out": 5}, wrap=_only))
    labelled = [(X, torch.zeros(12, dtype=torch.long))]
    for loss, message in ((lambda outputs, targets: outputs.argmax(1).float(), "has no gradient"), (lambda *_: 0.0, "float")):
        with pytest.raises(QakdError, match=message):
            _distilled(Net({"out": 5}, wrap=_only), loader=labelled, method=QAT(), task_loss=loss)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16])
def test_images_of_another_type_than_the_network_are_one_line(dtype):
    network = Net({"out": 5}, wrap=_only).eval()
    images = (X * 8).to(dtype)
    student = qakd.prepare(network, LOADER, weight_bits=4)
    with pytest.raises(QakdError, match=r"calibration_batches: 'input' \(12, 3, 8, 8\) is .*batch_fn=lambda batch"):
        qakd.prepare(network, [images])
    with pytest.raises(QakdError, match=r"loader: 'input' .*computes in float32"):
        qakd.distill(student, network, [images], epochs=1)


def test_a_teacher_in_half_precision_teaches_as_it_is_and_a_student_in_it_is_refused():
    network = Net({"out": 5}, wrap=_only).eval()
    student, half = qakd.prepare(network, LOADER, weight_bits=4), copy.deepcopy(network).bfloat16()
    before = copy.deepcopy(half.state_dict())
    with qakd.attach(student, half, SQAKD(temperature=2.0)) as kd:
        expected = kl_divergence(student(X), half(X.bfloat16()), 2.0).mean()
        torch.testing.assert_close(kd.loss(), expected)
    qakd.distill(student, half, LOADER, epochs=1, val_loader=LOADER)
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in before.items())
    with pytest.raises(QakdError, match=r"pass model\.float\(\)"):
        qakd.prepare(half, LOADER)
    with pytest.raises(QakdError, match=r"prepared_model\.float\(\)"):
        qakd.distill(student.bfloat16(), network, LOADER, epochs=1)
    with pytest.raises(QakdError, match=r"teacher\.float\(\)"):
        qakd.distill(qakd.prepare(network, LOADER), half, [(X, torch.zeros(12).long())], method=QKD(), epochs=3)
