"""Examples run, with a small setting."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_quickstart(tmp_path, capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"](tmp_path, epochs=1)
    assert "weight codes equal" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("own_loop", {"epochs": 1, "teacher_epochs": 8, "width": 4, "toolkit": "pt2e"}),
        ("lightning_module", {"epochs": 3, "width": 4, "toolkit": "torch_ao"}),
        ("hugging_face", {"steps": 10, "epochs": 2}),
        ("int4_vit", {"epochs": 1, "teacher_epochs": 8, "width": 32}),
    ],
)
def test_an_example_by_feature_trains_a_student_that_knows_digits(name, settings):
    assert runpy.run_path(str(ROOT / "examples" / "by_feature" / f"{name}.py"))["main"](**settings) > 0.5
