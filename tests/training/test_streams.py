"""Training data without a length, or that can be walked once: no batch is lost or trained with twice, and a run goes on."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from qakd_plugin import CheckpointError, CMISelector, QakdError, TrainingError, distill, prepare


class Numbered(IterableDataset):
    """Images that say in their first value which one they are."""

    def __init__(self, count, draw=False):
        self.count, self.draw = count, draw

    def __iter__(self):
        for number in range(self.count):
            image = torch.rand(3, 8, 8) if self.draw else torch.full((3, 8, 8), 0.5)
            image[0, 0, 0] = number
            yield image


class Iterated:
    """A loader that is its own iterator, and at its end begins again or not."""

    def __init__(self, count, again=True):
        self.count, self.again, self.at = count, again, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.count:
            self.at = 0 if self.again else self.at
            raise StopIteration
        self.at += 1
        return _numbered(self.at - 1)


class Telling:
    """A stream whose images no generator of the run draws, but which can say and be told where it stands."""

    def __init__(self, count):
        self.count, self.at = count, 0

    def __iter__(self):
        while self.at < self.count:
            self.at += 1
            yield _numbered(self.at - 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def _numbered(number):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    images[:, 0, 0, 0] = torch.arange(4.0) + 4 * number
    return images


def _seen_by(model):
    """Which images the student got while it was training; hooks see what the loop passes."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: (
            seen.append(args[0][:, 0, 0, 0].int().tolist()) if module.training and torch.is_grad_enabled() else None
        )
    )
    return seen


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*layers).eval()


def _prepared(net, toolkit="modelopt"):
    return prepare(net, [_numbered(number) for number in range(4)], toolkit)


@pytest.mark.parametrize("count", [3, 1])
def test_a_loader_that_is_its_own_iterator_loses_no_batch(net, count):
    student = _prepared(net)
    seen = _seen_by(student)
    distill(student, net, Iterated(count), epochs=3, batch_fn=lambda batch: (batch, None), recalibrate_batches=2)
    assert seen == 3 * [[4 * number + index for index in range(4)] for number in range(count)]


def test_an_epoch_goes_on_where_the_last_ended(net):
    student = _prepared(net)
    seen = _seen_by(student)
    rows = distill(student, net, DataLoader(Numbered(20), batch_size=4), epochs=3, steps_per_epoch=2, accumulate=2).history
    assert len(rows) == 3
    batches = [list(range(start, start + 4)) for start in range(0, 20, 4)]
    assert seen == (3 * batches)[:12]


class Cut(Exception):
    """Raised in the middle of a run."""


def _cut_after(steps):
    class Callback:
        def on_step_end(self, step, losses):
            if step == steps:
                raise Cut

    return Callback()


LOADERS = {
    "draws from the run's generators": lambda: DataLoader(Numbered(20, draw=True), batch_size=4),
    "tells where it stands": lambda: Telling(5),
    "is its own iterator": lambda: Iterated(5),
}


@pytest.mark.parametrize("cut", [1, 4, 6])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_stream_is_taken_up_where_it_was_left(net, tmp_path, kind, cut, caplog):
    options = {"epochs": 2, "steps_per_epoch": 4, "checkpoint_every": 1, "seed": 3, "batch_fn": lambda batch: (batch, None)}
    whole = distill(_prepared(net), net, LOADERS[kind](), checkpoint_dir=tmp_path / "whole", **options).model.state_dict()
    options |= {"checkpoint_dir": tmp_path / "cut"}
    with pytest.raises(Cut):
        distill(_prepared(net), net, LOADERS[kind](), callbacks=[_cut_after(cut)], **options)
    student = _prepared(net)
    seen = _seen_by(student)
    with caplog.at_level(logging.INFO, "qakd_plugin"):
        found = distill(student, net, LOADERS[kind](), resume=True, **options).model.state_dict()
    assert len(seen) == 8 - (cut - 1)  # the checkpoint of the step that was cut had not been written
    assert all(torch.equal(value, found[name]) for name, value in whole.items() if isinstance(value, torch.Tensor))
    told = [record for record in caplog.records if "cannot tell where it stands" in record.getMessage()]
    assert bool(told) == (cut > 1 and kind != "tells where it stands")


def test_a_loader_that_ends_for_good_is_named(net):
    with pytest.raises(TrainingError, match=r"Iterated\) ended within an epoch of 3 batches, and an iterator is walked once"):
        distill(_prepared(net), net, Iterated(3, again=False), epochs=2)
    with pytest.raises(TrainingError, match="it yielded no batch"):
        distill(_prepared(net), net, DataLoader(Numbered(0), batch_size=4), epochs=1, steps_per_epoch=2)


def test_validation_needs_no_length(net):
    batches = [(_numbered(number), torch.randint(5, (4,))) for number in range(2)]
    stream = DataLoader(Numbered(8), batch_size=None, collate_fn=lambda image: (image[None], torch.tensor([1])))
    (start, row) = distill(_prepared(net), net, batches, epochs=1, val_loader=stream).history
    assert {"val_accuracy", "val_agreement"} <= set(start) & set(row)


class Opaque(Telling):
    """Tells where it stands by an object of its own."""

    def state_dict(self):
        return {"at": self.at, "reader": self}


def test_a_place_that_no_checkpoint_can_hold_is_noticed_when_it_is_written(net, tmp_path):
    options = {"epochs": 1, "steps_per_epoch": 4, "checkpoint_dir": tmp_path / "run", "batch_fn": lambda batch: (batch, None)}
    with pytest.raises(
        CheckpointError, match=r"its state_dict\(\) returns more than tensors.*it holds Opaque, int. Return plain data"
    ):
        distill(_prepared(net), net, Opaque(5), checkpoint_every=1, **options)
    assert not [*(tmp_path / "run").glob("step-*")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no length, which the schedule needs. Pass steps_per_epoch="),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"steps_per_epoch": 2, "cache_teacher": "cache"}, "cache_teacher needs data that can be walked again"),
        ({"steps_per_epoch": 2, "augment": CMISelector()}, "looks at the training data over and over"),
    ],
)
def test_what_a_stream_cannot_give_is_refused(net, options, message):
    with pytest.raises(QakdError, match=message):
        distill(_prepared(net), net, DataLoader(Numbered(8), batch_size=4), epochs=1, **options)
