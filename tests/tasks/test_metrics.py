"""The user's metric, in training and through a runtime."""

import pytest
import torch
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelAveragePrecision

from qakd_plugin.errors import QakdError
from qakd_plugin.tasks.metrics import Counted, higher_is_better, outputs_and_targets

LOGITS, LABELS = torch.randn(64, 5), torch.randint(5, (64,))


def test_numbers_are_those_of_the_metric_itself_whatever_the_batches():
    metric = MetricCollection([MulticlassAccuracy(5, average="micro"), MulticlassJaccardIndex(5)])
    counted = Counted(metric, outputs_and_targets)
    for start in range(0, 64, 10):
        counted.update({"logits": LOGITS[start : start + 10]}, LABELS[start : start + 10])
    metric.update(LOGITS, LABELS)
    expected = metric.compute()
    assert counted.compute() == {
        "multiclass_accuracy": pytest.approx(float(expected["MulticlassAccuracy"])),
        "multiclass_jaccard_index": pytest.approx(float(expected["MulticlassJaccardIndex"])),
    }
    assert counted.samples == 64


def test_the_users_metric_is_left_alone():
    metric = MulticlassAccuracy(5, average="micro")
    metric.update(LOGITS, LABELS)
    before = float(metric.compute())
    Counted(metric, outputs_and_targets).update({"logits": LOGITS[:3]}, LABELS[:3])
    assert float(metric.compute()) == before


def test_several_outputs_need_a_function_that_says_what_is_counted():
    outputs = {"classes": LOGITS, "depth": LOGITS[:, 0]}
    with pytest.raises(QakdError, match=r"'classes' \(64, 5\).*metric_fn="):
        Counted(MulticlassAccuracy(5), outputs_and_targets).update(outputs, LABELS)
    counted = Counted(MeanSquaredError(squared=False), lambda outputs, targets: (outputs["depth"], targets))
    counted.update(outputs, LOGITS[:, 0] + 2)
    assert counted.compute() == {"mean_squared_error": pytest.approx(2.0)}


def test_the_bootstrap_interval_is_that_of_the_mean_of_proportions():
    hits = torch.zeros(400)
    hits[:300] = 1
    counted = Counted(MulticlassAccuracy(2, average="micro"), outputs_and_targets, bootstraps=300)
    logits = torch.stack([1 - hits, hits], dim=1)
    counted.update({"logits": logits}, torch.ones(400, dtype=torch.long))
    low, high = counted.intervals()["multiclass_accuracy"]
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5  # the normal interval of 300 hits in 400
    assert low == pytest.approx(0.75 - half, abs=0.25 * half)
    assert high == pytest.approx(0.75 + half, abs=0.25 * half)


def test_detections_are_resampled_image_by_image():
    pytest.importorskip("pycocotools")
    from torchmetrics.detection import MeanAveragePrecision

    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    targets = [{"boxes": box, "labels": torch.tensor([1])}] * 4
    outputs = {"boxes": box.expand(4, 1, 4), "scores": torch.ones(4, 1)}

    def detections(outputs, targets):
        labels = torch.tensor([1])
        pairs = zip(outputs["boxes"], outputs["scores"], strict=True)
        return [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores in pairs], targets

    counted = Counted(MeanAveragePrecision(), detections, bootstraps=3)
    counted.update(outputs, targets)
    assert counted.compute()["map"] == pytest.approx(1.0)
    assert counted.intervals()["map"] == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("metric", "targets", "message"),
    [
        (MultilabelAveragePrecision(5), LABELS, "does not take"),
        (MulticlassAccuracy(5), None, "holds no targets"),
        ("accuracy", LABELS, "must be a torchmetrics"),
    ],
)
def test_a_metric_that_does_not_fit_is_named(metric, targets, message):
    with pytest.raises(QakdError, match=message):
        Counted(metric, outputs_and_targets).update({"logits": LOGITS}, targets)


def test_a_metric_that_was_given_nothing_or_shows_no_number_is_named():
    with pytest.raises(QakdError, match="nothing was counted"):
        Counted(MulticlassAccuracy(5), outputs_and_targets).compute()
    counted = Counted(MulticlassAccuracy(5, average=None), outputs_and_targets)
    counted.update({"logits": LOGITS}, LABELS)
    with pytest.raises(QakdError, match="no single number"):
        counted.compute()


def test_the_direction_is_the_metrics_own():
    both = MetricCollection([MulticlassAccuracy(5), MeanSquaredError()])
    assert higher_is_better(both, "multiclass_accuracy")
    assert not higher_is_better(both, "mean_squared_error")
    assert not higher_is_better(MeanSquaredError(), "mean_squared_error")
    with pytest.raises(QakdError, match="there are multiclass_accuracy, mean_squared_error"):
        higher_is_better(both, "recall")
