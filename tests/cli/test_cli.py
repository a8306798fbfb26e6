"""The command, the scripts, and the demo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from qakd_plugin import QAT, SQAKD
from qakd_plugin._common.cpu_features import has_bfloat16
from qakd_plugin.cli import main
from qakd_plugin.demo import pipeline

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = """
import sys
import torch
from qakd_plugin import prepare
from qakd_plugin.demo.net import DigitNet

sys.path.insert(0, "nowhere")  # as recipes do that have code in several folders

def build():
    from my_settings import SEED
    torch.manual_seed(SEED)
    teacher = DigitNet(width=4).eval()
    batches = [torch.rand(8, 1, 32, 32) for _ in range(3)]
    return dict(prepared_model=prepare(teacher, batches), teacher=teacher, loader=batches, epochs=1)

def nothing():
    return {}

def no_batches():
    return {**build(), "loader": []}

def module():
    return DigitNet(width=4)

def swapped(batch):
    return batch[0], batch[1] * 0 + 3

def batches():
    return [(torch.rand(16, 1, 32, 32), torch.randint(10, (16,))) for _ in range(2)]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "my_recipe.py").write_text(RECIPE)
    (tmp_path / "my_settings.py").write_text("SEED = 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("my_recipe", "my_settings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "my_recipe:build"


def test_distill_export_engine_bench_and_report_in_a_row(recipe, tmp_path, capsys):
    assert main(["distill", recipe, "--out", "run"]) == 0
    assert main(["export", recipe, "--weights", "run/student.safetensors", "--out", "s.onnx"]) == 0
    assert (
        main(["export", recipe, "--weights", "run/student.safetensors", "--out", "s.ort.onnx", "--target", "onnxruntime"]) == 0
    )
    assert main(["engine", "s.onnx", "--runtime", "tensorrt_rtx", "--require-int8", "1"]) == 0
    bench = ["bench", "s.ort.onnx", "--loader", "my_recipe:batches", "--calls", "5", "--out", "r.html"]
    assert main([*bench, "--model", "net", "--profile-layers", "--batch", "1", "--batch", "2"]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["model"], row["method"], row["batch"]) for row in rows] == [("net", "s.ort", 1), ("net", "s.ort", 2)]
    assert all(row["layers"] for row in rows)
    (tmp_path / "r.html").unlink()
    counted = tmp_path / "counted.yaml"
    metric = "{class_path: torchmetrics.classification.MulticlassF1Score, init_args: {num_classes: 10}}"
    counted.write_text(f"metric: {metric}\nval_loader: {{class_path: my_recipe.batches}}\nbatch_fn: my_recipe.swapped\n")
    assert main(["bench", "s.ort.onnx", "--recipe", "counted.yaml", "--calls", "2", "--out", "f1.html"]) == 0
    (row,) = json.loads((tmp_path / "f1.json").read_text())["rows"]
    assert [value["name"] for value in row["metrics"]] == ["multiclass_f1_score"]
    assert (row["accuracy"], row["samples"]) == (None, 32)
    assert main(["report", "r.json", "--title", "again", "--force"]) == 0
    output = capsys.readouterr().out
    assert "9 of 9 in int8" in output
    assert "trtexec --onnx=s.onnx" in output
    assert "tensorrt_rtx --onnx=s.onnx" in output
    generations = json.loads((tmp_path / "s.engine.json").read_text())["capabilities"]
    same = "--useGpu" if generations == ["CURRENT"] else "--computeCapabilities=" + ",".join(name[2:] for name in generations)
    assert same in output, "the line builds the same engine"
    for name in ("run/student.safetensors", "run/history.jsonl", "s.onnx", "s.engine", "s.engine.json", "r.html", "r.md"):
        assert (tmp_path / name).is_file(), name


def test_rank_prints_the_table_and_draws_it(recipe, tmp_path, capsys):
    """The recipe of distill will do; without labels, the teacher answers."""
    assert main(["rank", recipe, "--labels", "teacher", "--search", "2", "--form", "centroid"]) == 0
    output = capsys.readouterr().out
    assert "trivialaugment+cutmix" in output
    assert "first of 19" in output
    document = json.loads((tmp_path / "ranking.json").read_text())
    scores = [record["score"] for record in document["records"] if not record["dropped"]]
    assert scores == sorted(scores, reverse=True)
    assert len(document["records"]) == 19
    drawing = ElementTree.parse(tmp_path / "ranking.svg").getroot()
    drawn = {title.text for title in drawing.iter("{http://www.w3.org/2000/svg}title")}
    assert drawn == {record["name"] for record in document["records"]}


def test_names_of_augmentations_are_no_markup(recipe, tmp_path, capsys):
    """A closing tag of rich's raised an error, and the ranking was lost."""
    (tmp_path / "my_recipe.py").write_text(
        RECIPE + "\ndef named():\n"
        "    return build() | dict(candidates={'none': None, 'blur [/soft]': lambda x: x.flip(-1)}, labels='teacher')\n"
    )
    assert main(["rank", "my_recipe:named"]) == 0
    assert "blur [/soft]" in capsys.readouterr().out
    assert {record["name"] for record in json.loads((tmp_path / "ranking.json").read_text())["records"]} >= {"blur [/soft]"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "nowhere:build", "--out", "x"], "cannot be imported"),
        (["distill", "nocolon", "--out", "x"], "MODULE:FUNCTION"),
        (["rank", "my_recipe:build"], "pass --labels teacher"),
        (["rank", "my_recipe:nothing"], "no teacher or no data"),
        (["export", "my_recipe:build", "--weights", "none.pt", "--out", "x.onnx"], "none.pt does not exist"),
        (["export", "my_recipe:no_batches", "--out", "x.onnx"], "a loader that is empty"),
        (["engine", "none.onnx"], "none.onnx"),
        (["bench", "none.onnx"], "none.onnx does not exist"),
        (["bench", "none.onnx", "--module", "my_recipe:nothing"], "torch modules, got dict"),
        (["report", "none.json"], "none.json does not exist"),
        (["export-float", "my_recipe:nothing", "--out", "x.onnx"], "has no teacher and no loader"),
        (["report", "one.json", "two.json"], "--out is missing"),
    ],
)
def test_bad_input_is_one_line_and_a_status(arguments, message, recipe, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("qakd: error:") == 1
    assert "Traceback" not in error


def test_weights_of_another_grid_are_refused_by_the_name_of_the_quantizer(recipe, tmp_path, capsys):
    """The names and shapes of a state_dict do not say how many bits its scales were made for."""
    assert main(["distill", recipe, "--out", "run"]) == 0
    source = tmp_path / "my_recipe.py"
    changed = source.read_text().replace("prepare(teacher, batches)", "prepare(teacher, batches, weight_bits=4)")
    assert changed != source.read_text()
    source.write_text(changed)
    sys.modules.pop("my_recipe")
    assert main(["export", recipe, "--weights", "run/student.safetensors", "--out", "x.onnx"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "was trained as toolkit, codes -127..127, and the model is prepared with toolkit, codes -8..7" in error
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), "cannot be read as tensors and plain data"),
        (b"", "it cannot be read: it is cut short, or no file of torch.save"),
        (b"rubbish", "it cannot be read: it is cut short, or no file of torch.save"),
        ([torch.ones(2)], "holds no state_dict (list)"),
        ({0: torch.ones(2)}, "holds no state_dict (dict)"),
        ({"other.weight": torch.ones(2)}, "does not fit the prepared model: "),
        ({"state_dict": 1, "quantizers": {}}, "holds no state_dict (int)"),
        ({"state_dict": {}, "quantizers": [1]}, "holds no state_dict (list)"),
        ({"state_dict": {}, "quantizers": {"a": "b"}}, "a was trained as b, and the model is prepared with no quantizer"),
        ({"state": {"weight": torch.ones(2)}}, "does not fit the prepared model: "),
    ],
)
def test_weights_that_are_no_students_are_refused(content, message, recipe, capsys):
    Path("w.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "w.pt")
    assert main(["export", recipe, "--weights", "w.pt", "--out", "x.onnx"]) == 1
    error = capsys.readouterr().err
    assert "--weights: w.pt" in error
    assert message in error
    assert not Path("x.onnx").exists()


@pytest.mark.parametrize("command", ["demo", "distill", "rank", "export", "engine", "bench", "report"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: qakd" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["to_onnx.py", "to_tensorrt.py", "report.py"])
def test_scripts_run_from_a_checkout(script, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "export" / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: qakd" in done.stdout


DEMO = [sys.executable, "-m", "qakd_plugin.cli", "demo", "--epochs", "2", "--teacher-epochs", "3", "--calls", "70", "--out"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.resume
def test_the_demo_goes_on_where_it_was_stopped(tmp_path):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": ENVIRONMENT}
    # What runs in the background of a shell inherits that Ctrl-C is ignored.
    first = subprocess.Popen([*DEMO, tmp_path], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("*-sqakd-*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130, output
    assert "run the same command to go on" in output
    assert not list(tmp_path.rglob("*.tmp"))
    saved = (tmp_path / "teacher.pt").stat().st_mtime_ns
    _check_demo(tmp_path)
    assert (tmp_path / "teacher.pt").stat().st_mtime_ns == saved


def test_the_demo_writes_a_report(tmp_path, monkeypatch, capsys):
    """Two of its eight students; all of them in the test above."""
    monkeypatch.setattr(pipeline, "CONFIGURATIONS", ((2, (QAT(), SQAKD())),))
    assert main(["demo", "--epochs", "1", "--teacher-epochs", "1", "--calls", "70", "--out", str(tmp_path)]) == 0
    _check_report(tmp_path, {"PTQ": 1, "QAT": 1, "SQAKD": 1}, capsys.readouterr().out)


def _check_demo(tmp_path):
    done = subprocess.run([*DEMO, tmp_path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    _check_report(tmp_path, {"PTQ": 3, "QAT": 2, "SQAKD": 3}, done.stdout)


def _check_report(tmp_path, students, output):
    document = json.loads((tmp_path / "report.json").read_text())
    count = sum(students.values())
    methods = [row["method"] for row in document["rows"] if row["weight_bits"] < 32]
    assert {method: methods.count(method) for method in methods} == {method: 2 * many for method, many in students.items()}
    runtimes = [row["runtime"] for row in document["rows"] if row["weight_bits"] < 32]
    assert {runtime: runtimes.count(runtime) for runtime in runtimes} == {"onnxruntime": count, "openvino": count}
    floats = {(row["runtime"], row["precision"]) for row in document["rows"] if row["weight_bits"] == 32}
    expected = {("onnxruntime", "float32"), ("openvino", "float32")}
    assert floats == expected | ({("openvino", "bfloat16")} if has_bfloat16() else set())
    assert all(row["layers"] and row["conditions"] for row in document["rows"])
    for row in document["rows"]:
        if row["weight_bits"] < 32:
            # With codes of two or three bits the integer grid of a bias can be too coarse: ONNX Runtime then adds it in float,
            # which the diagnosis says.
            least = 10 if row["weight_bits"] == 8 or row["runtime"] == "openvino" else 8
            assert least <= row["integer_layers"] <= row["total_layers"] == 10
    assert all(engine["convolutions"] == {"total": 9, "int8": 9} for engine in document["engines"])
    records = [(row["method"], row["record"]) for row in document["rows"] if row["weight_bits"] < 32]
    assert all(record["parity"]["runtime_deviation"] < 1e-4 for _, record in records)
    trained = {(method, *(entry["method"] for entry in record["training"])) for method, record in records}
    assert trained == {("PTQ",), ("QAT", "QAT"), ("SQAKD", "SQAKD")}
    assert len(list((tmp_path / "engines").iterdir())) == 2 * count
    assert not any("Not proven" in warning for warning in (tmp_path / "report.md").read_text().splitlines())
    first, _, _ = output.partition("8/8")[2].partition("Deployed files")
    assert all(heading in first for heading in ("calibrated only", "QAT, with labels", "SQAKD, no labels"))
    (row,) = [
        row for row in document["rows"] if (row["runtime"], row["method"], row["weight_bits"]) == ("onnxruntime", "QAT", 2)
    ]
    scores = [f"{100 * row[name]:.1f}" for name in ("accuracy", "accuracy_low", "accuracy_high")]
    assert "{} [{}, {}]".format(*scores) in first
    assert "W2A2: calibration alone reaches" in " ".join(first.split())
    torch.load(tmp_path / "teacher.pt", weights_only=True)
