"""A run that is killed and started again ends as one that never was: the same bits.

By default a few combinations are killed a few times; `make resume` runs the full grid.
"""

import itertools
import json
import random

import pytest
import torch
from training_server import BATCHES, EPOCHS, STEPS, Server, was_killed

ONE_SQAKD = {"toolkit": "modelopt", "quantizers": "LSQ", "method": "SQAKD", "processes": 1}
ONE_QKD = {"toolkit": "pt2e", "quantizers": "own", "method": "QKD", "processes": 1, "generator": False}
TWO_QKD = {"toolkit": "modelopt", "quantizers": "LSQ", "method": "QKD", "processes": 2}
TWO_SQAKD = {"toolkit": "pt2e", "quantizers": "EWGS", "method": "SQAKD", "processes": 2, "generator": False}


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What a run gives that nobody killed: ``whole(case)``."""
    known = {}

    def run(case):
        key = json.dumps(case, sort_keys=True)
        if key not in known:
            out = tmp_path_factory.mktemp("whole")
            assert server.run(out, folder=str(out / "checkpoints"), **case) == [0] * case["processes"], _log(out)
            known[key] = _results(out, case)
            assert len(known[key][0]["history"]) == EPOCHS + 1  # with the start
        return known[key]

    return run


def _log(out):
    return "\n".join(path.read_text() for path in sorted(out.glob("log-*.txt")))


def _results(out, case):
    return [torch.load(out / f"result-{rank}.pt", weights_only=True) for rank in range(case["processes"])]


def _require_same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert mine["history"] == other["history"]
        for part in ("student", "parameters", "teacher"):
            assert mine[part].keys() == other[part].keys()
            different = [name for name, value in mine[part].items() if not torch.equal(value, other[part][name])]
            assert not different, part


def _finish(server, out, case):
    """Start again until it ends well; then the history on disk is the run's and nothing else is left."""
    assert server.run(out, folder=str(out / "checkpoints"), **case) == [0] * case["processes"], _log(out)
    results = _results(out, case)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert len([name for name in names if name.startswith("step-")]) == 2
    assert len(names) == 3, names
    _require_history(out, results[0]["history"], EPOCHS + 1)
    return results


def _require_history(out, expected, least):
    """Whole lines, each as the run's that was not killed."""
    path = out / "checkpoints" / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(rows) >= least
    assert [{name: row[name] for name in row if name != "images_per_second"} for row in rows] == expected[: len(rows)]


def _killed_at_random(server, whole, out, case, kills, seed):
    """Kill at random steps, at random moments after them: in a step, in a checkpoint, between epochs."""
    draws = random.Random(seed)
    for step in sorted(draws.randrange(STEPS - 1) for _ in range(kills)):
        order = {"kill": (step, draws.uniform(0, 0.05)), **case}
        codes = server.run(out, folder=str(out / "checkpoints"), **order)
        assert was_killed(codes), _log(out)
        _require_history(out, whole(case)[0]["history"], 0)
    _require_same(_finish(server, out, case), whole(case))


@pytest.mark.parametrize("case", [ONE_SQAKD, ONE_QKD, TWO_QKD], ids=["sqakd-modelopt", "qkd-pt2e", "qkd-modelopt-two"])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(case, server, whole, tmp_path):
    _killed_at_random(server, whole, tmp_path, case, kills=3, seed=1)


_GRID = list(
    itertools.product(["SQAKD", "QKD"], [("modelopt", "LSQ"), ("modelopt", "own"), ("pt2e", "own"), ("pt2e", "EWGS")], [1, 2])
)


@pytest.mark.resume
@pytest.mark.parametrize(("method", "toolkit", "processes"), _GRID)
def test_killed_ten_times_a_run_ends_with_the_same_bits(method, toolkit, processes, server, whole, tmp_path):
    case = {"toolkit": toolkit[0], "quantizers": toolkit[1], "method": method, "processes": processes}
    case["generator"] = toolkit[1] != "own"
    _killed_at_random(server, whole, tmp_path, case, kills=10, seed=f"{method} {toolkit} {processes}")


MOMENTS = {
    "in the middle of a step": ("augment", 12),
    "at the end of a step": ("step", 17),
    "before the first checkpoint": ("step", 2),
    "with half a checkpoint written": ("write", 5),
    "with an unnamed checkpoint": ("flush", 7),
    "before a checkpoint has its name": ("rename", 7),
    "between a checkpoint and its history": ("renamed", 7),
    "between self-studying and co-studying": ("epoch", 1),
    "between co-studying and tutoring": ("epoch", 3),
    "between the last checkpoint and its history": ("renamed", 2 * (STEPS // 3 + EPOCHS) - 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_an_exact_moment_a_run_ends_with_the_same_bits(moment, server, whole, tmp_path):
    codes = server.run(tmp_path, folder=str(tmp_path / "checkpoints"), die=MOMENTS[moment], **ONE_QKD)
    assert codes == [-9], _log(tmp_path)
    _require_same(_finish(server, tmp_path, ONE_QKD), whole(ONE_QKD))


@pytest.mark.parametrize("moment", [("step", 8), ("renamed", 6)], ids=["in a step", "before the evaluation of an epoch"])
def test_averages_and_accumulated_gradients_survive_a_kill(moment, server, whole, tmp_path):
    case = {**ONE_SQAKD, "options": {"accumulate": 3, "ema": 0.9, "recalibrate_batches": 2}}
    codes = server.run(tmp_path, folder=str(tmp_path / "checkpoints"), die=moment, **case)
    assert codes == [-9], _log(tmp_path)
    _require_same(_finish(server, tmp_path, case), whole(case))


def test_a_checkpoint_of_other_settings_is_refused(server, tmp_path):
    folder = str(tmp_path / "checkpoints")
    assert server.run(tmp_path, folder=folder, **ONE_SQAKD) == [0], _log(tmp_path)
    assert server.run(tmp_path, folder=folder, **{**ONE_SQAKD, "options": {"ema": 0.9}}) == [1]
    assert "belongs to another run: settings" in (tmp_path / "error-0.txt").read_text()


@pytest.mark.parametrize(("victim", "moment"), [(0, ("write", 5)), (1, ("augment", 12)), (1, ("epoch", 1))])
def test_when_one_of_two_is_killed_the_run_goes_on_with_the_same_bits(victim, moment, server, whole, tmp_path):
    codes = server.run(tmp_path, folder=str(tmp_path / "checkpoints"), die=moment, victim=victim, **TWO_QKD)
    assert codes[victim] == -9, _log(tmp_path)
    assert 0 not in codes
    _require_same(_finish(server, tmp_path, TWO_QKD), whole(TWO_QKD))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.resume)])
def test_a_run_whose_loader_works_in_other_processes_ends_with_the_same_bits(processes, server, whole, tmp_path):
    case = ONE_SQAKD | {"workers": 1, "processes": processes}
    codes = server.run(tmp_path, folder=str(tmp_path / "checkpoints"), die=("step", 17), **case)
    assert was_killed(codes), _log(tmp_path)
    _require_same(_finish(server, tmp_path, case), whole(case))
    assert whole(case)[0]["history"] != whole(ONE_SQAKD)[0]["history"]


def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(server, whole, tmp_path):
    server.run(tmp_path, folder=str(tmp_path / "checkpoints"), die=("step", 17), **ONE_QKD)
    newest = max((tmp_path / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert server.run(tmp_path, folder=str(tmp_path / "checkpoints"), **ONE_QKD) == [0], _log(tmp_path)
    assert f"{newest.name} is put aside (it is damaged: " in _log(tmp_path)
    _require_same(_results(tmp_path, ONE_QKD), whole(ONE_QKD))


@pytest.mark.parametrize("case", [ONE_QKD, TWO_QKD], ids=["one", "two"])
def test_a_full_disk_loses_nothing_and_is_reported_by_all(case, server, whole, tmp_path):
    """The system refuses to let a file grow beyond the limit: the write fails half way, as on a full disk."""
    folder = tmp_path / "checkpoints"
    server.run(tmp_path, folder=str(folder), die=("step", 8), **case)
    before = {path.name: path.read_bytes() for path in folder.glob("step-*.pt")}
    assert len(before) == 2
    limit = min(map(len, before.values())) // 2
    assert server.run(tmp_path, folder=str(folder), file_limit=limit, **case) == [1] * case["processes"]
    for rank in range(case["processes"]):
        error = (tmp_path / f"error-{rank}.txt").read_text()
        told = "process 0 of 2 failed: " if rank else ""
        assert error.startswith(f"CheckpointError: {told}cannot write"), error
        assert all(text in error for text in ("File too large", max(before), "are still there", "Make room", "resume=True"))
    assert {path.name: path.read_bytes() for path in folder.glob("step-*.pt")} == before
    assert not list(folder.glob(".*"))
    _require_same(_finish(server, tmp_path, case), whole(case))


def test_another_number_of_processes_is_refused(server, tmp_path):
    folder = str(tmp_path / "checkpoints")
    server.run(tmp_path, folder=folder, die=("step", 8), **TWO_QKD)
    # One process with the same number of batches.
    assert server.run(tmp_path, folder=folder, **TWO_QKD | {"processes": 1, "samples": 64 * BATCHES}) == [1]
    error = (tmp_path / "error-0.txt").read_text()
    assert "processes is 2 there and 1 here" in error, error
