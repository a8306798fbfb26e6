"""Examples run, with a small setting."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_quickstart(tmp_path, capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"](tmp_path, epochs=1)
    assert "weight codes equal" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
