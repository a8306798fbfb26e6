"""Checkpoints are whole, safe, and belong to their run."""

import pickle
import platform
import re
import subprocess
import sys

import pytest
import torch

from qakd_plugin import LSQ, SQAKD, CheckpointError, TrainingError, distill, prepare, use_quantizers
from qakd_plugin.demo.net import DigitNet
from qakd_plugin.training.checkpoint import CheckpointStore


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
    with pytest.raises(CheckpointError, match="augmentation"):
        distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path, resume=True, augment=torch.clone)


def test_a_checkpoint_of_another_model_is_refused_and_the_first_difference_named(tmp_path, make_student, teacher, batches):
    distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"quantizers is '.*, codes -127\.\.127' there and '.*, codes 0\.\.15' here"):
        distill(make_student(bits=4), teacher, batches, epochs=1, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"quantizers is '.*, codes .*' there and '.*, codes .*, LSQ' here"):
        distill(use_quantizers(make_student(), LSQ()), teacher, batches, epochs=1, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"quantizers is '.*, codes -128\.\.127' there and '.*, codes 0\.\.255' here"):
        distill(make_student(target="onnxruntime"), teacher, batches, epochs=1, checkpoint_dir=tmp_path, resume=True)
    torch.manual_seed(0)
    wide = DigitNet(width=4).eval()
    student = prepare(wide, [x for x, _ in batches], "modelopt")
    with pytest.raises(
        CheckpointError, match=r"parameters is 'stem\.0\.weight \(8, .*' there and 'stem\.0\.weight \(4, .*' here"
    ):
        distill(student, wide, batches, epochs=1, checkpoint_dir=tmp_path, resume=True)


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_old_one(tmp_path, make_student, teacher, batches):
    distill(make_student(), teacher, batches, epochs=2, checkpoint_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"earlier run.*resume=True"):
        distill(make_student(), teacher, batches, epochs=2, checkpoint_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_remains_of_a_killed_write_are_removed_and_nothing_else(store):
    store.save(1, {"step": 1})
    remains = [store.folder / f".{name}.abc.tmp" for name in (next(store.folder.iterdir()).name, "history.jsonl")]
    others = [store.folder / name for name in (".notes.tmp", "notes.txt")]
    for path in (*remains, *others):
        path.write_text("half")
    assert store.load()["step"] == 1
    assert not any(path.exists() for path in remains)
    assert all(path.exists() for path in others)


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(store):
    for step in (1, 2):
        store.save(step, {"step": step})
    damaged = store.newest()
    damaged.write_bytes(b"half")
    assert store.load()["step"] == 1
    assert (store.folder / f"damaged-{damaged.name}").exists()
    store.save(3, {"step": 3})
    assert [path.name[:14] for path in sorted(store.folder.glob("step-*"))] == ["step-000000001", "step-000000003"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_names_step_phase_gradient_norm_and_the_last_good_checkpoint(what, tmp_path, make_student, teacher, batches):
    student = make_student()

    class Diverge:
        def on_step_end(self, step, losses):
            if step == 8:
                with torch.no_grad():
                    student.head.weight.fill_(float("nan"))

    def explode(gradient):
        return gradient * float("inf") if list(tmp_path.glob("step-*")) else gradient

    if what == "gradient":
        student.head.weight.register_hook(explode)
    with pytest.raises(TrainingError) as caught:
        distill(
            student, teacher, batches, epochs=2, checkpoint_dir=tmp_path, checkpoint_every=4,
            callbacks=[Diverge()] if what == "loss" else [],
        )  # fmt: skip
    message = str(caught.value)
    newest = max(tmp_path.glob("step-*.pt"))
    step = 8 if what == "loss" else 4
    assert f"step {step} " in message
    assert "phase 'distill'" in message
    assert re.search(r"(gradient norm was \d|norm is (inf|nan))", message)
    assert f"The last good checkpoint is {newest}." in message
    assert newest.name.startswith(f"step-{step:09d}")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_student, teacher, batches):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path / "file" / "checkpoints")


def test_history_is_one_json_line_per_epoch(tmp_path, make_student, teacher, batches):
    import json

    result = distill(make_student(), teacher, batches, epochs=2, checkpoint_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history


# -- two runs in one folder

_HOLD = """
import sys
from pathlib import Path
from qakd_plugin.training.checkpoint import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), {})
store.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_one_folder_is_refused_and_names_the_first(holder, tmp_path, make_student, teacher, batches):
    expected = rf"checkpoint_dir={tmp_path} is in use by another run \(process {holder.pid} on {platform.node()}\)"
    with pytest.raises(CheckpointError, match=expected):
        distill(make_student(), teacher, batches[:2], epochs=1, checkpoint_dir=tmp_path, resume=True)
    assert not list(tmp_path.glob("step-*"))


def test_a_run_that_is_killed_gives_its_folder_back(holder, tmp_path):
    holder.kill()
    holder.wait()
    store = CheckpointStore(tmp_path, {})
    store.lock()
    store.unlock()
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_refused_leaves_the_first_its_lock(tmp_path, store):
    store.lock()
    for _ in range(2):
        other = CheckpointStore(tmp_path, {})
        with pytest.raises(CheckpointError, match="in use"):
            other.lock()
        other.unlock()
    store.unlock()
