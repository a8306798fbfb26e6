"""A small part of `make faults`: nothing is lost, and what would be lost is noticed."""

import faults
import pytest

from qakd_plugin._common import files, tensor_file


def test_damaged_and_crafted_files_of_tensors_are_refused_in_one_line(tmp_path):
    kinds = tuple(name for name in faults.KINDS if "ONNX" not in name)
    tally = faults.mutants(8 * len(kinds), 0, tmp_path, kinds, isolated=False)
    assert tally.lost == []
    assert tally.outcomes["refused in one line"] > 6 * len(kinds)


@pytest.mark.parametrize(("work", "count"), [("training", 6), ("student", 20), ("report", 20)])
def test_a_failing_call_is_one_error_and_the_work_can_be_done_again(work, count, tmp_path):
    tally = faults.injections(count, 0, tmp_path, only=(work,))
    assert tally.lost == []
    assert tally.outcomes["one error"] > 0


def test_threads_write_whole_files_and_one_of_them_takes_a_folder(tmp_path):
    tally = faults.threads(4, tmp_path)
    assert tally.lost == []
    assert tally.outcomes["refused, the folder is another's"] == 3


def test_what_would_be_lost_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_cannot_write", lambda target, problem, error: problem)
    assert faults.injections(20, 0, tmp_path / "a", only=("student",)).lost
    monkeypatch.setattr(tensor_file, "_digest", lambda data, start, end: data[start:end])
    (tmp_path / "b").mkdir()
    tally = faults.mutants(30, 0, tmp_path / "b", ("teacher cache",), isolated=False)
    assert any("other content was read" in problem for problem in tally.lost)
