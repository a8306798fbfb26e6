"""The package as a whole: its inventory, its wheel, its optional parts."""

import doctest
import subprocess
import sys
import zipfile
from pathlib import Path

import qakd_plugin
import qakd_plugin.losses

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = (ROOT / "tests" / "public_names.txt").read_text().split()


def test_the_public_names_are_the_inventory():
    assert sorted(qakd_plugin.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(qakd_plugin, name) is not None


def test_importing_needs_no_toolkit_and_no_torch():
    heavy = ("torch", "modelopt", "torchao", "openvino", "tensorrt")
    code = f"import sys, qakd_plugin; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_distill_works_where_no_toolkit_can_be_imported():
    code = (
        "import sys\n"
        "for name in ('modelopt', 'torchao', 'openvino', 'tensorrt_rtx_bindings'): sys.modules[name] = None\n"
        "import torch, qakd_plugin as qakd\n"
        "from qakd_plugin.demo.net import DigitNet\n"
        "x = torch.rand(8, 1, 32, 32)\n"
        "teacher = DigitNet(4).eval()\n"
        "student = qakd.prepare(teacher, [x], toolkit='torch_ao')\n"
        "print(qakd.distill(student, teacher, [x], epochs=1).metrics['kl'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import pytest

    with pytest.raises(AttributeError, match="nonsense"):
        qakd_plugin.nonsense  # noqa: B018


def test_doctests_hold():
    assert doctest.testmod(qakd_plugin.losses, extraglobs={"torch": __import__("torch")}).failed == 0


def test_the_wheel_holds_the_package_and_its_data_only(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qakd_plugin"}
    for needed in ("py.typed", "report/template.html", "report/report.css", "report/report.js", "bench/schema.json"):
        assert f"qakd_plugin/{needed}" in names


def test_no_error_is_swallowed():
    for path in (ROOT / "qakd_plugin").rglob("*.py"):
        text = path.read_text()
        assert "except: pass" not in text, path
        assert "except Exception: pass" not in text, path
