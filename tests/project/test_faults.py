"""A small part of `make faults`: nothing is lost, and what would be lost is noticed."""

import json
import os

import corruption
import faults
import pytest
from fault_record import Record, Tally
from mutants import KINDS, mutants, read_mutant

from qakd_plugin._common import files, tensor_file


def test_damaged_and_crafted_files_of_tensors_are_refused_in_one_line(tmp_path):
    kinds = tuple(name for name in KINDS if "ONNX" not in name and "OpenVINO" not in name)
    tally = Tally("mutants")
    mutants(tally, 8 * len(kinds), 0, tmp_path, kinds, isolated=False)
    assert tally.lost == []
    assert tally.outcomes["refused in one line"] > 6 * len(kinds)


@pytest.mark.parametrize(("work", "count"), [("training", 6), ("student", 20), ("report", 20)])
def test_a_failing_call_is_one_error_and_the_work_can_be_done_again(work, count, tmp_path):
    tally = Tally("injections")
    faults.injections(tally, count, 0, tmp_path, only=(work,))
    assert tally.lost == []
    assert tally.outcomes["one error"] > 0


def test_a_pipe_in_the_place_of_any_file_is_refused_and_not_waited_for(tmp_path):
    reader = corruption.Reader(read_mutant, 20.0)
    kinds = [name for name in KINDS if not name.endswith(("crafted", "version 1")) and name != "metadata of images"]  # no file
    try:
        for number, name in enumerate(kinds):
            kind, own = KINDS[name], tmp_path / f"pipe-{number}"
            own.mkdir()
            kind.make(own / kind.name)
            (own / kind.name).unlink()
            path = own / ("step-000000001-0123456789abcdef.pt" if kind.name == "step" else kind.name)
            os.mkfifo(path)
            (own / "order.json").write_text(json.dumps({"kind": name, "path": str(path), "digest": ""}))
            classes, message = reader(own / "order.json")
            assert "QakdError" in classes.split(), f"{name}: {classes}: {message}"
    finally:
        reader.close()


def test_threads_write_whole_files_and_one_of_them_takes_a_folder(tmp_path):
    tally = Tally("threads")
    faults.threads(tally, 4, tmp_path)
    assert tally.lost == []
    assert tally.outcomes["refused, the folder is another's"] == 3


def test_what_would_be_lost_is_noticed(tmp_path, monkeypatch):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
    monkeypatch.setattr(files, "_cannot_write", lambda target, problem, error: problem)
    tally = Tally("injections")
    faults.injections(tally, 20, 0, tmp_path / "a", only=("student",))
    assert tally.lost
    monkeypatch.setattr(tensor_file, "_digest", lambda data, start, end: data[start:end])
    tally = Tally("mutants")
    mutants(tally, 30, 0, tmp_path / "b", ("teacher cache",), isolated=False)
    assert any("other content was read" in problem for problem in tally.lost)


def test_a_trial_that_was_stopped_goes_on_where_it_was(tmp_path):
    run, done = {"seed": 0, "commit": "abc"}, []

    def tried(trial, lost=None):
        return lambda: [(done.append(trial) or "tried", lost)]

    first = Tally("part", Record(tmp_path / "record", run))
    first.carry_out("a", tried("a"))
    first.carry_out("b", tried("b", "it was lost"))
    again = Tally("part", Record(tmp_path / "record", run))
    for trial in ("a", "b", "c"):
        again.carry_out(trial, tried(trial))
    assert done == ["a", "b", "c"]
    assert again.lost == ["it was lost"]
    assert again.outcomes == {"tried": 2, "lost": 1}
    with pytest.raises(SystemExit, match="name another file"):
        Record(tmp_path / "record", run | {"commit": "def"})
