"""A convolution of blocks of pixels is the same convolution, for every kernel and padding."""

import numpy as np
import onnx_ir as ir
import pytest
from qdq_graphs import UINT8, QdqGraph

from qakd_plugin import tune_for_host
from qakd_plugin.deploy.canonical.graph import read_onnx
from qakd_plugin.deploy.tuning.search import Search
from qakd_plugin.deploy.tuning.space_to_depth import blockable_layers, in_blocks
from qakd_plugin.deploy.tuning.timing import Variants


def _stem(folder, kernel=3, pads=(1, 1, 1, 1), sizes=(16, 12), channels=3, stride=2, group=1):
    graph = QdqGraph(("batch", channels, *sizes))
    x = graph.quantize("input", "in", scale=0.5, zero_point=128, dtype=UINT8)
    x = graph.conv(x, "stem", (channels, 12), kernel=kernel, stride=stride, group=group)
    x = graph.quantize(x, "out", scale=2.0, zero_point=128, dtype=UINT8)
    path = graph.save(folder / "s.onnx", x, rank=4)
    model = read_onnx(path)
    next(node for node in model.graph if node.op_type == "Conv").attributes.add(ir.AttrInt64s("pads", list(pads)))
    ir.save(model, path)
    return path


def _outputs(path, model, sizes, channels=3):
    variants = Variants(path, "onnxruntime", 1)
    batch = {"input": np.random.default_rng(0).normal(size=(3, channels, *sizes)).astype(np.float32) * 20}
    return [variants.as_it_says(variants.serialized(model), [batch], fusions=fused)[0][0] for fused in (False, True)]


@pytest.mark.parametrize(
    ("kernel", "pads"),
    [(2, (0, 0, 0, 0)), (3, (1, 1, 1, 1)), (3, (0, 1, 0, 1)), (4, (1, 1, 1, 1)), (5, (2, 2, 2, 2)), (7, (3, 3, 3, 3))],
)
def test_blocks_compute_the_same_convolution(kernel, pads, tmp_path):
    sizes = (16, 12)
    path = _stem(tmp_path, kernel, pads, sizes)
    model = read_onnx(path)
    assert blockable_layers(model) == ("stem/Conv",)
    changed = in_blocks(model, blockable_layers(model))
    conv = next(node for node in changed.graph if node.op_type == "Conv")
    assert list(conv.attributes.get_ints("strides")) == [1, 1]
    (plain, fused), (blocks, fused_blocks) = (_outputs(path, one, sizes) for one in (model, changed))
    assert len(np.unique(plain)) > 20
    np.testing.assert_array_equal(fused_blocks, fused)
    assert np.mean(blocks != plain) < 0.01  # floats are added in another order: ties alone
    assert np.abs(blocks - plain).max() <= 2.0


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (15, 12)},
        {"sizes": ("height", "width")},
        {"channels": 8},
        {"stride": 1},
        {"group": 3},
        {"kernel": 1, "pads": (0, 0, 0, 0)},
    ],
)
def test_others_are_left_alone(options, tmp_path):
    assert blockable_layers(read_onnx(_stem(tmp_path, **options))) == ()


def test_a_stem_in_blocks_is_kept_where_it_gains(tmp_path, monkeypatch):
    path = _stem(tmp_path, sizes=(16, 16))
    monkeypatch.setattr(Search, "_times", lambda self, choices, calls: [1 - 0.1 * bool(choice.blocked) for choice in choices])
    tuning = tune_for_host(path, tmp_path / "t.onnx", exact=True)
    assert tuning.blocked == ("stem/Conv",)
    assert tuning.proof.same_bits
    assert any(node.op_type == "SpaceToDepth" for node in read_onnx(tmp_path / "t.onnx").graph)
    (_, fused), (_, tuned) = (_outputs(one, read_onnx(one), (16, 16)) for one in (path, tmp_path / "t.onnx"))
    np.testing.assert_array_equal(tuned, fused)
