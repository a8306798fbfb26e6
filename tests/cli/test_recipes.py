"""Recipes: one for all commands, in YAML or Python; what they cannot say ends in one line."""

import functools
import json
import random
import sys

import numpy
import pytest
import torch
import yaml
from torch import nn

import qakd_plugin
from qakd_plugin import KD, SQAKD, QakdError
from qakd_plugin.cli import main
from qakd_plugin.cli.recipe_template import commented_recipe
from qakd_plugin.cli.recipes import APIS, Recipe, api_parameters, read_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
CODE = """
import random
import numpy
import torch
from torch import nn
from qakd_plugin import prepare
from qakd_plugin.demo.net import DigitNet

CALLS = []

def network(width: int = 4):
    CALLS.append("network")
    return DigitNet(width=width).eval()

def batches(count: int = 2, labels=False):
    CALLS.append("batches")
    images = [torch.rand(8, 1, 32, 32) for _ in range(count)]
    return [(x, torch.randint(10, (8,))) for x in images] if labels else images

def prepared(model, calibration_batches):
    CALLS.append("prepared")
    return prepare(model, calibration_batches)

def split(batch):
    return (batch[0], batch[1]) if isinstance(batch, tuple) else (batch, None)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = DigitNet(width=4)

    def forward(self, x, labels=None):
        logits = self.net(x)
        found = {"a": logits, "b": logits * 2}
        return found if labels is None else {**found, "loss": nn.functional.cross_entropy(logits, labels)}

def two():
    return Two().eval()

def picked(outputs, targets):
    return outputs["a"], targets

def numbers():
    return [torch.rand(3), numpy.random.rand(3), random.random()]

class Callback:
    steps = 0
    def __init__(self, name="x"):
        self.name = name
    def on_step_end(self, step, losses):
        Callback.steps += 1

def broken():
    return 1 / 0

def build():
    teacher = network()
    data = batches()
    return dict(prepared_model=prepare(teacher, data), teacher=teacher, loader=data, epochs=1,
                example_inputs=data[0], max_samples=16, labels="teacher", candidates=["none", "randomerasing"])

def typo():
    return {**build(), "learning_rate": 1e-3}

def folder():
    return {**build(), "checkpoint_dir": "elsewhere"}
"""
RECIPE = """
teacher: &teacher {class_path: my_code.network, init_args: {width: 4}}
loader: &images {class_path: my_code.batches}
prepared_model:
  class_path: my_code.prepared
  init_args: {model: *teacher, calibration_batches: *images}
method: {class_path: qakd_plugin.SQAKD, init_args: {temperature: 2}}
epochs: 1
lr: 1e-4
seed: 3
batch_fn: my_code.split
optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}
callbacks: [{class_path: my_code.Callback, init_args: {name: mine}}]
candidates: [none, randomerasing]
labels: teacher
max_samples: 16
example_inputs: {class_path: torch.rand, init_args: {size: [4, 1, 32, 32]}}
"""


@pytest.fixture(autouse=True)
def code(tmp_path, monkeypatch):
    (tmp_path / "my_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    return tmp_path


def recipe(text, command="distill"):
    with open("recipe.yaml", "w") as file:
        file.write(text)
    return read_recipe("recipe.yaml", command)


def changed(**values):
    """The recipe with other values, or without those that are None."""
    tree = yaml.safe_load(RECIPE) | values
    return yaml.safe_dump({key: value for key, value in tree.items() if value is not None})


def test_one_yaml_recipe_serves_distill_rank_and_export(code, capsys):
    (code / "recipe.yaml").write_text(RECIPE)
    assert main(["distill", "recipe.yaml", "--out", "run"]) == 0
    row = json.loads((code / "run" / "history.jsonl").read_text())
    assert row["phase"] == "distill"
    assert sys.modules["my_code"].Callback.steps == 2
    assert main(["rank", "recipe.yaml"]) == 0
    assert [r["num_samples"] for r in json.loads((code / "ranking.json").read_text())["records"]] == [16, 16]
    assert main(["export", "recipe.yaml", "--weights", "run/student.safetensors", "--out", "s.onnx"]) == 0
    assert "run/student.safetensors" in capsys.readouterr().out
    assert (code / "s.onnx").is_file()


def test_one_python_recipe_serves_them_as_well(code):
    assert main(["rank", "my_code:build", "--out", "order.json"]) == 0
    assert len(json.loads((code / "order.json").read_text())["records"]) == 2
    assert main(["distill", "my_code:build", "--out", "run", "--epochs", "2"]) == 0
    assert len((code / "run" / "history.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", "1e-3", "lr: expected float or None, got '1e-3' (str)."),
        ("epochs", True, "epochs: expected int, got True (bool)."),
        ("weight_decay", None, "weight_decay: expected float, got None (NoneType)."),
        ("cache_teacher", 5, "cache_teacher: expected str or os.PathLike[str] or None, got 5 (int)."),
        ("callbacks", 5, "callbacks: expected an object, got 5 (int)."),
    ],
)
def test_values_of_a_python_recipe_have_their_types(key, value, message):
    with pytest.raises(QakdError) as caught:
        Recipe("my_code:build", {key: value}, "distill").arguments()
    assert str(caught.value) == f"my_code:build: {message}"


def test_values_of_a_python_recipe_are_passed_as_they_are():
    values = {"lr": numpy.float64(1e-3), "epochs": 3, "cache_teacher": "c", "teacher": None, "callbacks": [1], "warmup": 0}
    assert Recipe("my_code:build", values, "distill").arguments() == values


def test_a_changed_recipe_goes_on_with_the_word_force_alone(code, capsys):
    (code / "recipe.yaml").write_text(changed(epochs=1))
    assert main(["distill", "recipe.yaml", "--out", "run"]) == 0
    (code / "recipe.yaml").write_text(changed(epochs=2, seed=4))
    assert main(["distill", "recipe.yaml", "--out", "run", "--resume"]) == 1
    assert "seed is 3 there and 4 here" in (said := capsys.readouterr().err)
    assert "--resume force" in said
    assert main(["distill", "recipe.yaml", "--out", "run", "--resume", "force"]) == 0
    assert len((code / "run" / "history.jsonl").read_text().splitlines()) == 2


def test_values_are_objects_made_of_the_users_functions():
    arguments = recipe(RECIPE).arguments("prepared_model", "teacher", "loader")
    assert arguments["method"] == SQAKD(temperature=2.0)
    assert arguments["lr"] == 1e-4
    assert isinstance(arguments["teacher"], nn.Module)
    assert arguments["batch_fn"] is sys.modules["my_code"].split
    assert arguments["callbacks"][0].name == "mine"
    optimizer = arguments["optimizer"]
    assert isinstance(optimizer, functools.partial)
    assert optimizer.func is torch.optim.SGD
    assert optimizer.keywords == {"momentum": 0.9}
    assert "candidates" not in arguments


def test_an_alias_is_the_same_object_and_only_what_is_needed_is_made():
    found = recipe(RECIPE, "rank").arguments("teacher", "data")
    assert sys.modules["my_code"].CALLS == ["network", "batches"]
    assert found["data"] is not None
    arguments = recipe(RECIPE).arguments()
    assert sorted(sys.modules["my_code"].CALLS) == ["batches"] * 2 + ["network"] * 2 + ["prepared"]
    assert arguments.keys() >= {"teacher", "loader", "prepared_model"}


def test_the_seed_is_set_before_each_function_is_called():
    text = "seed: 5\nteacher: {class_path: my_code.network}\ncallbacks: [{class_path: my_code.numbers}]\n"
    first = recipe(text).arguments()
    random.random(), torch.rand(7)
    again = recipe("callbacks: [{class_path: my_code.numbers}]\nseed: 5\nteacher: {class_path: my_code.network}\n", "distill")
    second = again.arguments()
    for name, value in first["teacher"].state_dict().items():
        assert torch.equal(value, second["teacher"].state_dict()[name])
    (tensor, array, number), (other_tensor, other_array, other_number) = first["callbacks"][0], second["callbacks"][0]
    assert torch.equal(tensor, other_tensor)
    assert (array == other_array).all()
    assert number == other_number
    other = recipe(text.replace("5", "6")).arguments()["callbacks"][0]
    assert not torch.equal(tensor, other[0])


def test_the_printed_recipe_names_every_key_with_its_default_and_trains(code, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--print-config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == commented_recipe().strip()
    tree = yaml.safe_load(text)
    every = {key: parameter.default for command in reversed(APIS) for key, parameter in api_parameters(command).items()}
    assert tree.keys() | {"data", "example_inputs", "batches"} == every.keys()
    assert {key: tree[key] for key in ("epochs", "lr", "grad_clip", "mixed_precision", "labels", "target", "float16")} == {
        key: every[key] for key in ("epochs", "lr", "grad_clip", "mixed_precision", "labels", "target", "float16")
    }
    lines = text.splitlines()
    for key in every:
        (at,) = (number for number, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{key}: "))
        assert lines[at - 1].startswith("# "), f"{key} has no help"
    text = text.replace(
        "my_code.prepared_model, init_args: {}", "my_code.prepared, init_args: {model: *t, calibration_batches: *x}"
    )
    text = text.replace("teacher: {class_path: my_code.teacher", "teacher: &t {class_path: my_code.network")
    text = text.replace("loader: {class_path: my_code.loader", "loader: &x {class_path: my_code.batches")
    start = text.index("prepared_model:")
    end = text.index("\n", start) + 1
    (code / "recipe.yaml").write_text(text[:start] + text[end:] + text[start:end])  # anchors come before aliases
    assert main(["distill", "recipe.yaml", "--out", "run", "--epochs", "1"]) == 0
    assert (code / "run" / "student.safetensors").is_file()


def test_sensitivity_prints_what_to_keep(code, capsys):
    assert main(["sensitivity", "my_code:build", "--max-batches", "1", "--budget", "0"]) == 0
    shown = capsys.readouterr().out
    assert "each alone; together loss" in shown
    assert "quantized layers leave integer arithmetic" in shown


NETWORK = {"class_path": "my_code.network"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epohcs": 3}, "recipe.yaml: unknown key 'epohcs' (did you mean epochs?). Known are prepared_model, teacher,"),
        ({"checkpoint_dir": "x"}, "recipe.yaml: checkpoint_dir is given on the command line, as --out."),
        ({"epochs": "ten"}, "recipe.yaml: epochs: expected int, got 'ten' (str)."),
        (
            {"mixed_precision": False},
            "expected one of 'no', 'bf16', got False (bool). YAML reads no, off,",
        ),
        ({"epochs": True}, "recipe.yaml: epochs: expected int, got True (bool)."),
        ({"lr": "fast"}, "recipe.yaml: lr: expected float or null, got 'fast' (str)."),
        ({"grad_clip": [1]}, "recipe.yaml: grad_clip: expected float or null, got [1] (list)."),
        ({"seed": 1.5}, "recipe.yaml: seed: expected int or null, got 1.5 (float)."),
        ({"method": "sqakd"}, "recipe.yaml: method: expected {class_path: ..., init_args: {...}} or null, got 'sqakd' (str)."),
        (
            {"batch_fn": "my_code.splitt"},
            "batch_fn: 'my_code.splitt' cannot be imported: my_code has no splitt (did you mean split?)",
        ),
        ({"teacher": {"class_path": "my_code.net"}}, "teacher: 'my_code.net' cannot be imported: my_code has no net"),
        ({"teacher": {"class_path": "my_cod.network"}}, "'my_cod.network' cannot be imported: no module 'my_cod' is here"),
        (
            {"teacher": {"class_path": "network"}},
            "expected an import path such as my_code.make_network, got 'network'.",
        ),
        ({"teacher": {"class_path": "my_code.CALLS"}}, "teacher: my_code.CALLS is no function or class, but list."),
        ({"teacher": {"class_path": 3}}, "teacher: expected class_path: an import path"),
        (
            {"teacher": NETWORK | {"init_arg": {}}},
            "teacher: unknown key 'init_arg' beside class_path; init_args is known (did you mean init_args?).",
        ),
        ({"teacher": NETWORK | {"init_args": [4]}}, "teacher: expected class_path: an import path, and init_args: names"),
        (
            {"teacher": NETWORK | {"init_args": {"widht": 4}}},
            "teacher: unknown key 'widht'; my_code.network has width (did you mean width?).",
        ),
        ({"teacher": NETWORK | {"init_args": {"width": "four"}}}, "teacher.width: expected int, got 'four' (str)."),
        (
            {"teacher": {"class_path": "my_code.prepared"}},
            "teacher: 'model' is missing; my_code.prepared needs model, cal",
        ),
        (
            {"method": {"class_path": "qakd_plugin.KD", "init_args": {"alpha": 2.0}}},
            "method: alpha=2.0 is out of range",
        ),
        ({"settings": {"lrr": 1}}, "settings: unknown key 'lrr'; Settings has lr, quantizer_lr,"),
        ({"settings": "fast"}, "settings: expected Settings or null, got 'fast' (str)."),
        ({"settings": {"ema": 2.0}}, "settings: ema=2.0 must lie between 0 and 1"),
        ({"teacher": None}, "recipe.yaml has no teacher, which qakd distill needs."),
        ({"teacher": None, "loader": None}, "recipe.yaml has no teacher or no loader, which qakd distill needs."),
    ],
)
def test_what_a_recipe_cannot_say_ends_in_one_line(values, message, code, capsys):
    (code / "recipe.yaml").write_text(changed(**values))
    assert main(["distill", "recipe.yaml", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("qakd: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "cannot be read as YAML: while parsing a flow node"),
        ("epochs: !!python/object/apply:os.system [touch ran]", "cannot be read as YAML: could not determine a constructor"),
        ("callbacks: &x [*x]", "cannot be read as YAML: Circular reference"),
        ("callbacks: " + "[" * 5000 + "]" * 5000, "cannot be read as YAML"),
        ("- epochs", "expected sections and values, got list"),
        ("", "expected sections and values, got NoneType"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_recipe_end_in_one_line_and_run_nothing(text, message, code, capsys):
    (code / "recipe.yaml").write_text(text)
    assert main(["distill", "recipe.yaml", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (code / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.yaml", "missing.yaml cannot be read"),
        ("my_code:typo", "my_code:typo: unknown key 'learning_rate'. Known are prepared_model, teacher,"),
        ("my_code:folder", "my_code:folder: checkpoint_dir is given on the command line, as --out. Leave it out."),
        ("my_code:biuld", "my_code has no biuld (did you mean build?)"),
        ("my_code:numbers", "'my_code:numbers' must return a dict of keyword arguments, got list."),
        ("my_code.py:build", "name the module without .py, my_code:build."),
        ("./my_code:build", "cannot be imported"),
        ("my_code", "must be MODULE:FUNCTION"),
    ],
)
def test_recipes_that_cannot_be_found_or_hold_what_nobody_knows(name, message, capsys):
    assert main(["distill", name, "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_error_in_the_users_own_code_shows_where_it_is():
    with pytest.raises(ZeroDivisionError):
        recipe("callbacks: [{class_path: my_code.broken}]").arguments()


def test_a_missing_package_of_the_users_module_is_named(code):
    (code / "needs_more.py").write_text("import no_such_package\n")
    with pytest.raises(QakdError, match=r"'needs_more.f' cannot be imported: needs_more: No module named 'no_such_package'"):
        recipe("teacher: {class_path: needs_more.f}").arguments()


def test_a_method_with_numbers_of_yaml():
    found = recipe("method: {class_path: qakd_plugin.KD, init_args: {temperature: 1e1, alpha: 1}}").arguments()
    assert found["method"] == KD(temperature=10.0, alpha=1.0)


def test_what_is_matched_learned_and_counted_can_be_said_in_yaml(code):
    (code / "recipe.yaml").write_text("""
teacher: &teacher {class_path: my_code.two}
loader: &images {class_path: my_code.batches, init_args: {labels: true}}
prepared_model: {class_path: qakd_plugin.prepare, init_args: {model: *teacher, calibration_batches: *images}}
val_loader: *images
method:
  class_path: qakd_plugin.KD
  init_args:
    match:
      a: {class_path: qakd_plugin.KL, init_args: {dim: 1, weight: 0.5}}
      b: {class_path: qakd_plugin.L2}
task_loss: model
metric:
  class_path: torchmetrics.MetricCollection
  init_args:
    metrics:
      - {class_path: torchmetrics.classification.MulticlassAccuracy, init_args: {num_classes: 10}}
      - {class_path: torchmetrics.classification.MulticlassF1Score, init_args: {num_classes: 10}}
metric_fn: my_code.picked
monitor: multiclass_f1_score
batch_fn: my_code.split
epochs: 1
seed: 0
""")
    assert main(["distill", "recipe.yaml", "--out", "run"]) == 0
    _, row = (json.loads(line) for line in (code / "run" / "history.jsonl").read_text().splitlines())
    assert {"kl_a", "kl_b", "ce", "val_multiclass_f1_score", "val_teacher_multiclass_accuracy"} <= row.keys()
    arguments = recipe((code / "recipe.yaml").read_text()).arguments("teacher")
    assert arguments["method"] == KD(match={"a": qakd_plugin.KL(dim=1, weight=0.5), "b": qakd_plugin.L2()})
    assert arguments["task_loss"] == "model"
