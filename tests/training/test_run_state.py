"""Where a run stands, written down and taken up again."""

import math

import pytest
import torch
from torch import nn

from qakd_plugin import SQAKD, CheckpointError
from qakd_plugin.augment.selector import FixedAugmentation
from qakd_plugin.tasks.batches import default_batch
from qakd_plugin.training.batches import Batches
from qakd_plugin.training.checkpoint import CheckpointStore
from qakd_plugin.training.distributed.processes import Processes
from qakd_plugin.training.run_state import Best, Position, RunState


def _state(layer, folder):
    processes = Processes()
    batches = Batches(
        [torch.zeros(1, 1, 1, 1)], processes, batch_fn=default_batch, augment=FixedAugmentation(None, None), method=SQAKD()
    )
    return RunState({"student": layer}, batches, processes, None if folder is None else CheckpointStore(folder, {}))


def test_a_position_keeps_means_over_samples():
    position = Position(epoch=2, step=9)
    position.count(3, {"loss": 1.0})
    position.count(1, {"loss": 5.0})
    assert position.mean("loss") == 2.0
    assert position.means() == {"loss": 2.0}
    assert position.mean("agreement") is None
    assert position.next_epoch() == Position(epoch=3, step=9)


def test_what_is_saved_is_taken_up(tmp_path):
    layer = nn.Linear(2, 2)
    state = _state(layer, tmp_path)
    with state.begun(resume=False):
        state.position.count(4, {"loss": 0.5})
        state.position.step = 7
        state.best = Best(0, 0.25, {"weight": torch.ones(1)})
        state.history.append({"epoch": 0})
        state.save()
        drawn = torch.rand(3)
    other = nn.Linear(2, 2)
    resumed = _state(other, tmp_path)
    with resumed.begun(resume=True):
        assert torch.equal(other.weight, layer.weight)
        assert resumed.position == state.position
        assert resumed.best.value == 0.25
        assert resumed.history == [{"epoch": 0}]
        assert torch.equal(torch.rand(3), drawn)


def test_a_checkpoint_whose_parts_do_not_fit_is_named(tmp_path):
    state = _state(nn.Linear(2, 2), tmp_path)
    with state.begun(resume=False):
        state.save()
    with (
        pytest.raises(CheckpointError, match=r"step-0.*its student does not fit this run"),
        _state(nn.Linear(3, 3), tmp_path).begun(resume=True),
    ):
        pass


def test_an_empty_folder_starts_at_nothing(tmp_path):
    state = _state(nn.Linear(1, 1), tmp_path)
    with state.begun(resume=True):
        assert state.position == Position()
        assert state.best.value == -math.inf
        assert state.newest() is None


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = _state(nn.Linear(1, 1), None)
    with state.begun(resume=False):
        state.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_folder_is_free_again_afterwards(ends_well, tmp_path):
    state = _state(nn.Linear(1, 1), tmp_path)
    try:
        with state.begun(resume=False):
            state.save()
            with (
                pytest.raises(CheckpointError, match="in use by another run"),
                _state(nn.Linear(1, 1), tmp_path).begun(resume=True),
            ):
                pass
            if not ends_well:
                raise RuntimeError
    except RuntimeError:
        assert not ends_well
    with _state(nn.Linear(1, 1), tmp_path).begun(resume=True):
        pass
    assert not list(tmp_path.glob(".*"))
