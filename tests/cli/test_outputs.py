"""No output replaces what is read, or what is there without --force; what is written is tried before work starts."""

import json
import sys
from pathlib import Path

import onnx
import pytest

from qakd_plugin import QakdError
from qakd_plugin.cli import main
from qakd_plugin.cli.outputs import check_folder, check_outputs

RECIPE = """
def build():
    raise AssertionError("work has started")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_work.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_work", raising=False)
    for name in ("net.onnx", "net.engine.json", "net.engine", "report.json", "report.html", "w.pt", "cache", "there.json"):
        Path(name).write_text(f"this is {name}")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "my_work:build", "--weights", "w.pt", "--out", "w.pt"],
        ["tune", "net.onnx", "--out", "net.onnx"],
        ["tune", "net.onnx", "--out", "./../{}/net.onnx"],
        ["engine", "net.onnx", "--out", "net.onnx"],
        ["engine", "net.onnx", "--timing-cache", "cache", "--out", "cache"],
        ["engine", "net.onnx", "--timing-cache", "net.onnx", "--out", "new.engine"],
        ["bench", "net.engine", "--out", "net.engine.html"],
        ["bench", "net.onnx", "--recipe", "there.json", "--out", "there.html"],
        ["report", "report.json", "there.json", "--out", "there.html"],
        ["export-float", "my_work:build", "--out", "my_work.py"],
    ],
)
def test_what_is_read_is_never_replaced_force_or_not(arguments, folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([*(word.format(folder.name) for word in arguments), "--force"]) == 1
    error = capsys.readouterr().err
    assert "which is read. Name another file." in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "there"),
    [
        (["export", "my_work:build", "--out", "net.onnx"], "net.onnx"),
        (["export-float", "my_work:build", "--out", "net.onnx"], "net.onnx"),
        (["rank", "my_work:build", "--out", "there.json"], "there.json"),
        (["engine", "other.onnx", "--out", "net.engine"], "net.engine"),
        (["bench", "net.onnx"], "report.html"),
        (["report", "report.json"], "report.html"),
        (["tune", "other.onnx", "--out", "net.onnx"], "net.onnx"),
    ],
)
def test_what_is_there_is_replaced_with_force_alone(arguments, there, folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(arguments) == 1
    assert f"--out: {there} is there already. Name another file, or pass --force" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_force_goes_on_to_the_work(folder, capsys):
    with pytest.raises(AssertionError, match="work has started"):
        main(["export", "my_work:build", "--out", "net.onnx", "--force"])
    assert Path("net.onnx").read_text() == "this is net.onnx"


@pytest.mark.parametrize("out", ["net.onnx/x.onnx", "new/../net.onnx/x", "."])
def test_what_cannot_be_written_is_said_before_the_work(out, folder, capsys):
    before = set(folder.iterdir())
    assert main(["export", "my_work:build", "--out", out]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qakd: error: ")
    assert error.count("\n") == 1
    assert set(folder.iterdir()) == before
    assert main(["distill", "my_work:build", "--out", "net.onnx"]) == 1
    assert "--out: net.onnx is a file. Name a folder." in capsys.readouterr().err


def test_trying_leaves_no_trace(folder):
    before = set(folder.rglob("*"))
    check_outputs([folder / "a" / "b" / "c.onnx", folder / "d.onnx"], [None, "my_work:build"], force=False)
    assert set(folder.rglob("*")) == before


def test_a_finished_run_is_not_trained_over(folder):
    check_folder(folder / "run", ["student.safetensors"], resume=False)
    (folder / "run").mkdir()
    (folder / "run" / "student.safetensors").write_text("trained")
    with pytest.raises(QakdError, match=r"student.safetensors is there already.*--resume"):
        check_folder(folder / "run", ["student.safetensors"], resume=False)
    check_folder(folder / "run", ["student.safetensors"], resume=True)
    assert (folder / "run" / "student.safetensors").read_text() == "trained"


NASTY = "[bold]a[/b] :smile: \x1b]0;title\x07\nqakd: error: all is well \u202e"


def test_names_from_files_are_shown_and_not_obeyed(folder, capsys):
    """In an error line: a key of a report, and a node of a damaged file."""
    Path("report.json").write_text(json.dumps({"schema_version": 3, NASTY: 1}))
    Path("report.html").unlink()
    node = onnx.helper.make_node("QuantizeLinear", ["input", "scale"], ["output"], name=NASTY)
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("input", "output")]
    graph = onnx.helper.make_graph([node], "graph", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), "bad.onnx")
    for arguments in (["report", "report.json"], ["engine", "bad.onnx", "--out", "b.engine"], ["tune", NASTY]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.rstrip("\n").isprintable()
    assert "\\x1b]0;title\\x07 qakd: error" in error
    with pytest.raises(SystemExit):
        main(["tune", "net.onnx", "--threads", NASTY])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()


def test_tables_show_names_as_they_are(capsys):
    from rich.console import Console
    from rich.table import Table

    from qakd_plugin._common.console import cell

    table = Table()
    table.add_column("name")
    table.add_row(cell(NASTY))
    Console(width=200, force_terminal=True, color_system=None, file=sys.stdout).print(table)
    output = capsys.readouterr().out
    assert "[bold]a[/b] :smile: \\x1b]0;title\\x07 qakd: error: all is well \\u202e" in output
