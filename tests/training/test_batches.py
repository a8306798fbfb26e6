"""Batches alone: groups, weights, and an epoch that goes on where it was interrupted."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from qakd_plugin import KD, LabelsRequiredError, QakdError, TrainingError, distill
from qakd_plugin.augment.selector import FixedAugmentation
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.training.batches import Batches
from qakd_plugin.training.distributed.processes import Processes


def _noisy(images):
    return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)


def _batches(loader, transform=None, batch_fn=default_batch, **options):
    augment = FixedAugmentation(transform, None)
    return Batches(loader, Processes(), batch_fn=batch_fn, augment=augment, method=KD(), **options)


def _loader(seed=5):
    images = torch.linspace(0, 1, 44).reshape(22, 1, 1, 2)
    data = TensorDataset(images, torch.arange(22))
    return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))


def test_groups_hold_so_many_batches_and_the_weight_of_each():
    batches = _batches(_loader(), accumulate=4)
    groups = list(batches.epoch(0, 0, labels=True))
    assert (len(batches), batches.steps) == (6, 2)
    assert [[batch.weight for batch in group] for group in groups] == [[4, 4, 4, 4], [4, 2]]
    assert all(batch.total == batch.weight == len(batch.targets) for group in groups for batch in group)
    assert sorted(int(y) for group in groups for batch in group for y in batch.targets) == list(range(22))


def test_labels_are_touched_only_where_they_are_read():
    batches = _batches([torch.zeros(2, 1, 1, 1)])
    assert next(batches.epoch(0, 0, labels=False))[0].targets is None
    with pytest.raises(LabelsRequiredError, match="KD"):
        next(batches.epoch(0, 0, labels=True))


@pytest.mark.parametrize("done", [1, 3, 5])
def test_an_interrupted_epoch_goes_on_with_the_same_batches_and_draws(done):
    torch.manual_seed(0)
    whole = _batches(_loader(), _noisy)
    expected = [list(whole.epoch(epoch, 0, labels=True)) for epoch in range(2)]

    torch.manual_seed(0)
    stopped = _batches(_loader(), _noisy)
    list(stopped.epoch(0, 0, labels=True))
    epoch = stopped.epoch(1, 0, labels=True)
    for _ in range(done):
        next(epoch)
    state = stopped.state_dict()

    torch.manual_seed(99)
    resumed = _batches(_loader(seed=7), _noisy)
    resumed.load_state_dict(state)
    found = list(resumed.epoch(1, done, labels=True))
    assert len(found) == len(expected[1]) - done
    for (mine,), (other,) in zip(found, expected[1][done:], strict=True):
        assert torch.equal(mine.inputs, other.inputs)
        assert torch.equal(mine.targets, other.targets)


def test_a_pass_beside_training_leaves_no_trace():
    torch.manual_seed(0)
    expected = [group[0].inputs for group in _batches(_loader(), _noisy).epoch(0, 0, labels=False)]
    torch.manual_seed(0)
    batches = _batches(_loader(), _noisy)
    with batches.aside() as some:
        first = next(some)
        torch.rand(3)
    found = [group[0].inputs for group in batches.epoch(0, 0, labels=False)]
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
    assert first.inputs.shape == expected[0].shape


def test_an_empty_epoch_is_an_error():
    class Empty(list):
        def __len__(self):
            return 3

    with pytest.raises(TrainingError, match="loader is empty"):
        list(_batches(Empty()).epoch(0, 0, labels=False))


@pytest.mark.parametrize("counts", [{}, torch.ones(10)], ids=["empty", "a tensor"])
def test_a_loader_may_have_any_attribute(counts, make_student, teacher, batches):
    """Class counts are a common one."""

    class Loader(list):
        pass

    loader = Loader(batches[:2])
    loader.counts = counts
    result = distill(make_student(), teacher, loader, epochs=1, val_loader=loader)
    assert all("val_accuracy" in row for row in result.history)


def test_processes_end_together_where_one_runs_out_of_batches():
    class Two(Processes):
        def __init__(self):
            super().__init__()
            self.count = 2

        def sums(self, numbers):
            return numbers

    class Short(list):
        def __len__(self):
            return 8

    batches = Batches(
        Short([torch.zeros(2, 1, 1, 1)] * 2), Two(), batch_fn=default_batch, augment=FixedAugmentation(None, None), method=KD()
    )
    with pytest.raises(QakdError, match=r"loader: it ended 3 batches before its length \(4\) said"):
        list(batches.epoch(0, 0, labels=False))
