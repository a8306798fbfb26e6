"""Divided among processes, a network trains as it does whole, and is gathered into a whole one that can be exported."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from sharded import Tower, networks, trained, work
from torch import nn

from qakd_plugin import QakdError, export_onnx, prepare
from qakd_plugin.training.distributed.sharding import gathered, shard


@pytest.fixture
def _one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.matrix
def test_two_processes_train_a_divided_student_as_one_trains_a_whole_one(tmp_path):
    toolkits = ["modelopt", "torchao"]
    torch.multiprocessing.spawn(work, (tmp_path, toolkits), nprocs=2)
    for toolkit in toolkits:
        student, teacher, x = networks(toolkit)
        whole = sum(parameter.numel() for parameter in student.parameters())
        start = {name: value.clone() for name, value in student.state_dict().items() if isinstance(value, torch.Tensor)}
        expected = trained(student, teacher, x).state_dict()
        moved = False
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{toolkit}-{rank}.pt", weights_only=False)
            assert found["held"] < 0.6 * whole
            for name, value in start.items():
                moved |= not torch.equal(value, expected[name])
                assert torch.allclose(found["state"][name], expected[name], rtol=1e-4, atol=1e-5), name
        assert moved


@pytest.mark.usefixtures("_one_process")
def test_what_is_gathered_goes_into_a_whole_network_that_can_be_exported(tmp_path):
    student, teacher, x = networks("modelopt")
    whole, pupil = copy.deepcopy(student), shard(copy.deepcopy(student))
    assert all(parameter.ndim > 0 for parameter in pupil.parameters())
    found = trained(pupil, shard(copy.deepcopy(teacher).requires_grad_(False)), x)
    whole.load_state_dict(gathered(found))
    expected = trained(student, teacher, x)
    torch.testing.assert_close(whole.eval()(x), expected(x))
    assert export_onnx(whole, x, tmp_path / "gathered.onnx").path.is_file()  # the gate compares it with what was trained


def test_a_network_that_was_not_divided_is_gathered_as_it_is():
    network = Tower()
    assert {name: value.tolist() for name, value in gathered(network).items()} == {
        name: value.tolist() for name, value in network.state_dict().items()
    }


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("toolkit", ["pt2e", "torch_ao"])
def test_students_whose_weights_are_read_beside_their_layers_are_refused(toolkit):
    network = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    student = prepare(network, [torch.randn(4, 16)], toolkit)
    with pytest.raises(QakdError, match=f"prepared by {toolkit}.*toolkit='modelopt'"):
        shard(student)


def test_without_processes_nothing_is_divided():
    with pytest.raises(QakdError, match="torchrun"):
        shard(Tower())
