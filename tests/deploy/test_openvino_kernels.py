"""OpenVINO's kernels compute what the file says, to the codes."""

from collections import Counter
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from qdq_graphs import QdqGraph
from torch import nn

import qakd_plugin as qakd
import qakd_plugin.deploy.parity.openvino as gate
from qakd_plugin._common.cpu_features import onednn_adds_products_in_16_bits
from qakd_plugin.deploy.canonical.graph import copied, is_quantized
from qakd_plugin.deploy.parity import openvino as openvino_parity
from qakd_plugin.deploy.targets import openvino_kernels
from qakd_plugin.errors import ParityError
from qakd_plugin.runtimes.onnxruntime import session_options, start_session
from qakd_plugin.runtimes.openvino import OpenVINORunner
from qakd_plugin.toolkits import adapter_for

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(onednn_adds_products_in_16_bits(), reason="sums of integer kernels saturate here")


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


class Joined(nn.Module):
    """Two convolutions of both signs, concatenated and read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.left(x)
        joined: torch.Tensor = self.last(torch.cat([x, self.right(x)], 1))
        return joined


class Shared(nn.Module):
    """Two convolutions without bias, one of them transposed, whose outputs the next one and the sum after that read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2, bias=False)
        self.third, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.up(torch.relu(self.second(torch.relu(x)) + x))
        logits: torch.Tensor = self.head(torch.relu(self.third(torch.relu(x)) + x))
        return logits


class Token(nn.Module):
    """Two convolutions with biases, and a token for each sample beside what they output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patch = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 4, 4)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 24)), nn.Linear(24, 8)
        nn.init.normal_(self.stem.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(torch.relu(self.stem(x))).flatten(2).transpose(1, 2)
        logits: torch.Tensor = self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))
        return logits


class Scaled(nn.Module):
    """Three residual blocks with layer scale, whose factors go below zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 10)
        self.depthwise = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(3))
        self.wide = nn.ModuleList(nn.Conv2d(32, 64, 1) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Conv2d(64, 32, 1) for _ in range(3))
        self.gammas = nn.ParameterList(torch.randn(32, 1, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for depthwise, wide, narrow, gamma in zip(self.depthwise, self.wide, self.narrow, self.gammas, strict=True):
            x = narrow(wide(depthwise(x))) * gamma + x
        return self.head(x.mean((2, 3)))


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
    kinds = [node.op_type for node in onnx.load(file.path).graph.node]
    assert kinds.count("LeakyRelu") == 3
    assert "Round" not in kinds  # written as operators the sum is no longer part of the convolution


class Skipping(nn.Module):
    """A block whose shortcut is a module that changes nothing, after which torch.ao FX has a quantizer again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.branch, self.shortcut = nn.Conv2d(16, 16, 3, padding=1), nn.Identity()
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        logits: torch.Tensor = self.head(torch.relu(self.branch(x) + self.shortcut(x)))
        return logits


def test_a_shortcut_is_not_quantized_once_more(tmp_path):
    sqnr_db, graph = _exported(Skipping(), "torch_ao", tmp_path)
    assert sqnr_db > 50
    sources = {name: node for node in graph.node for name in node.output}
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        source = sources.get(quantize.input[0])
        source = sources.get(source.input[0]) if source is not None and source.op_type == "Clip" else source
        assert source is None or source.op_type != "DequantizeLinear", quantize.name
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 4  # the input, the stem, the branch, the sum


class Pooled(nn.Module):
    """A MaxPool between two convolutions, and a pooling that is flattened for a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()), nn.MaxPool2d(2)
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.flat, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.flat(self.middle(self.pool(self.stem(x)))))
        return logits


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_what_is_pooled_and_flattened_stays_integers(toolkit, tmp_path):
    torch.manual_seed(0)
    sqnr_db, _ = _exported(Pooled(), toolkit, tmp_path)
    assert sqnr_db > 40
    executed = _executed(tmp_path / "student.onnx")
    assert {("Reshape", "u8"), ("Pooling", "u8")} <= executed.keys()
    assert executed["Subgraph", "f32"] == 1  # the quantizer of the input, and nothing after it
    assert not any(kind == "FakeQuantize" or (kind == "Reorder" and precision == "f32") for kind, precision in executed)


def _executed(path: Path) -> Counter[tuple[str, str]]:
    """Operators that OpenVINO runs for a single sample, with the types that they compute in."""
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([1, *(size.get_length() for size in list(model.inputs[0].partial_shape)[1:])])
    graph = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    infos = [node.get_rt_info() for node in graph.get_ops()]
    return Counter((str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in infos)


def _reshaped(path: Path, *, read_twice: bool = False, channels: bool = False, transposed: bool = False) -> Path:
    """A convolution, reshaped, and quantized: by one number or one for each channel; the reshape may have a second reader, and
    a transpose before it."""
    graph = QdqGraph((1, 3, 4, 4))
    x = graph.conv(graph.quantize("input", "in"), "conv", (3, 8))
    x = graph.add("Transpose", [x], "transpose", perm=[0, 1, 3, 2]) if transposed else x
    x = graph.add("Reshape", [x, graph.constant("shape", np.array([1, 8, 16], np.int64))], "reshape")
    clamped = graph.add("Clip", [x, graph.constant("low", np.float32(0)), graph.constant("high", np.float32(1))], "clamp")
    if channels:
        numbers = [graph.constant("scales", np.full(8, 0.02, np.float32)), graph.constant("zeros", np.zeros(8, np.int8))]
        codes = graph.add("QuantizeLinear", [clamped, *numbers], "again/QuantizeLinear", axis=1)
        made = graph.add("DequantizeLinear", [codes, *numbers], "again/DequantizeLinear", axis=1)
    else:
        made = graph.quantize(clamped, "again", 0.02)
    return graph.save(path, graph.add("Add", [made, x], "add") if read_twice else graph.add("Neg", [made], "neg"), rank=3)


def _one_sample(model: ir.Model, shape: tuple[int, ...]) -> np.ndarray:
    x = {"input": np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)}
    return start_session(ir.to_proto(model).SerializeToString(), session_options(fusions=False)).run(None, x)[0]


@pytest.mark.parametrize(
    ("graph", "moves"),
    [({}, True), ({"read_twice": True}, False), ({"channels": True}, False), ({"transposed": True}, False)],
    ids=str,
)
def test_a_quantizer_is_moved_before_a_reshape_of_what_is_computed_for_it_alone(graph, moves, tmp_path):
    model = ir.load(_reshaped(tmp_path / "reshaped.onnx", **graph))
    moved = openvino_kernels.QuantizeBeforeReshape()(copied(model)).model
    kinds = [node.op_type for node in moved.graph]
    assert (kinds.index("Reshape") > kinds.index("Clip")) is moves
    assert np.array_equal(_one_sample(model, (1, 3, 4, 4)), _one_sample(moved, (1, 3, 4, 4)))


def _repeated(path: Path, scale: float, top: int) -> Path:
    """Two tensors on the grid 0.05, clamped at code 100, joined, pooled, split and quantized for a layer up to code ``top``."""
    graph = QdqGraph((1, 4, 4, 4))

    def clamped(x: str, name: str, step: float, highest: int) -> str:
        bounds = [graph.constant(f"{name}.{end}", np.float32(code * step)) for end, code in (("low", 0), ("high", highest))]
        return graph.quantize(graph.add("Clip", [x, *bounds], f"{name}.clamp"), name, step)

    left, right = (clamped(graph.conv("input", name, (4, 4), kernel=1), f"{name}.out", 0.05, 100) for name in ("left", "right"))
    pooled = graph.add("MaxPool", [graph.add("Concat", [left, right], "concat", axis=1)], "pool", kernel_shape=[2, 2])
    graph.add("Split", [pooled], "split", axis=1, num_outputs=2)
    graph.nodes[-1].output.append("other")
    again = clamped("split:out", "again", scale, top)
    return graph.save(path, graph.add("Add", [graph.conv(again, "conv", (4, 4), kernel=1), "other"], "add"), rank=4)


@pytest.mark.parametrize(("scale", "top", "dropped"), [(0.05, 100, True), (0.05, 99, False), (0.06, 100, False)])
def test_a_quantizer_is_dropped_where_its_grid_and_range_are_those_of_all_parts(scale, top, dropped, tmp_path):
    model = ir.load(_repeated(tmp_path / "repeated.onnx", scale, top))
    fewer = openvino_kernels.DropRepeatedQuantizers()(copied(model)).model
    conv = next(node for node in fewer.graph if node.name == "conv/Conv")
    assert sum(node.op_type == "QuantizeLinear" for node in fewer.graph) == (2 if dropped else 3)
    assert is_quantized(conv.inputs[0])
    assert np.array_equal(_one_sample(model, (1, 4, 4, 4)), _one_sample(fewer, (1, 4, 4, 4)))


def _exported(network: nn.Module, toolkit: str, folder: Path) -> tuple[float, onnx.GraphProto]:
    """How close OpenVINO is to ONNX Runtime without fusions, dB, and the file."""
    x = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    student = qakd.prepare(network.eval(), [x], toolkit)
    path = qakd.export_onnx(student, x, folder / "student.onnx", "openvino").path
    expected = start_session(path, session_options(fusions=False)).run(None, {"input": x.numpy()})[0]
    return _sqnr_db(expected, OpenVINORunner(path, 1).run({"input": x.numpy()})["logits"]), onnx.load(path).graph


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e", "torch_ao"])
def test_signed_codes_that_are_concatenated_are_read_as_they_are(toolkit, tmp_path):
    torch.manual_seed(0)
    sqnr_db, graph = _exported(Joined(), toolkit, tmp_path)
    assert sqnr_db > 50  # 4 to 7 where the runtime rounds them to whole numbers
    types = {value.name: value.data_type for value in graph.initializer}
    joined = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[2] == "zero_point_u8_128"]
    assert joined
    assert all(types[node.input[2]] == onnx.TensorProto.UINT8 for node in joined)


def test_all_that_read_a_convolution_without_bias_see_the_same_numbers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    student = mtq.quantize(Shared().eval(), mtq.INT8_DEFAULT_CFG, lambda model: model(x))  # without quantizers at sums
    path = qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino").path
    expected = start_session(path, session_options(fusions=False)).run(None, {"input": x.numpy()})[0]
    assert _sqnr_db(expected, OpenVINORunner(path, 1).run({"input": x.numpy()})["logits"]) > 50
    clamps = [node for node in onnx.load(path).graph.node if "lowest_float32" in node.input]
    assert len(clamps) == 2  # of the first and the transposed one; the others have a bias


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_factors_below_zero_keep_their_sign(toolkit, tmp_path):
    torch.manual_seed(0)
    sqnr_db, _ = _exported(Scaled().eval(), toolkit, tmp_path)
    assert sqnr_db > 40  # below 20 where the runtime takes the factors into scales


class ByHand(nn.Module):
    """A normalization of each channel, written as operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        variance = (x - mean).pow(2).mean((2, 3), keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-2)


class Normalized(nn.Module):
    """A convolution of small numbers, whose variance is next to epsilon, normalized in between."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 16, 3, padding=1), norm, nn.Conv2d(16, 8, 1)
        with torch.no_grad():
            self.stem.weight.mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        logits: torch.Tensor = self.head(self.norm(x + x.roll(1, 1)))
        return logits


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm((16, 24, 24), eps=1e-2), nn.GroupNorm(4, 16, eps=1e-2), nn.InstanceNorm2d(16, eps=1e-2), ByHand()],
    ids=lambda norm: type(norm).__name__,
)
@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_a_normalization_keeps_its_epsilon(norm, toolkit, tmp_path):
    torch.manual_seed(0)
    sqnr_db, _ = _exported(Normalized(norm), toolkit, tmp_path)
    assert sqnr_db > 40  # 10 and less where the runtime takes the scale of what is normalized out, and not out of epsilon


def test_a_bias_counts_for_its_own_channel_where_a_size_is_read(tmp_path):
    torch.manual_seed(0)
    sqnr_db, graph = _exported(Token(), "modelopt", tmp_path)
    assert sqnr_db > 50  # below 25 where all channels have the bias of the first
    assert all(len(node.input) == 2 for node in graph.node if node.op_type == "Conv")


def test_files_without_dynamic_sizes_keep_their_convolutions(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    for student in (
        mtq.quantize(Shared().eval(), mtq.INT8_DEFAULT_CFG, lambda model: model(x)),
        qakd.prepare(Token().eval(), [x]),
    ):
        graph = onnx.load(qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino", dynamic={}).path).graph
        assert not any("lowest_float32" in node.input for node in graph.node)
        assert any(len(node.input) == 3 for node in graph.node if node.op_type == "Conv")


@pytest.mark.parametrize(
    ("reference", "output", "unrounded", "explained"),
    [
        pytest.param([[1.0, 2.0]], [[1.01, 2.0]], [[1.01, 1.99]], True, id="as much as rounding"),
        pytest.param([[1.0, 2.0]], [[1.03, 2.0]], [[1.01, 1.99]], False, id="more than rounding"),
        pytest.param([[1.0, 2.0]], [[1.00001, 2.0]], [[1.0, 2.0]], True, id="float32, no activation is rounded"),
        pytest.param([[1.0, 2.0]], [[1.001, 2.0]], [[1.0, 2.0]], False, id="no activation is rounded"),
        pytest.param([[0.5, 0.5]], [[0.5, np.nextafter(np.float32(0.5), 1)]], [[0.5, 0.5]], True, id="constant"),
        pytest.param([[0.5, 0.5]], [[0.5, 0.51]], [[0.5, 0.5]], False, id="constant but for one"),
        pytest.param([[-np.inf, 2.0]], [[-np.inf, 2.01]], [[-np.inf, 2.01]], True, id="masked"),
        pytest.param([[-np.inf, 2.0]], [[-3e38, 2.0]], [[-np.inf, 2.01]], False, id="mask lost"),
        pytest.param([[1.0, 2.0]], [[np.nan, 2.0]], [[1.1, 2.0]], False, id="NaN"),
        pytest.param([[1.0, 2.0]], [[1.0]], [[1.1, 2.0]], False, id="shape"),
    ],
)
def test_an_output_may_differ_by_what_ties_explain(reference, output, unrounded, explained):
    reference, output, unrounded = (np.asarray(one, np.float32) for one in (reference, output, unrounded))
    assert openvino_parity._explained(reference, output, reference, unrounded) is explained
    assert openvino_parity._explained(-reference, output, reference, unrounded) is False


def test_ties_differ_by_no_more_than_some_draw_of_codes_that_are_rounded_otherwise():
    reference, draws = np.zeros((1, 2), np.float32), [np.full((1, 2), move, np.float32) for move in (0.1, -0.3, 0.2)]
    output = np.full((1, 2), 0.29, np.float32)
    assert openvino_parity._within_draws(reference, output, reference, draws)
    assert not openvino_parity._within_draws(reference, output, reference, draws[:1])
    assert not openvino_parity._within_draws(reference, output[:, :1], reference, draws)


def test_draws_change_codes_as_often_as_independent_rounding_would():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 24, 24)
    student = qakd.prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), [x])
    form = adapter_for(student).export_form(student)
    (quantizer,) = [module for module in openvino_parity._activation_quantizers(form) if module.scale.numel() == 1][:1]
    only = nn.Sequential(quantizer)
    expected = 2 * float(((only(x) - x.clamp(-127 * quantizer.scale, 127 * quantizer.scale)) ** 2).mean())
    for (draw,) in openvino_parity._draws(only, x):
        assert float(((torch.from_numpy(draw) - only(x)) ** 2).mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("differ", "by_rounding", "explained"), [(1, 0, True), (2, 0, False), (4, 2, True), (5, 2, False)])
def test_labels_may_differ_where_rounding_changes_them(differ, by_rounding, explained):
    labels = np.arange(10)
    found, unrounded = (np.where(labels < count, -1, labels) for count in (differ, by_rounding))
    assert openvino_parity._explained(labels, found, labels, unrounded) is explained


@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_an_output_that_is_a_twentieth_off_is_refused(factor, tmp_path, monkeypatch):
    torch.manual_seed(0)
    run = openvino_parity._run
    monkeypatch.setattr(openvino_parity, "_run", lambda *args: [one * np.float32(factor) for one in run(*args)])
    x = torch.randn(4, 3, 24, 24)
    student = qakd.prepare(Residual().eval(), [x], "modelopt")
    if factor == 1:
        assert qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino").parity.openvino.sqnr_db > 30
        return
    with pytest.raises(qakd.ParityError, match=r"signal-to-noise ratio of logits is 2[56]"):
        qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino")


class Shuffle(nn.Module):
    """Two branches, concatenated, shuffled and split; both halves are read."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.middle, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 4, 1)
        nn.init.normal_(self.right.weight)  # another range than the left one's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        kept, read = x.chunk(2, 1)
        logits: torch.Tensor = self.head(torch.cat([kept, torch.relu(self.middle(read))], 1))
        return logits


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_what_is_concatenated_and_shuffled_is_read_as_it_was_rounded(toolkit, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 24, 24)
    student = qakd.prepare(Shuffle().eval(), [x], toolkit)
    file = qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino")
    assert file.parity.openvino.sqnr_db > 50


def test_where_sums_may_saturate_a_difference_is_told_and_no_reason_to_refuse(tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    student = qakd.prepare(Residual().eval(), [x])
    run = gate._run
    monkeypatch.setattr(gate, "_run", lambda file, samples: [-output for output in run(file, samples)])
    with pytest.raises(ParityError, match="OpenVINO computes something else"):
        qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino")
    monkeypatch.setattr(gate, "onednn_adds_products_in_16_bits", lambda: True)
    assert qakd.export_onnx(student, x, tmp_path / "student.onnx", "openvino").parity.openvino.sqnr_db < 0
    assert "This processor has no VNNI" in caplog.text
