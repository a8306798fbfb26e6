"""A run goes on only as the run it was: the same teacher, seed, normalization, augmentation and splitting of batches."""

import itertools
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.transforms import v2

from qakd_plugin import QKD, CheckpointError, CMISelector, QakdError, distill
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.training.checkpoint import CheckpointStore
from qakd_plugin.training.data_facts import data_facts, hidden_state
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
    with pytest.raises(CheckpointError, match="belongs to another run: teacher"):
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


def test_a_checkpoint_that_says_less_is_of_another_run(tmp_path):
    CheckpointStore(tmp_path, {"method": "SQAKD()"}).save(1, {"step": 1})
    with pytest.raises(CheckpointError, match="seed is None there and 3 here"):
        CheckpointStore(tmp_path, {"method": "SQAKD()", "seed": 3}).load()


# -- the data


IMAGES = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def _loader(images=IMAGES, batch=16, **options):
    return DataLoader(TensorDataset(images), batch, **({"shuffle": True} | options))


class Noisy(Dataset):
    """Draws from torch's generator, as augmentations in data sets do."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return (IMAGES[index] + 0.1 * torch.randn(1, 32, 32)).clamp(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: _loader(IMAGES.flip(0) * 0.3), r"data is 'samples\[0\] = torch.float32 \(2, 1, 32, 32\) \w+' there and"),
        (lambda: _loader(IMAGES[:56]), "data is 'samples = 64' there and 'samples = 56' here"),
        (lambda: _loader(batch=20), "loader is 'loader.batch_size = 16' there and 'loader.batch_size = 20' here"),
        (
            lambda: _loader(shuffle=False),
            "loader is 'sampler 0 = RandomSampler' there and 'sampler 0 = Sequential",
        ),
        (lambda: _loader(num_workers=1), "loader is 'workers = 0' there and 'workers = 1' here"),
        (lambda: _loader(generator=torch.Generator()), "loader is 'generators = 0' there and 'generators = 1' here"),
        (lambda: _loader(collate_fn=lambda samples: torch.stack([x for (x,) in samples])), "data is"),
    ],
    ids=["images", "samples", "batch", "order", "workers", "generator", "collate"],
)
def test_other_data_or_another_loader_is_refused_and_named(change, message, tmp_path, make_student, teacher):
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "trackers": ()}
    distill(make_student(), teacher, _loader(), **options)
    with pytest.raises(CheckpointError, match=f"belongs to another run: {message}"):
        distill(make_student(), teacher, change(), resume=True, **options)
    distill(make_student(), teacher, _loader(), resume=True, **options)


def test_another_held_out_split_is_refused_and_what_is_forced_goes_on(tmp_path, make_student, teacher, caplog):
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "trackers": ()}
    first = distill(make_student(), teacher, _loader(), val_loader=_loader(IMAGES[:20]), **options)
    for changed in ({}, {"val_loader": _loader(IMAGES[20:40])}):
        with pytest.raises(CheckpointError, match="held-out data is"):
            distill(make_student(), teacher, _loader(), resume=True, **changed, **options)
    forced = distill(make_student(), teacher, _loader(), resume="force", **options)
    assert 'resume="force" goes on with it' in caplog.text
    assert torch.equal(forced.model.head.weight, first.model.head.weight)
    with pytest.raises(QakdError, match="resume='forced' is unknown"):
        distill(make_student(), teacher, _loader(), resume="forced", **options)


def test_another_teacher_that_learns_is_refused(tmp_path, make_student, teacher, batches):
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "trackers": (), "method": QKD(0, 1, 0)}
    distill(make_student(), teacher, batches[:1], **options)
    with torch.no_grad():
        teacher.head.weight.mul_(-1)
    with pytest.raises(CheckpointError, match="belongs to another run: teacher is"):
        distill(make_student(), teacher, batches[:1], resume=True, **options)


def _seen(**options):
    return data_facts(DataLoader(Noisy(), 16, shuffle=True, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_look_at_the_data_draws_nothing_and_sees_the_same_each_time(workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    own = torch.Generator().manual_seed(3)
    assert _seen(num_workers=workers, generator=own) == _seen(num_workers=workers, generator=own)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own.get_state(), torch.Generator().manual_seed(3).get_state())
    assert _seen(num_workers=workers).draws
    assert not data_facts(_loader(num_workers=workers)).draws


class Odd(Dataset):
    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.read(index)


def test_data_that_cannot_be_read_alone_or_is_never_the_same_is_represented_by_that():
    counter = itertools.count()
    never = data_facts(DataLoader(Odd(lambda _: torch.tensor(float(next(counter)))), 2))
    assert never.data == ["samples = 4", "not the same when it is read again"]
    assert never.draws
    assert data_facts(DataLoader(Odd(lambda index: {}[index]), 2)).data == ["samples = 4", "cannot be read alone (KeyError)"]
    assert data_facts(iter([])).data == ["cannot be indexed"]


def test_images_of_pillow_are_told_apart_by_their_pixels():
    dark, bright = (Image.new("L", (4, 4), color) for color in (0, 9))
    found = [
        data_facts(DataLoader(Odd(lambda _, image=image: image), 2, collate_fn=list)).data for image in (dark, bright, dark)
    ]
    assert found[0] == found[2] != found[1]


def test_workers_that_live_on_with_random_data_are_refused_where_they_would_be_resumed(tmp_path, make_student, teacher, caplog):
    loader = DataLoader(Noisy(), 32, num_workers=1, persistent_workers=True)
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "trackers": ()}
    distill(make_student(), teacher, loader, resume=True, **options)
    assert "will not go on bit-identically after an interruption. loader: persistent_workers=True" in caplog.text
    with pytest.raises(CheckpointError, match=r"Pass persistent_workers=False for a run .*, or resume=.force"):
        distill(make_student(), teacher, loader, resume=True, **options)
    distill(make_student(), teacher, loader, resume="force", **options)
    still = DataLoader(TensorDataset(IMAGES), 32, num_workers=1, persistent_workers=True)
    assert hidden_state(still, data_facts(still)) is None
