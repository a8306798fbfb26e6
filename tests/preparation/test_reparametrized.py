"""Layers that compute their weight: refused by name, and the line that is shown makes them quantizable."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from qakd_plugin import PACT, QakdError, export_onnx, prepare, restore_quantizers, use_quantizers

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CHANGES = {
    "parametrized weight norm": parametrizations.weight_norm,
    "parametrized spectral norm": parametrizations.spectral_norm,
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", CHANGES)
def test_a_computed_weight_is_refused_and_the_shown_line_helps(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    CHANGES[kind](model[2])
    expected = model(IMAGES)
    toolkits = ("modelopt", "torch_ao") if "parametrized" in kind else ("modelopt", "torch_ao", "pt2e")
    for toolkit in toolkits:
        with pytest.raises(QakdError, match=r"model: 2 \(.*Conv2d\) computes its weight by .* Make it a parameter") as caught:
            prepare(model, [IMAGES], toolkit)
    line = re.search(r"before prepare: (.*)$", str(caught.value))[1]
    exec(line, {"torch": torch, "model": model})
    torch.testing.assert_close(model(IMAGES), expected)
    student = prepare(model, [IMAGES])
    assert (student(IMAGES) - expected).abs().max() < 0.02 * expected.abs().max()


def test_pt2e_quantizes_a_computed_weight_but_nothing_is_left_in_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.Flatten()).eval()
    student = prepare(model, [IMAGES], "pt2e")
    assert (student(IMAGES) - model(IMAGES)).abs().max() < 0.02 * model(IMAGES).abs().max()
    use_quantizers(student, PACT())
    assert export_onnx(student, IMAGES, tmp_path / "s.onnx").parity.weight_codes == 24 * 9 + 64 * 9
    with pytest.raises(QakdError, match="this weight is computed from others"):
        restore_quantizers(student)


def test_pt2e_names_a_grouped_transposed_convolution_with_batch_norm(tmp_path):
    def net(*norm):
        up = nn.ConvTranspose2d(8, 16, 2, 2, groups=2)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), up, *norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    with pytest.raises(QakdError, match=r"2: prepare_qat_pt2e cannot fuse .* with 2 groups"):
        prepare(net(nn.BatchNorm2d(16)), [IMAGES], "pt2e")
    assert export_onnx(prepare(net(), [IMAGES], "pt2e"), IMAGES, tmp_path / "s.onnx").parity.weight_codes
