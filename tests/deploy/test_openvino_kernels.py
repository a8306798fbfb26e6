"""OpenVINO's kernels compute what the file says, to the codes."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qakd_plugin as qakd
from qakd_plugin.runtimes.onnxruntime import session_options, start_session
from qakd_plugin.runtimes.openvino import OpenVINORunner

pytest.importorskip("openvino")


class Residual(nn.Module):
    """A block whose two branches end in convolutions, one whose shortcut is what it reads, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.branch, self.shortcut = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(16, 32, 1, 2)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.branch(x) + self.shortcut(x))
        x = torch.relu(self.second(x) + x)
        logits: torch.Tensor = self.head(x)
        return logits


def _sqnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    expected = expected.astype(np.float64)
    return float(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_a_sum_reads_what_was_rounded(toolkit, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    student = qakd.prepare(Residual().eval(), [x], toolkit)
    file = qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino")
    expected = start_session(file.path, session_options(fusions=False)).run(None, {"input": x.numpy()})[0]
    found = OpenVINORunner(file.path, 1).run({"input": x.numpy()})["logits"]
    assert _sqnr_db(expected, found) > 50  # a few ties; 36 to 40 where the runtime leaves out rounding
    assert sum(node.op_type == "Round" for node in onnx.load(file.path).graph.node) == 2
