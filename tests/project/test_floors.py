"""The order of the package's floors, where importing shows it: nothing below loads what is above."""

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint('loaded', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("loaded ")[2].split())


EXPORTER = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "qakd_plugin.deploy"}


def test_training_never_imports_the_exporter():
    modules = loaded_by("import qakd_plugin as qakd; qakd.distill, qakd.attach, qakd.prepare, qakd.describe")
    assert "qakd_plugin.training.distillation" in modules
    assert not EXPORTER & modules


def test_training_and_its_checks_never_import_the_exporter():
    """A whole run, which asks first whether its student could be exported."""
    modules = loaded_by(
        "import torch, qakd_plugin as qakd\n"
        "teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))\n"
        "images = torch.rand(4, 3, 8, 8)\n"
        "student = qakd.prepare(teacher, [images], toolkit='torch_ao')\n"
        "qakd.distill(student, teacher, [images], epochs=1)"
    )
    assert "qakd_plugin.preparation.feasibility" in modules
    assert not EXPORTER & modules


@pytest.mark.parametrize("module", ["deploy.canonical.write", "export_form.tracing"])
def test_importing_registers_no_onnx_schema(module):
    code = f"import onnx, qakd_plugin.{module}; raise SystemExit(onnx.defs.has('QDQ', 'qakd'))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
