"""Networks that FSDP2 divides between two processes: trained as whole ones are, saved as whole ones are, and taken up again."""

import re

import pytest
import torch
from test_resume import _log, _require_same, _results
from training_server import BATCHES, Server, was_killed

from qakd_plugin import QakdError
from qakd_plugin.training.distributed.launch import divides

ONE = {"processes": 1, "listed": True}
TWO = {"processes": 2, "listed": True}
FSDP = {**TWO, "environment": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
ALIKE = {"norm": False, "noise": False, "lr": 1e-3, "samples": 32 * BATCHES + 1, "held_out": 65}
"""Without what depends on a process's share; the last batch, and the last of those held out, are for one process alone."""
LONG = {"accumulate": 2, "ema": 0.9}
KINDS = {
    "own": {"toolkit": "modelopt", "quantizers": "own", "method": "QKD", "options": LONG, "double": True},
    "LSQ": {"toolkit": "modelopt", "quantizers": "LSQ", "method": "QKD", "options": LONG},
    "torchao": {"toolkit": "torchao", "quantizers": "own", "method": "SQAKD"},
}
WHOLE = {"own": (ONE, 1e-9), "LSQ": (TWO, 1e-6), "torchao": (TWO, 1e-6)}
"""What a kind is compared with, and how close weights are. In float32 two processes add in another order than one, which moves
a few codes across a tie; how far the runs part then is chance."""


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def _run(server, out, **order):
    codes = server.run(out, **order)
    assert codes == [0] * order["processes"], _log(out)
    return _results(out, order)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What processes give that have all weights."""
    runs = {kind: {**WHOLE[kind][0], **ALIKE, **order} for kind, order in KINDS.items()}
    return {kind: _run(server, tmp_path_factory.mktemp(kind), **run)[0] for kind, run in runs.items()}


def _require_close(found, expected, within):
    for part in ("student", "teacher"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert found[part][name].shape == value.shape, name
            assert torch.allclose(found[part][name].double(), value.double(), rtol=0, atol=within), name
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert row == pytest.approx(other, abs=within, nan_ok=True)


@pytest.fixture(scope="module")
def divided(server, tmp_path_factory):
    """What two processes give with a part of the networks each."""
    return {kind: _run(server, tmp_path_factory.mktemp(kind), **FSDP, **ALIKE, **order) for kind, order in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_divided_networks_give_the_weights_of_whole_ones(kind, divided, whole):
    first, second = divided[kind]
    _require_same([first], [second])
    _require_close(first, whole[kind], WHOLE[kind][1])


@pytest.mark.parametrize(
    ("kind", "before", "after", "step"),
    # Within an epoch samplers of one process and of two have drawn differently: with another number, at the end of one.
    [("LSQ", FSDP, FSDP, 11), ("LSQ", FSDP, TWO, 11), ("own", FSDP, ONE, 9), ("own", ONE, FSDP, 9)],
    ids=["divided", "divided, whole", "two, one", "one, two"],
)
def test_a_killed_run_goes_on_with_as_many_processes_and_with_others(
    kind, before, after, step, server, divided, whole, tmp_path
):
    order = {**ALIKE, **KINDS[kind], "folder": str(tmp_path / "checkpoints")}
    assert was_killed(server.run(tmp_path, **before, **order, die=["step", step]))
    if before == after:
        _require_same(_run(server, tmp_path, **after, **order), divided[kind])
        return
    if after == TWO:
        assert server.run(tmp_path, **after, **order) == [1, 1]
        assert "processes is '2, with networks divided' there and 2 here" in (tmp_path / "error-0.txt").read_text()
    _require_close(_run(server, tmp_path, **after, **order, resume="force")[0], whole[kind], WHOLE[kind][1])


@pytest.mark.parametrize(("kind", "victim"), [("layer", 1), ("loss", 0)])
def test_an_error_in_one_process_ends_both_with_its_message(kind, victim, server, tmp_path):
    order = {"toolkit": "modelopt", "quantizers": "own", "failing": {kind: victim}}
    assert server.run(tmp_path, **FSDP, **order) == [0, 0], _log(tmp_path)
    found = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True)[kind][0] for rank in range(2)]
    assert found[victim] == f"ValueError: the {kind} fails"
    assert found[1 - victim] == f"QakdError: process {victim} of 2 failed: ValueError: the {kind} fails"


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"toolkit": "pt2e", "quantizers": "own"}, "prepared by pt2e and cannot be divided.*toolkit='modelopt'.*torchrun"),
        ({"toolkit": "modelopt", "quantizers": "EWGS"}, r"EWGS refreshes delta.*EWGS\(refresh_every=0, delta="),
        (
            {"toolkit": "modelopt", "quantizers": "own", "augment": "CMI"},
            r"CMISelector.*rank_augmentations\(teacher, batches\)",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(order, message, server, tmp_path):
    assert server.run(tmp_path, **{**FSDP, "listed": False}, **order) == [1, 1]
    error = (tmp_path / "error-0.txt").read_text()
    assert re.match(f"QakdError: .*{message}", error), error


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "launched for FSDP 1: .*--fsdp_version 2"),
        ({}, "launched for FSDP 1: "),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true.*fsdp_offload_params set to false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "launched for DEEPSPEED.*torchrun.*--use_fsdp --fsdp_version 2"),
    ],
)
def test_launches_whose_options_would_be_passed_over_are_refused(environment, message, monkeypatch):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(QakdError, match=message):
        divides()
