"""ONNX Runtime: what is concatenated, shuffled and split on one grid stays integers, and is the same bits."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from qdq_graphs import UINT8, QdqGraph
from torch import nn

from qakd_plugin import LSQ, QAT, distill, export_onnx, prepare, use_quantizers
from qakd_plugin.bench.census import optimized_nodes
from qakd_plugin.deploy.targets.onnxruntime_moves import move_codes
from qakd_plugin.runtimes.onnxruntime import session_options, start_session
from qakd_plugin.toolkits import adapter_for


class Shuffle(nn.Module):
    """Two units of ShuffleNet: branches are concatenated, shuffled and split, and one half passes by the next unit's branch."""

    def __init__(self) -> None:
        super().__init__()

        def conv(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

        self.stem, self.left, self.right, self.second = conv(3), conv(8), conv(8), conv(8)
        self.last, self.head = conv(16), nn.Linear(8, 4)
        nn.init.normal_(self.right[1].weight)  # another range than the left one's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self._shuffled(torch.cat([self.left(x), self.right(x)], 1))
        kept, read = x.chunk(2, 1)
        x = self._shuffled(torch.cat([kept, self.second(read)], 1))
        logits: torch.Tensor = self.head(self.last(x).mean([2, 3]))
        return logits

    @staticmethod
    def _shuffled(x: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = x.shape
        return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


@pytest.fixture(scope="module")
def shuffle():
    torch.manual_seed(0)
    images, model = torch.rand(16, 3, 12, 12), Shuffle().train()
    with torch.no_grad():
        for _ in range(10):
            model(images)
    return model.eval(), images


@pytest.mark.parametrize(("toolkit", "target"), [("pt2e", "tensorrt"), ("torch_ao", "onnxruntime"), ("modelopt", "tensorrt")])
def test_a_channel_shuffle_moves_codes_alone(toolkit, target, shuffle, tmp_path):
    model, images = shuffle
    exported = export_onnx(prepare(model, [images], toolkit, target=target), images, tmp_path / "s.onnx", target="onnxruntime")
    kinds = [node.op_type for node in optimized_nodes(exported)]
    assert kinds.count("QLinearConv") == 5
    assert kinds.count("Concat") == 2
    assert kinds.count("QuantizeLinear") <= 2  # of the input, and after the mean over positions
    assert kinds.count("DequantizeLinear") <= 2
    assert "QLinearConcat" not in kinds
    nodes = onnx.load(exported.path).graph.node
    made = {output: node.op_type for node in nodes for output in node.output}
    assert not any(node.op_type == "Clip" and made.get(node.input[0]) in {"Clip", "Concat", "Split"} for node in nodes)


def test_parts_of_a_concatenation_learn_one_range(shuffle, tmp_path):
    model, images = shuffle
    student = use_quantizers(prepare(model, [images], "pt2e"), LSQ())
    distill(student, None, [(images, torch.arange(16) % 4)], method=QAT(), epochs=2, seed=0)
    quantizers = [q for q in adapter_for(student).quantizers(student) if q.role == "activation"]
    read = {q.fqn for q in quantizers if set(q.layers) & {"second.0", "last.0"}}
    assert len(read) == 1  # by the half that is split off, and by the last layer: that of all three branches
    assert len(quantizers) == 5  # of the input, the stem, the branches, the last layer and the mean
    exported = export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime")
    assert exported.parity.runtime_deviation < 1e-4
    assert [node.op_type for node in optimized_nodes(exported)].count("Concat") == 2


def test_clips_are_left_where_something_new_may_be_clipped_alone(shuffle, tmp_path):
    model, images = shuffle
    exported = export_onnx(prepare(model, [images], "torch_ao"), images, tmp_path / "s.onnx", target="onnxruntime")
    assert exported.parity.runtime_deviation < 1e-4
    nodes = onnx.load(exported.path).graph.node
    made = {output: node for node in nodes for output in node.output}
    of = [made[node.input[0]] for node in nodes if node.op_type == "Clip"]  # codes of a layer, or on a finer grid
    moved = {"DequantizeLinear", "Reshape", "Transpose", "Split"}
    assert of
    assert all(node.op_type == "QuantizeLinear" and made[node.input[0]].op_type not in moved for node in of)


class Kept(nn.Module):
    """The half of a tensor that is read by a layer which stays in floating point, beside the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()), nn.ReLU()
        self.kept, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).chunk(2, 1)
        result: torch.Tensor = self.last(torch.cat([left, self.relu(self.kept(right))], 1))
        return result


def test_a_layer_that_was_kept_in_floating_point_computes_in_it_after_a_split(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    student = prepare(Kept().eval(), [images], "torch_ao", keep=["kept"])
    exported = export_onnx(student, images, tmp_path / "k.onnx", target="onnxruntime")
    kinds = [node.op_type for node in optimized_nodes(exported)]
    assert kinds.count("QLinearConv") == 1  # the stem: two, where the runtime quantizes the weight of the kept one on its own


def _joined(path: Path, scale: float) -> Path:
    """Two parts, of scales 0.05 and this one, that are concatenated, transposed, quantized again and clipped."""
    graph = QdqGraph((1, 2, 3, 4))
    left, right = (graph.quantize("input", name, one, 128, UINT8) for name, one in (("left", 0.05), ("right", scale)))
    moved = graph.add("Transpose", [graph.add("Concat", [left, right], "concat", axis=1)], "transpose", perm=[0, 2, 1, 3])
    halves = [graph.add("Split", [moved], "split", axis=2, num_outputs=1)]
    return graph.save(path, graph.quantize(halves[0], "again", 0.05, 128, UINT8), rank=4)


@pytest.mark.parametrize("scale", [0.05, 0.04])
def test_codes_are_moved_where_all_parts_lie_on_one_grid_and_nowhere_else(scale, tmp_path):
    model = ir.load(path := _joined(tmp_path / "joined.onnx", scale))
    moved = move_codes(model)
    if scale != 0.05:
        assert moved is model
        return
    kinds = [node.op_type for node in moved.graph]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 1
    x = {"input": np.random.default_rng(0).normal(0, 4, (1, 2, 3, 4)).astype(np.float32)}
    first, second = (
        start_session(one.SerializeToString(), session_options(fusions=False)).run(None, x)[0]
        for one in (onnx.load(path), ir.serde.serialize_model(moved))
    )
    assert np.array_equal(first, second)


class ActivatedBefore(nn.Module):
    """Two convolutions that read the ReLU of one quantized tensor, of both signs, which a third reads as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 3)
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        activated = torch.relu(x)
        pooled: torch.Tensor = self.last(torch.cat([self.left(activated), self.right(activated) + self.right(x)], 1)).amax(
            (2, 3)
        )
        return pooled


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_relu_of_a_quantized_tensor_clips_its_codes(toolkit, target, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12)
    student = prepare(ActivatedBefore().eval(), [images], toolkit, target=target)
    path = export_onnx(student, images, tmp_path / "student.onnx", target="onnxruntime").path
    assert "Relu" not in {node.op_type for node in onnx.load(path).graph.node}
    assert [node.op_type for node in optimized_nodes(path)].count("QLinearConv") == 5
