"""Calibration batches: whatever their number, two are held, and they give what a list of them gives."""

import weakref

import pytest
import torch
from torch import nn

from qakd_plugin import LSQ, QakdError, prepare, use_quantizers

TOOLKITS = ["modelopt", "pt2e", "torch_ao", "torch_ao_eager"]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()


class _Watched:
    """Random images, one batch after the other, and how many of them were alive at once."""

    def __init__(self, count):
        self.count, self.alive, self.most, self.given = count, 0, 0, 0

    def __iter__(self):
        for _ in range(self.count):
            batch = torch.randn(4, 3, 8, 8)
            self.given += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(batch, self._gone)
            yield batch
            del batch

    def _gone(self):
        self.alive -= 1


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_stream_of_batches_is_not_held(toolkit):
    stream = _Watched(30)
    prepare(_network(), stream, toolkit)
    assert (stream.given, stream.most <= 3) == (30, True)  # the first, the one that ran, and the one that comes


def test_other_bits_take_a_stream_that_is_not_held():
    student = prepare(_network(), [torch.randn(4, 3, 8, 8)])
    stream = _Watched(30)
    use_quantizers(student, LSQ(weight_bits=4, activation_bits=4), calibration_batches=stream)
    assert (stream.given, stream.most <= 3) == (30, True)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_batches_that_are_drawn_one_by_one_give_what_a_list_gives(toolkit):
    network = _network()
    states = []
    for held in (True, False):
        torch.manual_seed(1)
        batches = _Watched(5)
        prepared = prepare(network, list(batches) if held else batches, toolkit, activation_bits=4)
        states.append({name: value for name, value in prepared.state_dict().items() if isinstance(value, torch.Tensor)})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("hooked", [False, True])
def test_what_a_loader_raises_comes_as_it_is(hooked):
    def broken():
        yield torch.randn(4, 3, 8, 8)
        raise RuntimeError("the disk is gone")

    network = _network()
    if hooked:
        network[0].register_forward_hook(lambda module, args, output: output)
    with pytest.raises(RuntimeError, match=r"^the disk is gone$"):
        prepare(network, broken())


def test_every_batch_is_looked_at_where_no_activation_has_a_range():
    tokens = [torch.randn(2, 4), torch.full((2, 4), torch.nan)]
    with pytest.raises(QakdError, match="batch 1 holds NaN"):
        prepare(nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 4)), tokens, "torchao")
