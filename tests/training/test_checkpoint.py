"""Checkpoints are whole, safe, and belong to their run."""

import hashlib
import io
import os
import pickle
import platform
import re
import subprocess
import sys

import pytest
import torch

from qakd_plugin import LSQ, SQAKD, CheckpointError, TrainingError, distill, prepare, use_quantizers
from qakd_plugin.demo.net import DigitNet
from qakd_plugin.training.checkpoint import CheckpointStore, not_finite


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, {"method": "SQAKD()"})


def test_the_newest_whole_checkpoint_is_used(store):
    store.save(1, {"weights": torch.ones(3)})
    newest = store.save(2, {"weights": torch.zeros(3)})
    newest.write_bytes(newest.read_bytes()[:-40])
    assert torch.equal(store.load()[1]["weights"], torch.ones(3))


def test_only_the_newest_two_are_kept(store):
    for step in range(5):
        store.save(step, {"step": step})
    assert len(list(store.folder.iterdir())) == 2
    assert store.load()[1]["step"] == 4


def test_an_empty_folder_starts_afresh(store):
    assert store.load() is None


def test_code_in_a_checkpoint_is_refused(store, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = store.save(1, {})
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
    remains = [store.folder / f".{name}.0123456789abcdef.tmp" for name in (next(store.folder.iterdir()).name, "history.jsonl")]
    others = [store.folder / name for name in (".notes.tmp", "notes.txt")]
    for path in (*remains, *others):
        path.write_text("half")
    assert store.load()[1]["step"] == 1
    assert not any(path.exists() for path in remains)
    assert all(path.exists() for path in others)


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(store):
    for step in (1, 2):
        store.save(step, {"step": step})
    damaged = store.newest()
    damaged.write_bytes(b"half")
    assert store.load()[1]["step"] == 1
    assert (store.folder / f"damaged-{damaged.name}").exists()
    store.save(3, {"step": 3})
    assert [path.name[:14] for path in sorted(store.folder.glob("step-*"))] == ["step-000000001", "step-000000003"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_names_step_phase_gradient_norm_and_the_last_good_checkpoint(what, tmp_path, make_student, teacher, batches):
    student = make_student()

    class Diverge:
        def on_step_end(self, step, losses):
            if step == 7:
                with torch.no_grad():
                    student.head.weight.fill_(float("nan"))

    gradients = []

    def explode(gradient):
        gradients.append(gradient)
        return gradient * float("inf") if len(gradients) == 6 else gradient

    if what == "gradient":
        student.head.weight.register_hook(explode)
    with pytest.raises(TrainingError) as caught:
        distill(
            student, teacher, batches, epochs=2, checkpoint_dir=tmp_path, checkpoint_every=4,
            callbacks=[Diverge()] if what == "loss" else [],
        )  # fmt: skip
    message = str(caught.value)
    newest = max(tmp_path.glob("step-*.pt"))
    step, saved = (7, 6) if what == "loss" else (5, 4)
    assert f"step {step} " in message
    assert "phase 'distill'" in message
    assert re.search(r"(gradient norm was \d|norm is (inf|nan))", message)
    assert f"The last good checkpoint is {newest}." in message
    assert newest.name.startswith(f"step-{saved:09d}")


def _poisoning(tensor, at):
    """A callback that makes one number of a tensor NaN after a step."""

    class Poison:
        def on_step_end(self, step, losses):
            if step == at:
                with torch.no_grad():
                    tensor.view(-1)[0] = float("nan")

    return Poison()


@pytest.mark.parametrize("where", ["running_var", "optimizer", "ema"])
def test_a_checkpoint_is_not_written_with_numbers_that_are_not_finite(where, tmp_path, make_student, teacher, batches):
    student = make_student()
    norm = next(module for module in student.modules() if hasattr(module, "running_var"))
    makes, kept = torch.optim.AdamW, []

    def optimizer(groups, **options):
        kept.append(makes(groups, **options))
        return kept[0]

    class Poison:
        def on_step_end(self, step, losses):
            if step == 3:
                moments = next(iter(kept[0].state.values()))["exp_avg_sq"]
                {"running_var": norm.running_var, "optimizer": moments}[where].view(-1)[0] = float("nan")

    options = {"epochs": 1, "checkpoint_dir": tmp_path, "checkpoint_every": 1, "trackers": (), "optimizer": optimizer}
    callback = Poison()
    if where == "ema":
        options["ema"], callback = 0.9, _poisoning(student.head.weight, 3)
    name = {"running_var": r"student\.\S+running_var", "optimizer": r"optimizer\.state\.", "ema": r"student\.head\.weight"}[
        where
    ]
    with pytest.raises(TrainingError, match=name + r"\S* is not finite after step 3 .*The last good checkpoint is") as caught:
        distill(student, teacher, batches[:4], callbacks=[callback], **options)
    assert [path.name[:14] for path in sorted(tmp_path.glob("step-*"))] == ["step-000000001", "step-000000002"]
    assert str(max(tmp_path.glob("step-*"))) in str(caught.value)


def test_statistics_that_are_not_finite_are_named_without_checkpoints_too(make_student, teacher, batches):
    student = make_student()
    norm = next(module for module in student.modules() if hasattr(module, "running_var"))
    with pytest.raises(TrainingError, match=r"running_var is not finite after step 2"):
        distill(student, teacher, batches[:2], epochs=1, trackers=(), callbacks=[_poisoning(norm.running_var, 2)])


def test_a_checkpoint_whose_weights_fail_at_once_is_not_called_good(tmp_path, make_student, teacher, batches):
    student = make_student()

    class Explode:
        def on_step_end(self, step, losses):
            if step == 3:
                with torch.no_grad():
                    student.head.bias.copy_(3e38 * torch.tensor([1.0] + 9 * [-1.0]))  # finite, and no loss of it is

    with pytest.raises(TrainingError) as caught:
        distill(
            student, teacher, batches, epochs=1, checkpoint_dir=tmp_path, checkpoint_every=1, trackers=(), callbacks=[Explode()]
        )
    before, newest = sorted(tmp_path.glob("step-*"))
    assert f"The last good checkpoint is {before}: {newest.name} holds the weights that led here, remove it" in str(
        caught.value
    )


def test_a_checkpoint_that_is_not_finite_is_passed_over(store, caplog):
    store.save(1, {"student": {"weight": torch.ones(2)}})
    path = store.save(2, {"student": {"weight": torch.tensor([1.0, float("inf")])}})
    found, state = store.load()
    assert found.name.startswith("step-000000001")
    assert state["student"]["weight"].tolist() == [1.0, 1.0]
    assert f"{path} is put aside (its student.weight is not finite)" in caplog.text


def test_ranges_that_saw_nothing_yet_may_be_infinite():
    assert not_finite({"student": {"min_val": torch.tensor(float("inf"))}}) is None
    assert not_finite({"student": {"layer.weight": torch.tensor([3e38, 3e38])}}) is None
    assert not_finite({"student": {"min_val": torch.tensor(float("nan"))}}) == "student.min_val"
    assert (
        not_finite({"teacher_optimizer": {"state": {0: {"step": torch.tensor(float("inf"))}}}})
        == "teacher_optimizer.state.0.step"
    )
    assert not_finite({"ema": {"means": [torch.zeros(1), torch.tensor([float("nan")], dtype=torch.bfloat16)]}}) == "ema.means.1"
    assert not_finite({"student": {"scale": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}}) == "student.scale"


# -- files that are not what they seem


def _as_folder(path):
    path.unlink()
    path.mkdir()


def _as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def _as_broken_link(path):
    path.unlink()
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("replace", [_as_folder, _as_pipe, _as_broken_link])
def test_what_cannot_be_read_is_passed_over_for_the_one_before(replace, store, caplog):
    for step in (1, 2):
        path = store.save(step, {"step": step})
    replace(path)
    assert store.load()[1]["step"] == 1
    assert f"{path} is put aside (it cannot be read: " in caplog.text


def _named(folder, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path = folder / f"step-000000001-{hashlib.sha256(data).hexdigest()[:16]}.pt"
    path.write_bytes(data)
    return path


def test_a_checkpoint_of_another_format_is_refused_by_its_version(store):
    whole = {"fingerprint": store.fingerprint, "state": {}}
    for content, version in [(whole, "1"), (whole | {"format": "qakd checkpoint", "version": "9"}, "9")]:
        path = _named(store.folder, content)
        with pytest.raises(
            CheckpointError, match=rf"another version of this package wrote it \(its format is {version}, and 2"
        ):
            store.load()
        path.unlink()


@pytest.mark.parametrize("change", ["not a dict", "no state", "a list", "deep", "a tensor"])
def test_a_file_of_other_content_is_no_checkpoint(change, store):
    whole = {"format": "qakd checkpoint", "version": "2", "fingerprint": store.fingerprint, "state": {}}
    deep = []
    for _ in range(300):
        deep = [deep]
    content = {
        "not a dict": [1],
        "no state": {"fingerprint": {}},
        "a list": whole | {"state": []},
        "deep": whole | {"state": {"student": deep}},
        "a tensor": whole | {"fingerprint": {name: torch.zeros(0) for name in store.fingerprint} | {"a": torch.zeros(2)}},
    }[change]
    _named(store.folder, content)
    with pytest.raises(CheckpointError, match=r"step-000000001-\w+\.pt: (not a checkpoint of this|refused: .*nested)"):
        store.load()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, make_student, teacher, batches):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write"):
        distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named_before_anything_is_trained(tmp_path, make_student, teacher, batches):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot write .*Permission denied\. Choose a folder"):
        distill(make_student(), teacher, batches, epochs=1, checkpoint_dir=tmp_path / "run")


@pytest.mark.parametrize("cached", [False, True])
def test_where_nothing_can_be_written_no_teacher_is_asked(cached, tmp_path, make_student, teacher, batches):
    (tmp_path / "file").write_text("in the way")
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    place = {"cache_teacher": tmp_path / "file" / "cache"} if cached else {"checkpoint_dir": tmp_path / "file" / "run"}
    with pytest.raises(CheckpointError, match=r"cannot write .*file/(cache|run)"):
        distill(make_student(), teacher, batches, epochs=1, trackers=(), **place)
    assert not calls


@pytest.mark.parametrize("path", ["nul\0byte", "\ud800"])
def test_a_path_that_no_system_can_have_is_one_error(path, tmp_path, make_student, teacher, batches):
    with pytest.raises(CheckpointError, match="cannot write"):
        distill(make_student(), teacher, batches[:1], epochs=1, checkpoint_dir=tmp_path / path, trackers=())


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
