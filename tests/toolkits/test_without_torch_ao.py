"""torch.ao is deprecated: on the day it goes, students of the other toolkits are distilled and exported as before."""

import subprocess
import sys

import pytest

WITHOUT = """
import importlib.abc, sys, warnings
warnings.simplefilter("ignore")
import torch

import torchvision

# PyTorch, its compiler, torchvision and torchao still import torch.ao.quantization themselves: what they need they have by now.
# From here on nobody gets it, neither by an import nor as an attribute.
{imports}


class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch.ao.quantization"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


for name in [name for name in sys.modules if name.startswith("torch.ao.quantization")]:
    sys.modules[name] = None
del torch.ao.quantization
sys.meta_path.insert(0, Gone())

import qakd_plugin as qakd

torch.manual_seed(0)
float_model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
).eval()
x = torch.rand(16, 1, 8, 8)
{student}
try:
    qakd.prepare(float_model, [x], "torch_ao")
except qakd.MissingPackageError as error:
    assert "toolkit='torch_ao' needs torch.ao.quantization" in str(error), error
else:
    raise AssertionError("torch.ao.quantization was imported after all")
"""

TRAINED = """
student = qakd.use_quantizers(qakd.prepare(float_model, [x], {toolkit!r}), qakd.LSQ())
result = qakd.distill(student, float_model, [x], epochs=1)
assert qakd.export_onnx(result.model, x, sys.argv[1]).parity.runtime_deviation < 1e-4
"""


@pytest.mark.parametrize(
    ("toolkit", "imports"),
    [
        ("modelopt", "import modelopt.torch.quantization"),  # which loads PyTorch's compiler
        ("pt2e", "import torchao.quantization.pt2e.quantize_pt2e"),
        pytest.param("torchao", "import torchao.quantization.qat", marks=pytest.mark.matrix),
    ],
)
def test_other_toolkits_need_no_torch_ao(toolkit, imports, tmp_path):
    code = WITHOUT.format(imports=imports, student=TRAINED.format(toolkit=toolkit))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.onnx")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "s.onnx").stat().st_size > 0
