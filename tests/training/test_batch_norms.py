"""BatchNorms in training: those that the user froze stay as they are, and none gets a batch of which it takes no variance."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qakd_plugin import TrainingError, attach, distill, prepare

IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _net():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def _frozen(net, *names):
    for name in names:
        net.get_submodule(name).requires_grad_(False)
    return net


def _means(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("running_mean")}


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao", "torch_ao_eager"])
def test_frozen_statistics_stay_and_others_move(toolkit):
    batches = IMAGES.split(8)
    student = prepare(_frozen(_net(), "1"), batches, toolkit)
    before = _means(student)
    assert len(before) == 2
    after = _means(distill(student, _net(), batches, epochs=2, lr=1e-3, recalibrate_batches=2).model)
    assert [torch.equal(after[name], value) for name, value in before.items()] == [True, False]


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_a_loop_of_ones_own_keeps_frozen_statistics(toolkit):
    student = prepare(_frozen(_net(), "1", "4"), [IMAGES], toolkit)
    before = _means(student)
    with attach(student, _net()) as kd:
        kd.train()
        student(IMAGES)
        kd.loss().backward()
    assert all(torch.equal(value, before[name]) for name, value in _means(student).items())


def _mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)).eval()


def _loader(count, **options):
    return DataLoader(TensorDataset(IMAGES[:count]), collate_fn=lambda rows: torch.stack([row[0] for row in rows]), **options)


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
@pytest.mark.parametrize("loader", [_loader(17, batch_size=8), [IMAGES[:8], IMAGES[8:9]], _loader(4, batch_size=1)])
def test_a_batch_of_one_is_refused_before_anything_is_trained(toolkit, loader):
    student = prepare(_mlp(), [IMAGES], toolkit)
    before = {name: value.clone() for name, value in student.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(
        TrainingError, match=r"its smallest batch is one sample, and a BatchNorm over 16 channels.*drop_last=True"
    ):
        distill(student, _mlp(), loader, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items() if name in before)


def test_a_batch_of_one_is_trained_with_where_no_batch_norm_minds():
    for net, loader in (
        (_mlp(), _loader(17, batch_size=8, drop_last=True)),
        (_net(), _loader(17, batch_size=8)),  # 36 values per channel
        (_frozen(_mlp(), "2"), _loader(17, batch_size=8)),
    ):
        assert distill(prepare(net, [IMAGES]), net, loader, epochs=1).history
