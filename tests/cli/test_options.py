"""Options are a function's parameters; errors are one line that names the flag."""

import inspect
import logging
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import pytest

from qakd_plugin.cli import main
from qakd_plugin.cli.commands import COMMANDS
from qakd_plugin.cli.deploy import sizes_as_flags
from qakd_plugin.cli.noise import quiet
from qakd_plugin.cli.options import CommandParser, OneOf, PositiveInt, in_flags, suggestion
from qakd_plugin.cli.recipes import APIS, api_keys, api_parameters

TABLE = ("x", "y")


def command(
    first: Path,
    several: list[Path],
    *,
    out: Path,
    min_batch: PositiveInt = 2,
    share: float | None = None,
    kind: Literal["a", "b"] | None = None,
    of: list[Annotated[str, OneOf(TABLE)]] | None = None,
    calls: list[PositiveInt] | None = None,
    allow_float: bool = False,
    resume: bool | Literal["force"] = False,
    seed: int = 0,
) -> None:
    """Does nothing.

    Args:
        first: a file
        several: files
        out: where to
        min_batch: 100% of
            a batch
        share: of layers
        kind: which
        of: table
        calls: how many
        allow_float: or not
        resume: or not, or all the same
        seed: of draws
    """


def read(*arguments):
    return vars(CommandParser("try", "try it", command).read(["a", "b", "c", "--out", "o", *arguments]))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a b --out o", False),
        ("a b --out o --resume", True),
        ("--resume a b --out o", True),
        ("a b --resume --out o", True),
        ("a b --out o --resume force", "force"),
        ("--resume force a b --out o", "force"),
        ("a b --out o --resume=force", "force"),
        ("--resume --out o -- a b", True),
    ],
)
def test_a_flag_takes_its_word_and_no_other_argument(line, expected):
    found = CommandParser("try", "try it", command).read(line.split())
    assert (found.first, found.several, found.resume) == (Path("a"), [Path("b")], expected)


def test_another_word_after_the_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        read("--resume=forced")
    assert "--resume: expected force or nothing, got 'forced'" in capsys.readouterr().err


def test_parameters_are_options_with_their_types_and_defaults():
    expected = {"first": Path("a"), "several": [Path("b"), Path("c")], "out": Path("o"), "min_batch": 2, "share": None}
    expected |= {"kind": None, "of": None, "calls": None, "allow_float": False, "resume": False, "seed": 0}
    assert read() == expected
    given = read("--min-batch", "3", "--share=1e-1", "--kind", "b", "--of", "x", "--of=y", "--allow-float", "--seed", "-1")
    changed = {"min_batch": 3, "share": 0.1, "kind": "b", "of": ["x", "y"], "allow_float": True, "seed": -1}
    assert given == expected | changed
    assert read("--calls", "1", "--calls", "2")["calls"] == [1, 2]
    assert read("--out", "null")["out"] == Path("null")


def test_help_has_the_text_and_the_default_of_each(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "100% of a batch (2)" in output
    assert "--seed SEED           of draws (0)" in output
    assert "--kind {a,b}" in output
    assert "several [several ...]" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-batch", "0"], "--min-batch: expected a positive whole number, got 0"),
        (["--min-batch", "many"], "--min-batch: expected a positive whole number, got many"),
        (["--calls", "1.5"], "--calls: expected a positive whole number, got 1.5"),
        (["--share", "half"], "--share: expected float, got half"),
        (["--seed", "x"], "--seed: expected int, got x"),
        (["--kind", "c"], "--kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (["--of", "z"], "--of: invalid choice: 'z' (choose from 'x', 'y')"),
        (["--min-bach", "3"], "unrecognized arguments: --min-bach 3 (did you mean --min-batch?)"),
        (["--min", "3"], "unrecognized arguments: --min 3"),
        (["--seed"], "--seed: expected one argument"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_that_names_the_flag(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("qakd try: error: ")
    assert message in error.replace("choose from a, b", "choose from 'a', 'b'").replace(
        "choose from x, y", "choose from 'x', 'y'"
    )
    assert error.count("\n") == 1


def test_what_is_missing_is_named(capsys):
    with pytest.raises(SystemExit):
        CommandParser("try", "", command).parse_args(["a", "b"])
    assert "the following arguments are required: --out (" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_all_that_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distil", "x"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in COMMANDS)


@pytest.mark.parametrize(
    ("message", "translated"),
    [
        ("Pass resume=True to go on.", "Pass --resume to go on."),
        ("0 < min_batch <= max_batch must hold, got 2, 1.", "0 < --min-batch <= --max-batch must hold, got 2, 1."),
        ('pass labels="teacher"', "pass --labels teacher"),
        ("float16=True is for target='tensorrt': no", "--float16 is for --target tensorrt: no"),
        ("checkpoint_dir=run/a holds checkpoints", "--out run/a holds checkpoints"),
        ("runtimes: 'q' is unknown: use 'x'", "--runtime: 'q' is unknown: use 'x'"),
        ("no label or target here", "no label or target here"),
        ("lr=-1 must be positive", "lr=-1 must be positive"),
    ],
)
def test_errors_of_the_api_speak_of_flags(message, translated):
    flags = {
        name: f"--{name.replace('_', '-')}" for name in ("resume", "min_batch", "max_batch", "labels", "float16", "target")
    }
    assert in_flags(message, flags | {"checkpoint_dir": "--out", "runtimes": "--runtime"}) == translated


def test_sizes_of_an_engine_are_shown_as_flags():
    shown = 'Pass sizes={"sequence": (smallest, usual, largest), "x": (smallest, usual, largest)}.'
    assert sizes_as_flags(shown) == "Pass --size sequence=SMALLEST,USUAL,LARGEST --size x=SMALLEST,USUAL,LARGEST."
    assert sizes_as_flags("sizes: 'x' needs three whole numbers") == "--size: 'x' needs three whole numbers"


def test_suggestions_are_near():
    assert suggestion("epohcs", ["epochs", "lr"]) == " (did you mean epochs?)"
    assert suggestion("nothing", ["epochs", "lr"]) == ""


API_OF = APIS | {
    "tune": ("deploy.tuning", "tune_for_host"),
    "engine": ("deploy.engine.build", "build_engine"),
    "bench": ("bench.measure", "benchmark"),
}
OTHERWISE = {("bench", "batch"), ("bench", "runtime"), ("bench", "threads"), ("engine", "capability")}  # repeated flags


@pytest.mark.parametrize("name", API_OF)
def test_options_have_the_defaults_and_choices_of_the_api(name):
    """Or None, which leaves the choice to a recipe, and then to the API."""
    module, function = API_OF[name]
    api = getattr(import_module(f"qakd_plugin.{module}"), function)
    own = getattr(import_module(f"qakd_plugin.cli.{COMMANDS[name].module}"), name)
    there, hints = inspect.signature(api).parameters, get_type_hints(own, include_extras=True)
    compared = 0
    for key, parameter in inspect.signature(own).parameters.items():
        if key not in there or (name, key) in OTHERWISE or parameter.default is inspect.Parameter.empty:
            continue
        assert parameter.default in (None, there[key].default), key
        compared += 1
    assert compared > 0
    for key, renamed in COMMANDS[name].renamed.items():
        assert key in there, key
        assert renamed.removeprefix("--").replace("-", "_") in hints


def test_help_needs_no_torch_and_no_jsonargparse():
    """So that it answers at once."""
    check = (
        "import sys; from qakd_plugin.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'accelerate', 'jsonargparse')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    expected = {"--help": "[]"} | dict.fromkeys(COMMANDS, "['jsonargparse']")
    for argument, loaded in expected.items():
        arguments = [argument] if argument == "--help" else [argument, "--help"]
        done = subprocess.run([sys.executable, "-c", check, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.strip().splitlines()[-1] == loaded, argument
    wrong = subprocess.run([sys.executable, "-c", check, "distill", "--uot", "x"], capture_output=True, text=True, check=True)
    assert wrong.stdout.strip() == "['jsonargparse']"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epohcs: 3", "unknown key 'epohcs' (did you mean epochs?)"),
        ("teacher: {class_path: no_such_package.network}", "no module 'no_such_package' is here or installed"),
        ("loader: {class_path: x.y, init_args: {a: [{class_path: no_such_package.z}]}}", "loader: 'x.y' cannot be imported"),
        ("epochs: 3", "no prepared_model or no teacher or no loader"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_before_torch_is_imported(content, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(content)
    code = "import sys; from qakd_plugin.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "distill", "recipe.yaml", "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.stdout == "1 False\n"
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_keys_that_are_read_from_the_source_are_those_of_the_functions():
    for name in APIS:
        assert list(api_keys(name)) == list(api_parameters(name))


def test_what_other_packages_say_at_each_start_is_left_out_and_nothing_else(capsys, caplog):
    with quiet(), warnings.catch_warnings(record=True) as found:
        warnings.warn("`torch.jit.script` is deprecated. Please switch", FutureWarning, stacklevel=1)
        warnings.warn("transformers 9.9.9 is not tested with current version of modelopt and may", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/x")
        logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and is now natively supported", "X")
        logging.getLogger("torch.utils._pytree").warning("other")
        print("Inserted 263 quantizers")
        print("Inserted by hand")
        print()
    assert [str(warning.message) for warning in found] == ["something else"]
    assert caplog.messages == ["other"]
    assert capsys.readouterr().out == "Inserted by hand\n\n"
    print("Inserted 263 quantizers")
    assert capsys.readouterr().out == "Inserted 263 quantizers\n"


@pytest.mark.parametrize(("flags", "lines"), [([], "info\nwarning\nerror\n"), (["--quiet"], "error\n")])
@pytest.mark.parametrize("first", [True, False])
def test_without_a_terminal_progress_is_logged_and_quiet_leaves_errors_alone(flags, lines, first, tmp_path):
    (tmp_path / "recipe.py").write_text(
        "import logging\n"
        "def build():\n"
        "    log = logging.getLogger('qakd_plugin.training')\n"
        "    log.info('info'), log.warning('warning'), log.error('error')\n"
        "    raise SystemExit(5)\n"
    )
    command = ["distill", "recipe:build", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "qakd_plugin.cli", *(flags + command if first else command + flags)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 5
    assert done.stderr == lines
