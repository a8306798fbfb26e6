"""Networks that FSDP2 divides between two processes: trained as whole ones are, saved as whole ones are, and taken up again."""

import re
import shutil

import pytest
import torch
from test_resume import _log, _require_same, _results
from training_server import BATCHES, Server

from qakd_plugin import QakdError
from qakd_plugin.training.distributed.launch import divides

FSDP = {"environment": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "processes": 2, "listed": True}
ONE = {"processes": 1, "listed": True}
ALIKE = {"norm": False, "noise": False, "lr": 1e-3, "samples": 32 * BATCHES + 1, "held_out": 65}
"""Without what depends on a process's share; the last batch, and the last of those held out, are for one process alone."""
KINDS = {
    "modelopt": {"method": "QKD", "toolkit": "modelopt", "quantizers": "LSQ", "options": {"accumulate": 2, "ema": 0.9}},
    "torchao": {"method": "SQAKD", "toolkit": "torchao", "quantizers": "own"},
}


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
    """What one process gives."""
    return {kind: _run(server, tmp_path_factory.mktemp(kind), **ONE, **ALIKE, **order)[0] for kind, order in KINDS.items()}


def _require_close(found, expected, within):
    for part in ("student", "teacher"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert found[part][name].shape == value.shape, name
            assert torch.allclose(found[part][name].double(), value.double(), rtol=0, atol=within), name
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert row == pytest.approx(other, abs=1e-3, nan_ok=True)


@pytest.fixture(scope="module")
def divided(server, tmp_path_factory):
    """What two processes give with a part of the networks each."""
    return {kind: _run(server, tmp_path_factory.mktemp(kind), **FSDP, **ALIKE, **order) for kind, order in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_divided_networks_give_the_weights_of_one(kind, divided, whole):
    first, second = divided[kind]
    _require_same([first], [second])
    _require_close(first, whole[kind], 1e-5)


@pytest.mark.parametrize(("before", "after"), [(FSDP, FSDP), (FSDP, ONE), (ONE, FSDP)], ids=["two", "two, one", "one, two"])
def test_a_killed_run_goes_on_with_as_many_processes_and_with_others(before, after, server, divided, whole, tmp_path):
    order = {**ALIKE, **KINDS["modelopt"], "folder": str(tmp_path / "checkpoints")}
    assert server.run(tmp_path, **before, **order, die=["step", 11]) == [-9] * before["processes"]
    if before == after:
        _require_same(_run(server, tmp_path, **after, **order), divided["modelopt"])
        return
    out = tmp_path / "refused"
    shutil.copytree(tmp_path / "checkpoints", out / "checkpoints")
    assert server.run(out, **after, **order | {"folder": str(out / "checkpoints")}) == [1] * after["processes"]
    assert "processes is" in (out / "error-0.txt").read_text()
    # LSQ computes in float32: a code on a tie may come out on the other side, and takes weights with it.
    _require_close(_run(server, tmp_path, **after, **order, resume="force")[0], whole["modelopt"], 2e-4)


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
