"""A run goes on only as the run it was: the same teacher, seed, normalization, augmentation and splitting of batches."""

from functools import partial

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.transforms import v2

from qakd_plugin import CheckpointError, CMISelector, distill
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.training.checkpoint import CheckpointStore
from qakd_plugin.training.facts import facts


def _shifted(images, by=0.1):
    return (images + by).clamp(0, 1)


def _scaled(factor):
    return lambda images: (images * factor).clamp(0, 1)


class _Dim:
    def __init__(self, factor):
        self.factor = factor
        self._seen = object()

    def __call__(self, images):
        return images * self.factor


def _two_metrics():
    return MetricCollection([MulticlassAccuracy(10), MulticlassF1Score(10)])


@pytest.fixture
def resumed(tmp_path, make_student, teacher, batches):
    """Trains a run of one epoch, and then tries to go on with other options."""
    whole = [*batches[:2]]

    def run(first, second):
        options = {"epochs": 1, "checkpoint_dir": tmp_path / "run", "trackers": ()}
        distill(make_student(), teacher, whole, **(options | first))
        return distill(make_student(), teacher, whole, resume=True, **(options | second))

    return run


def test_the_same_options_made_anew_go_on(resumed):
    def options():
        return {
            "seed": 3,
            "augment": v2.Compose([v2.Lambda(_scaled(0.5)), v2.RandomErasing(p=0.25)]),
            "batch_fn": lambda batch: (batch[0], batch[1]),
            "input_stats": ([0.0], [1.0]),
            "metric": _two_metrics(),
            "monitor": "multiclass_accuracy",
        }

    resumed(options(), options())


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"seed": 1}, {"seed": 2}, "seed is 1 there and 2 here"),
        (
            {"metric": MulticlassAccuracy(10)},
            {"metric": MulticlassF1Score(10)},
            "metric is 'metric = MulticlassAccuracy' there and 'metric = MulticlassF1Score' here",
        ),
        (
            {"metric": MulticlassAccuracy(10, average="macro")},
            {"metric": MulticlassAccuracy(10, average="micro")},
            r"metric is \"metric.average = 'macro'\" there and \"metric.average = 'micro'\" here",
        ),
        (
            {"metric": _two_metrics(), "monitor": "multiclass_accuracy"},
            {"metric": _two_metrics(), "monitor": "multiclass_f1_score"},
            "monitor is 'multiclass_accuracy' there and 'multiclass_f1_score' here",
        ),
        ({}, {"input_stats": ([0.5], [0.25])}, "input_stats is 'input_stats = None' there and 'input_stats = tuple' here"),
        (
            {"augment": v2.RandomErasing(p=0.25)},
            {"augment": v2.RandomErasing(p=0.5)},
            "parameters of the augmentation is 'augment.p = 0.25' there and 'augment.p = 0.5' here",
        ),
        (
            {"augment": partial(_shifted, by=0.1)},
            {"augment": partial(_shifted, by=0.2)},
            r"parameters of the augmentation is \"augment.keywords\['by'\] = 0.1\" there and .* = 0.2\" here",
        ),
        (
            {"augment": lambda x: x * 0.5},
            {"augment": lambda x: x * 0.25},
            r"parameters of the augmentation is .augment.__code__ = ",
        ),
        (
            {"augment": _scaled(0.5)},
            {"augment": _scaled(0.25)},
            "parameters of the augmentation is 'augment with factor = 0.5' there and 'augment with factor = 0.25' here",
        ),
        ({"augment": _Dim(0.5)}, {"augment": _Dim(0.25)}, "parameters of the augmentation is 'augment.factor = 0.5' there"),
        ({}, {"batch_fn": lambda batch: (1 - batch[0], batch[1])}, "batch_fn is 'batch_fn = default_batch' there"),
    ],
    ids=[
        "seed",
        "metric",
        "average",
        "monitor",
        "input_stats",
        "transform",
        "partial",
        "lambda",
        "closure",
        "attributes",
        "batch_fn",
    ],
)
def test_other_options_are_refused_and_named(first, second, message, resumed):
    with pytest.raises(CheckpointError, match=f"belongs to another run: {message}"):
        resumed(first, second)


def test_another_frozen_teacher_is_refused(tmp_path, make_student, teacher, batches):
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "trackers": ()}
    distill(make_student(), teacher, batches[:2], **options)
    with torch.no_grad():
        teacher.head.weight.mul_(-1)
    with pytest.raises(CheckpointError, match="belongs to another run: frozen teacher"):
        distill(make_student(), teacher, batches[:2], resume=True, **options)


def test_facts_hold_no_address_and_no_state_of_the_program():
    class Counter:
        calls = 0

    def made(counter):
        def augment(images):
            counter.calls += 1
            return images

        return augment

    first, second = Counter(), Counter()
    first.calls = 5
    assert facts(made(first), "augment") == facts(made(second), "augment")
    for value in (made(first), _Dim(0.5), v2.Compose([v2.RandAugment(), nn.Identity()]), default_batch, first.__init__):
        assert not any("0x" in line for line in facts(value, "augment"))


def test_facts_tell_selectors_and_modules_apart():
    first = CMISelector({"dim": _scaled(0.5)})
    assert facts(first, "augment") == facts(CMISelector({"dim": _scaled(0.5)}), "augment")
    assert facts(first, "augment") != facts(CMISelector({"dim": _scaled(0.25)}), "augment")
    blur = nn.Conv2d(1, 1, 3, bias=False)
    before = facts(blur, "augment")
    with torch.no_grad():
        blur.weight.mul_(2)
    assert facts(blur, "augment") != before


def test_what_leads_back_to_itself_ends():
    knot = _Dim(0.5)
    knot.inner = knot
    assert facts(knot, "augment") == ["augment = _Dim", "augment.factor = 0.5", "augment.inner = _Dim"]


def test_a_checkpoint_of_a_version_that_wrote_down_less_is_read(tmp_path):
    CheckpointStore(tmp_path, {"method": "SQAKD()"}).save(1, {"step": 1})
    assert CheckpointStore(tmp_path, {"method": "SQAKD()", "seed": 3}).load() == {"step": 1}
