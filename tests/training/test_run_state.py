"""Where a run stands, written down and taken up again."""

import copy
import itertools
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
        assert state.way_back() == ""


def _learning(folder):
    """A run with an optimizer and a schedule that have made a step."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    state = _state(layer, folder)
    state._parts |= {"optimizer": optimizer, "scheduler": schedule}

    def step():
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()

    return state, step


def _places(value, path=()):
    """Every place in nested dicts and lists, by the keys that lead to it."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def test_whatever_is_missing_or_of_another_type_in_a_checkpoint_is_one_error_or_harms_nothing(tmp_path):
    state, step = _learning(tmp_path)
    with state.begun(resume=False):
        step()
        state.position.count(4, {"loss": 0.5})
        state.history.append({"epoch": 0})
        state.save()
    path = max(tmp_path.glob("step-*"))
    content = torch.load(path, weights_only=True)
    path.unlink()
    own = ("state", "optimizer", "state")  # what an optimizer keeps of a parameter, only it knows
    places = [place for place in _places(content["state"], ("state",)) if place[:3] != own or len(place) == 3]
    messages = []
    changes = ("gone", None, "text", {"x": 1})
    for place, change in zip(places, itertools.cycle(changes)):  # each place with one, and each at many places
        broken = copy.deepcopy(content)
        inner = broken
        for key in place[:-1]:
            inner = inner[key]
        if change == "gone":
            del inner[place[-1]]
        else:
            inner[place[-1]] = change
        file = CheckpointStore(tmp_path, {}).save(1, broken["state"])
        other, again = _learning(tmp_path)
        try:
            with other.begun(resume=True):
                again()
        except CheckpointError as error:
            messages.append(str(error))
        file.unlink(missing_ok=True)
    assert 2 * len(messages) > len(places)
    assert not [message for message in messages if "\n" in message]


def test_forcing_goes_on_where_only_the_draws_do_not_fit(tmp_path, caplog):
    layer = nn.Linear(2, 2)
    state = _state(layer, tmp_path)
    with state.begun(resume=False):
        state.position.step = 3
        state.save()
    other, resumed = nn.Linear(2, 2), None
    for resume in (True, "force"):
        resumed = _state(other, tmp_path)
        resumed._batches.generators.append(torch.Generator())
        if resume == "force":
            with resumed.begun(resume=resume):
                assert resumed.position.step == 3
        else:
            with (
                pytest.raises(CheckpointError, match="its state of the sources of randomness does not fit"),
                resumed.begun(resume=resume),
            ):
                pass
    assert torch.equal(other.weight, layer.weight)
    assert 'resume="force" goes on with other draws' in caplog.text


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
