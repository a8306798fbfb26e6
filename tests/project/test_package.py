"""The package as a whole: its inventory, its wheel, its optional parts."""

import doctest
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import qakd_plugin
import qakd_plugin.losses

ROOT = Path(__file__).resolve().parent.parent.parent
PUBLIC = (ROOT / "tests" / "public_names.txt").read_text().split()


def test_the_public_names_are_the_inventory():
    assert sorted(qakd_plugin.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(qakd_plugin, name) is not None


def test_importing_needs_no_toolkit_and_no_torch():
    heavy = ("torch", "modelopt", "torchao", "openvino", "tensorrt")
    code = f"import sys, qakd_plugin; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BARE = """
import sys
from importlib.machinery import PathFinder
from importlib.metadata import MetadataPathFinder

# As where nothing but the base dependencies is installed: neither modules nor what pip says of them are found.
OPTIONAL = set(sys.argv[1].split(","))
find_spec, find_distributions = PathFinder.find_spec, MetadataPathFinder.find_distributions

def bare_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in OPTIONAL else find_spec(name, path, target)

def bare_distributions(context):
    return [] if context.name and context.name.replace("-", "_") in OPTIONAL else find_distributions(context)

PathFinder.find_spec, MetadataPathFinder.find_distributions = bare_spec, bare_distributions

import torch
import qakd_plugin as qakd
from qakd_plugin.cli import main
from qakd_plugin.demo.net import DigitNet

print(qakd.__file__)
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
x = torch.rand(8, 1, 32, 32)
teacher = DigitNet(4).eval()
student = qakd.prepare(teacher, [x], toolkit="torch_ao")
result = qakd.distill(student, teacher, [x], epochs=1)
for target in ("tensorrt", "onnxruntime", "openvino"):
    qakd.export_onnx(result.model, x, f"{target}.onnx", target=target)
try:
    qakd.prepare(teacher, [x])
except qakd.MissingPackageError as error:
    assert "'.[modelopt]'" in str(error)
else:
    raise AssertionError("ModelOpt was found")
loaded = OPTIONAL & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
OPTIONAL = (
    "modelopt", "torchao", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "openvino", "nncf", "pycuda", "matplotlib",
    "lightning", "pytorch_lightning", "transformers", "timm", "tensorboard",
)  # fmt: skip


def test_the_installed_wheel_distills_and_exports_with_base_dependencies_only(wheel, tmp_path):
    """The wheel alone in a folder, no optional package to be found, far from the checkout."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(command, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", BARE, ",".join(OPTIONAL)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "usage: qakd" in done.stdout
    assert (site / "bin" / "qakd").is_file()
    for target in ("tensorrt", "onnxruntime", "openvino"):
        assert (tmp_path / f"{target}.onnx").is_file()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        qakd_plugin.nonsense  # noqa: B018


def test_doctests_hold():
    assert doctest.testmod(qakd_plugin.losses, extraglobs={"torch": __import__("torch")}).failed == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # Of a copy: what setuptools leaves in build/ goes into the next wheel, modules that were renamed since among it.
    shutil.copytree(ROOT / "qakd_plugin", source / "qakd_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_data_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qakd_plugin"}
    for needed in ("py.typed", "report/assets/template.html", "report/assets/report.css", "report/assets/report.js"):
        assert f"qakd_plugin/{needed}" in names
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for path in (ROOT / "qakd_plugin").rglob("*.py")}


def test_every_bound_of_what_the_tests_install_becomes_a_pin():
    script = [sys.executable, str(ROOT / ".ci" / "lowest.py")]
    pins = subprocess.run(script, check=True, capture_output=True, text=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = sum(project["optional-dependencies"].values(), project["dependencies"])
    bounds = {
        f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, texts)
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert set(pins) == bounds - {"tensorrt==10.3", "cuda-bindings==12.9"}  # of extras that the tests do not install
    assert {Requirement(text).name for text in texts if ">=" not in text} == {"qakd-plugin", "pycuda", "huggingface_hub"}
