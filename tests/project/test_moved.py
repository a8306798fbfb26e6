"""Import paths of 0.1 go on working, and say where to go."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest

from qakd_plugin._moved import MOVED

# What README, docs and examples of 0.1 imported from deep paths.
DOCUMENTED = {
    "backends": "adapter_for",
    "backends.modelopt": "restore_modelopt",
    "batches": "default_batch",
    "bench.environment": "environment is_busy",
    "deploy.diagnosis": "diagnose",
    "deploy.engine": "build_engine trtexec_command",
    "deploy.engine_runner": "EngineRunner",
    "deploy.export": "export_onnx ExportedModel",
    "deploy.inspect_onnx": "inspect_onnx",
    "deploy.parity": "agreement check_parity ParityReport",
    "deploy.to_onnx": "export_float",
    "deploy.trt": "gpu_capability",
    "deploy.tune": "tune_for_host",
    "evaluation": "evaluate",
    "hooks": "Attached attach",
    "optim": "Settings student_optimizer",
    "preparation": "prepare configuration",
    "progress": "track",
    "quantizers": "refresh_delta",
    "swap": "use_quantizers",
}


@pytest.fixture
def fresh():
    """No old path was imported yet."""
    old = {f"qakd_plugin.{name}" for name in MOVED}
    for name in old & set(sys.modules):
        del sys.modules[name]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_is_imported_with_one_warning(fresh, old):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(f"qakd_plugin.{old}")
        importlib.import_module(f"qakd_plugin.{old}")
    told = [str(warning.message) for warning in caught if f"qakd_plugin.{old} has moved" in str(warning.message)]
    assert len(told) == 1
    assert f"qakd_plugin.{MOVED[old][0]}" in told[0]
    for new in MOVED[old]:
        home = importlib.import_module(f"qakd_plugin.{new}")
        for name, value in vars(home).items():
            if not name.startswith("__") and not isinstance(value, type(sys)):
                assert hasattr(module, name), name


@pytest.mark.parametrize("old", sorted(DOCUMENTED))
def test_what_was_documented_is_still_found(fresh, old):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(f"qakd_plugin.{old}")
        for name in DOCUMENTED[old].split():
            assert callable(getattr(module, name))


def test_the_warning_names_the_line_that_imports(fresh, tmp_path):
    script = tmp_path / "users_script.py"
    script.write_text("from qakd_plugin.deploy.to_onnx import export_float\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(script.read_text(), script, "exec"), {"__name__": "users_script"})
    assert Path(next(w.filename for w in caught if "to_onnx" in str(w.message))) == script


def test_no_old_path_hides_a_module_that_is_there():
    package = Path(importlib.import_module("qakd_plugin").__file__).parent
    for old in MOVED:
        place = package.joinpath(*old.split("."))
        assert not place.with_suffix(".py").exists()
        assert not (place / "__init__.py").exists()


def test_a_path_that_never_was_is_an_import_error():
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        importlib.import_module("qakd_plugin.nonsense")
    with pytest.raises(ImportError, match="nonsense"):
        exec("from qakd_plugin.deploy.engine import nonsense")
