"""How ONNX Runtime is started: one set of options, and sums that do not saturate."""

import platform
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import qakd_plugin
from qakd_plugin import export_onnx, prepare
from qakd_plugin._common import cpu_features as cpu
from qakd_plugin.deploy.tuning import eligible_layers, with_weight_zero_point
from qakd_plugin.runtimes import onnxruntime as session
from qakd_plugin.runtimes.onnxruntime import session_options


def _run(path, images):
    """With ONNX Runtime's own options, and on a processor whose sums saturate the one that keeps them from it."""
    options = onnxruntime.SessionOptions()
    if cpu.adds_products_in_16_bits():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options).run(None, {"input": images.numpy()})[0]


def test_all_sessions_have_one_set_of_options_which_changes_no_bit(tmp_path, make_student, digits):
    package = Path(qakd_plugin.__file__).parent
    made = [path.relative_to(package) for path in package.rglob("*.py") if "SessionOptions()" in path.read_text()]
    assert made == [Path("runtimes/onnxruntime.py")]
    images = digits.test[0][:64]
    path = export_onnx(make_student(), images, tmp_path / "s.onnx", target="onnxruntime").path
    for threads in (1, 2):
        options = session_options(threads)
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        (found,) = onnxruntime.InferenceSession(path, options).run(None, {"input": images.numpy()})
        np.testing.assert_array_equal(found, _run(path, images))


class _Twice(nn.Module):
    """A convolution and a linear layer, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.conv(torch.relu(self.conv(torch.relu(self.stem(x))))))
        x = torch.relu(self.hidden(torch.relu(self.hidden(x.mean((2, 3))))))
        return self.head(x)


@pytest.mark.parametrize("flags", [{"avx2", "avx512f"}, {"avx2", "avx_vnni"}, {"avx512_vnni"}, {"asimddp"}, set()])
def test_weights_become_unsigned_where_products_saturate_in_16_bits(flags, monkeypatch):
    """They do on x86 processors without VNNI alone; where the system tells nothing, nothing is done."""
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64" if "asimddp" in flags else "x86_64")
    if flags == {"avx2", "avx512f"}:
        assert session_options().get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):  # it is not set
            session_options().get_session_config_entry("session.x64quantprecision")


@pytest.mark.parametrize(("bits", "storage"), [(8, "int8"), (4, "int4"), (2, "int2")])
@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao"])
def test_a_processor_without_vnni_loads_the_file_and_computes_the_same(
    toolkit, bits, storage, tmp_path, make_student, digits, monkeypatch
):
    images = digits.test[0][:64]
    student = make_student(toolkit, bits)
    path = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime", weight_storage=storage).path
    expected = _run(path, images)
    monkeypatch.setattr(session, "adds_products_in_16_bits", lambda: True)
    (found,) = session.start_session(path, session_options(1)).run(None, {"input": images.numpy()})
    np.testing.assert_array_equal(found, expected)


def test_a_tuned_file_loads_there_as_well(tmp_path, make_student, digits, monkeypatch, caplog):
    images = digits.test[0][:16]
    path = export_onnx(make_student(), images, tmp_path / "s.onnx", target="onnxruntime").path
    model = ir.load(path)
    ir.save(with_weight_zero_point(model, eligible_layers(model)), tmp_path / "tuned.onnx")
    expected = _run(path, images)
    monkeypatch.setattr(session, "adds_products_in_16_bits", lambda: True)
    (found,) = session.start_session(tmp_path / "tuned.onnx", session_options(1)).run(None, {"input": images.numpy()})
    np.testing.assert_array_equal(found, expected)
    assert "share a weight" not in caplog.text


def test_layers_that_share_a_weight_run_there_as_well_and_say_what_that_means(tmp_path, digits, monkeypatch, caplog):
    torch.manual_seed(0)
    images = digits.test[0][:32]
    path = export_onnx(prepare(_Twice().eval(), [images]), images, tmp_path / "s.onnx", target="onnxruntime").path
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"input": images.numpy()})
    monkeypatch.setattr(session, "adds_products_in_16_bits", lambda: True)
    (found,) = session.start_session(path, session_options(1)).run(None, {"input": images.numpy()})
    np.testing.assert_array_equal(found, expected)
    assert "layers share a weight" in caplog.text
    with pytest.raises(Exception, match=r"(?i)model"):  # any other failure is the caller's
        session.start_session(b"no model", session_options(1))
