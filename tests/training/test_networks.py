"""Networks go to the run's device and come back; learners step."""

import pytest
import torch
from torch import nn

from qakd_plugin.training.networks import Learner, on_device


class _Moves(nn.Linear):
    """Notes where it is sent, and stays where it is: there is one device here."""

    def __init__(self):
        super().__init__(2, 2)
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        return self


@pytest.mark.parametrize("ends_well", [True, False])
def test_networks_return_to_the_device_they_came_from(ends_well):
    student, teacher = _Moves(), _Moves()
    try:
        with on_device(torch.device("cuda", 0), student, None, teacher):
            assert student.sent == teacher.sent == ["cuda:0"]
            if not ends_well:
                raise RuntimeError
    except RuntimeError:
        assert not ends_well
    assert student.sent == teacher.sent == ["cuda:0", "cpu"]


def test_a_network_without_tensors_is_left_alone():
    with on_device(torch.device("cpu"), nn.ReLU()):
        pass


def test_a_learner_clips_steps_and_forgets_its_gradients():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    learner = Learner(layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full((1, 1), 4.0)
    assert float(learner.clip(0.5)) == 4.0
    learner.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5)
    assert layer.weight.grad is None
    assert learner.lr == 0.5
