"""Examples run, with a small setting."""

import copy
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qakd_plugin.demo.net import train_float

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"epochs": 1, "teacher_epochs": 6, "width": 4}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _teachers_are_trained_once():
    """Most examples start with the same teacher: the first to need it trains it, the others get its weights."""
    trained = {}

    def train_once(model, loader, epochs, **options):
        key = (epochs, *options.items(), *((name, value.shape) for name, value in model.state_dict().items()))
        if key not in trained:
            trained[key] = copy.deepcopy(train_float(model, loader, epochs, **options).state_dict())
        model.load_state_dict(trained[key])
        return model.eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qakd_plugin.demo.net.train_float", train_once)
        yield


def run(name, **settings):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](**settings)


def test_quickstart(tmp_path, capsys):
    run("quickstart", folder=tmp_path, epochs=1)
    assert "weight codes equal" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("name", ["modelopt_qat", "torch_ao_fx", "torchao_pt2e", "torchao_qatconfig"])
def test_a_toolkits_own_code_and_our_lines_make_an_exported_student_that_knows_digits(name, tmp_path):
    settings = SMALL | ({"width": 64} if name == "torchao_qatconfig" else {})  # groups of 32 weights
    assert run(name, folder=tmp_path, **settings) > 0.5  # what export_onnx writes passed its gate
    assert (tmp_path / "student.onnx").is_file()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("own_loop", {"epochs": 1, "teacher_epochs": 8, "width": 4, "toolkit": "pt2e"}),
        ("lightning_module", {"epochs": 3, "width": 4, "toolkit": "torch_ao"}),
        ("hugging_face", {"steps": 10, "epochs": 2}),
        ("text_encoder", {"epochs": 1, "teacher_epochs": 8}),
        pytest.param("int4_vit", {"epochs": 1, "teacher_epochs": 8, "width": 32}, marks=pytest.mark.matrix),
    ],
)
def test_an_example_by_feature_trains_a_student_that_knows_digits(name, settings):
    assert run(f"by_feature/{name}", **settings) > 0.5


def test_segmentation_keeps_most_of_the_teachers_iou():
    own, other = run("by_feature/segmentation", epochs=1, teacher_epochs=1, width=8)
    assert own > 0
    assert own > 0.5 * other


@pytest.mark.parametrize("name", ["multi_label", "two_heads", "keyword_spotting"])
def test_other_tasks_keep_most_of_the_teachers_metric(name):
    own, other, *places = run(f"by_feature/{name}", epochs=1, teacher_epochs=4)
    assert other > 0.3
    assert own > 0.8 * other
    assert all(decibel > 6 for decibel in places)


def test_a_causal_language_model_in_int4_keeps_its_perplexity():
    _, own, other = run("by_feature/causal_lm", epochs=1, teacher_epochs=2)
    assert 1 < own < 1.05 * other


def test_a_detector_keeps_most_of_the_teachers_map():
    own, other = run("by_feature/detection", epochs=1, teacher_epochs=3, width=8)
    assert other > 0.01
    assert own > 0.5 * other


@pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="Ultralytics is not installed")
def test_a_yolo_of_ultralytics_keeps_most_of_the_teachers_map_and_so_does_its_file():
    other, own, file = run("by_feature/ultralytics_yolo", epochs=1, teacher_epochs=4)
    assert other > 0.01
    assert own > 0.5 * other
    assert file == pytest.approx(own, abs=0.05)


@pytest.mark.resume
def test_a_resumed_run_ends_with_the_same_bits():
    found = run("by_feature/resume", epochs=2, kill_after=20, width=4)
    assert found["epochs"] == (2, 2)
    assert found["whole"].keys() == found["resumed"].keys()
    for name, value in found["whole"].items():
        assert torch.equal(value, found["resumed"][name]), name


@pytest.mark.matrix
def test_two_processes_of_torchrun_end_with_the_same_weights():
    script = ROOT / "examples" / "by_feature" / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    settings = ["--epochs", "1", "--teacher-epochs", "2", "--width", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"process (\d): accuracy [\d.]+, weights ([0-9a-f]{16})", done.stdout)
    assert {rank for rank, _ in found} == {"0", "1"}
    assert len({digest for _, digest in found}) == 1


def test_bfloat16_leaves_parameters_in_float32():
    accuracy, kinds = run("by_feature/bf16", **SMALL)
    assert accuracy > 0.5
    assert kinds == {torch.float32}


@pytest.mark.matrix
def test_two_bits_are_learned_and_the_way_back_computes_the_same():
    accuracy, change = run("by_feature/learned_quantizer", **SMALL | {"epochs": 2})
    assert accuracy > 0.5
    assert change < 1e-5


def test_cmi_puts_an_augmentation_that_destroys_digits_last_and_trains_with_the_best():
    order, chosen, accuracy = run("by_feature/cmi", **SMALL)
    assert order[-1] == "negative"
    assert chosen == order[0]
    assert accuracy > 0.5


def test_a_cached_teacher_is_not_asked_again():
    accuracy, (first, second) = run("by_feature/cached_teacher", **SMALL)
    assert accuracy > 0.5
    assert second < first / 4  # the first batch is compared with the teacher's answer in every run


def test_kept_layers_stay_in_float_or_at_eight_bits():
    accuracy, prepared, trained = run("by_feature/excluded_layers", **SMALL)
    assert accuracy > 0.5
    assert not [name for name in trained if name.startswith(("head", "stages.0"))]
    assert trained["stem.0.weight_quantizer"] == prepared["stem.0.weight_quantizer"] == 8
    assert {bits for name, bits in trained.items() if not name.startswith("stem")} == {3}
    assert len(prepared) == 7
