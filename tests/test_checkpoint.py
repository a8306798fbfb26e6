"""Checkpoints are whole, safe, and belong to their run."""

import pickle

import pytest
import torch

from qakd_plugin import SQAKD, CheckpointError, distill
from qakd_plugin.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, {"method": "SQAKD()"})


def test_the_newest_whole_checkpoint_is_used(store):
    store.save(1, {"weights": torch.ones(3)})
    newest = store.save(2, {"weights": torch.zeros(3)})
    newest.write_bytes(newest.read_bytes()[:-40])
    assert torch.equal(store.load()["weights"], torch.ones(3))


def test_only_the_newest_two_are_kept(store):
    for step in range(5):
        store.save(step, {"step": step})
    assert len(list(store.folder.iterdir())) == 2
    assert store.load()["step"] == 4


def test_an_empty_folder_starts_afresh(store):
    assert store.load() is None


def test_code_in_a_checkpoint_is_refused(store, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = store.save(1, {})
    import hashlib

    data = pickle.dumps({"fingerprint": store.fingerprint, "state": Evil()})
    path.unlink()
    (tmp_path / f"step-000000001-{hashlib.sha256(data).hexdigest()[:16]}.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="refused"):
        store.load()
    assert not (tmp_path / "owned").exists()


def test_a_folder_of_damaged_files_is_an_error(store):
    store.save(1, {"a": 1}).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="none of 1"):
        store.load()


def test_a_checkpoint_of_another_method_is_refused(tmp_path, make_student, teacher, batches):
    distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="method"):
        distill(make_student(), teacher, batches, method=SQAKD(temperature=2.0), epochs=1, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="toolkit"):
        distill(make_student("torch_ao"), teacher, batches, epochs=1, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="loader length"):
        distill(make_student(), teacher, batches[:-1], epochs=1, checkpoint_dir=tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_student, teacher, batches):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path / "file" / "checkpoints")


def test_history_is_one_json_line_per_epoch(tmp_path, make_student, teacher, batches):
    import json

    result = distill(make_student(), teacher, batches, epochs=2, checkpoint_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
