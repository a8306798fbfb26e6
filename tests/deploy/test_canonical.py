"""The canonical form: each pass computes the same numbers as the graph that it changes."""

import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from qakd_plugin import ExportError, export_float, export_onnx, prepare
from qakd_plugin.deploy.canonical import write
from qakd_plugin.deploy.canonical.batch_norm import FoldBatchNorm
from qakd_plugin.deploy.canonical.clamps import MergeClips, QuantizeAfterRelu
from qakd_plugin.deploy.canonical.graph import DOMAIN, WEIGHT_KEY, constant, copied, initializer, weight_dequantizers
from qakd_plugin.deploy.canonical.int4 import PackInt4
from qakd_plugin.deploy.canonical.opset import RaiseOpset
from qakd_plugin.deploy.canonical.quantizers import CarryThroughMaxPool, MergeEqualQuantizers
from qakd_plugin.deploy.canonical.sign_analysis import non_negative_values
from qakd_plugin.deploy.canonical.write import canonicalize, export_canonical, to_proto
from qakd_plugin.deploy.targets.float16 import to_float16
from qakd_plugin.deploy.targets.onnxruntime import to_onnxruntime_form
from qakd_plugin.deploy.targets.openvino import to_openvino_form
from qakd_plugin.deploy.targets.tensorrt import to_tensorrt_form
from qakd_plugin.export_form.tracing import trace
from qakd_plugin.toolkits import adapter_for


def parsed(text: str, **arrays: np.ndarray) -> ir.Model:
    """A model from ONNX's text format, with more initializers."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.serde.deserialize_model(model)
    for index, node in enumerate(model.graph):
        node.name = f"{node.outputs[0].name}_{index}"
    return model


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options).run(None, {"input": x})


def statistics(seed: int, channels: int = 4) -> dict[str, np.ndarray]:
    """gamma of both signs and a zero, beta, mean and variance of a BatchNorm."""
    random = np.random.default_rng(seed)
    gamma, beta, mean = (random.uniform(-2, 2, channels).astype(np.float32) for _ in range(3))
    gamma[:2] = -abs(gamma[0]), 0
    return {"g": gamma, "b": beta, "m": mean, "v": random.uniform(0.1, 2, channels).astype(np.float32)}


def folds_to(numbers: dict[str, np.ndarray], bias: np.ndarray | float, eps: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """The reference, in float64: with which factor and bias a BatchNorm goes into the convolution before it."""
    gamma, beta, mean, variance = (numbers[key].astype(np.float64) for key in "gbmv")
    factor = gamma / np.sqrt(variance + eps)
    return factor, beta + (bias - mean) * factor


CODES = np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)


@pytest.mark.parametrize("scale", [np.float32(0.02), np.linspace(0.01, 0.04, 4, dtype=np.float32)], ids=["tensor", "channel"])
@pytest.mark.parametrize("bias", [None, np.linspace(-1, 1, 4, dtype=np.float32)], ids=["no bias", "bias"])
def test_a_fold_is_float64_arithmetic(scale, bias):
    numbers = statistics(1)
    model = parsed(
        f"""<ir_version: 10, opset_import: ["" : 20]> graph (float[N, 3, 2, 2] input) => (float[N, 4, 2, 2] y) {{
            w = DequantizeLinear<axis = 0>(q, s)
            c = Conv({"input, w" if bias is None else "input, w, bias"})
            y = BatchNormalization(c, g, b, m, v)
        }}""",
        q=CODES, s=np.asarray(scale), **numbers, **({} if bias is None else {"bias": bias}),
    )  # fmt: skip
    assert FoldBatchNorm()(model).modified
    dequantize, conv = model.graph
    codes, folded_scale, folded_bias = constant(dequantize.inputs[0]), constant(dequantize.inputs[1]), constant(conv.inputs[2])
    factor, expected_bias = folds_to(numbers, 0.0 if bias is None else bias.astype(np.float64))
    weight = CODES.astype(np.float64) * np.asarray(scale, np.float64).reshape(-1, *[1] * (3 * np.ndim(scale)))
    column = (-1, 1, 1, 1)
    np.testing.assert_allclose(
        codes * folded_scale.astype(np.float64).reshape(column), weight * factor.reshape(column), rtol=1e-7
    )
    np.testing.assert_allclose(folded_bias, expected_bias, rtol=1e-6)
    np.testing.assert_array_equal(codes, CODES * np.sign(factor).astype(np.int8).reshape(column))
    assert (folded_scale > 0).all()


class Normalized(nn.Module):
    """A convolution with a bias, and its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e"])
def test_every_toolkits_batch_norm_becomes_the_same_bias_and_weight(toolkit):
    """ModelOpt's is folded in the ONNX graph, torch.ao's and PT2E's by their adapters: one reference for all."""
    torch.manual_seed(0)
    images, model = torch.rand(16, 1, 16, 16), Normalized().train()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([-1.3, 0.7, 1.1, -0.4]))
        model.norm.bias.uniform_(-1, 1)
        for _ in range(30):
            model(images)
    norm = model.eval().norm
    numbers = {"g": norm.weight, "b": norm.bias, "m": norm.running_mean, "v": norm.running_var}
    factor, bias = folds_to(
        {key: value.detach().numpy() for key, value in numbers.items()}, model.conv.bias.detach().double().numpy()
    )
    student = prepare(model, [images], toolkit)
    canonical = export_canonical(adapter_for(student).export_form(student), images)
    conv = next(node for node in canonical.graph if node.op_type == "Conv")
    codes, scale = (constant(value) for value in conv.inputs[1].producer().inputs[:2])
    np.testing.assert_allclose(constant(conv.inputs[2]), bias, rtol=1e-5, atol=1e-6)
    column = (-1, 1, 1, 1)
    expected = model.conv.weight.detach().double().numpy() * factor.reshape(column)
    steps = (codes * scale.astype(np.float64).reshape(column) - expected) / scale.reshape(column)
    assert np.abs(steps).max() < 0.51
    assert np.abs(codes).max() > 100


@pytest.mark.parametrize(
    "weights",
    ["w1 = DequantizeLinear<axis = 0>(q, s) w2 = DequantizeLinear<axis = 0>(q, s)", "w1 = DequantizeLinear<axis = 0>(q, s)"],
    ids=["two dequantizers", "merged by the exporter"],
)
def test_convolutions_that_share_a_weight_keep_their_own_batch_norms(weights):
    second = {f"{key}2": array for key, array in statistics(2).items()}
    model = parsed(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        graph (float[N, 3, 2, 2] input) => (float[N, 4, 2, 2] y, float[N, 4, 2, 2] z) {{
            {weights}
            c1 = Conv(input, w1)
            y = BatchNormalization(c1, g, b, m, v)
            c2 = Conv(input, {"w2" if "w2" in weights else "w1"})
            z = BatchNormalization(c2, g2, b2, m2, v2)
        }}""",
        q=CODES, s=np.linspace(0.01, 0.04, 4, dtype=np.float32), **statistics(1), **second,
    )  # fmt: skip
    for node in weight_dequantizers(model.graph):
        node.metadata_props[WEIGHT_KEY] = "shared.weight"
    x = np.random.default_rng(3).normal(size=(5, 3, 2, 2)).astype(np.float32)
    expected = run(model, x)
    FoldBatchNorm()(model)
    assert [node.op_type for node in model.graph].count("Conv") == 2
    assert "BatchNormalization" not in {node.op_type for node in model.graph}
    assert [node.metadata_props[WEIGHT_KEY] for node in weight_dequantizers(model.graph)] == ["shared.weight"] * 2
    for got, wanted in zip(run(model, x), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


LAYERS = {
    "transposed": ((3, 4, 2, 2), 1, "float[N, 3, 2, 2]", "float[N, 4, 3, 3]", "ConvTranspose(input, w)"),
    "linear": ((4, 3), 0, "float[N, 3]", "float[N, 4]", "Gemm<transB = 1>(input, w, bias)"),
    "linear, [K, N]": ((3, 4), 1, "float[N, 3]", "float[N, 4]", "Gemm(input, w)"),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_fold_into_any_layer_changes_nothing(kind, per_channel):
    shape, axis, inputs, outputs, layer = LAYERS[kind]
    bias = {"bias": np.linspace(-1, 1, 4, dtype=np.float32)} if "bias" in layer else {}
    model = parsed(
        f"""<ir_version: 10, opset_import: ["" : 20]> graph ({inputs} input) => ({outputs} y) {{
            w = DequantizeLinear<axis = {axis}>(q, s)
            c = {layer}
            y = BatchNormalization(c, g, b, m, v)
        }}""",
        q=np.random.default_rng(4).integers(-127, 128, shape).astype(np.int8),
        s=np.linspace(0.01, 0.04, 4, dtype=np.float32) if per_channel else np.asarray(0.02, np.float32),
        **statistics(1), **bias,
    )  # fmt: skip
    x = np.random.default_rng(3).normal(size=(5, 3, 2, 2) if "transposed" in kind else (5, 3)).astype(np.float32)
    expected = run(model, x)
    assert FoldBatchNorm()(model).modified
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", layer.partition("(")[0].partition("<")[0]]
    np.testing.assert_allclose(run(model, x)[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("group", "axis"), [(2, 1), (1, 0)])
def test_a_batch_norm_that_no_scale_can_hold_stays_and_is_told(group, axis, caplog):
    """Scales of input channels, and of groups that share them, are not one per output channel."""
    model = parsed(
        f"""<ir_version: 10, opset_import: ["" : 20]> graph (float[N, 4, 2, 2] input) => (float[N, 4, 3, 3] y) {{
            w = DequantizeLinear<axis = {axis}>(q, s)
            c = ConvTranspose<group = {group}>(input, w)
            y = BatchNormalization(c, g, b, m, v)
        }}""",
        q=np.ones((4, 4 // group, 2, 2), np.int8),
        s=np.linspace(0.01, 0.04, 4 if axis == 0 else 4 // group, dtype=np.float32), **statistics(1),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert not FoldBatchNorm()(model).modified
    assert "c_1: BatchNorm stays in the graph: its factors are one per output channel" in caplog.messages[0]


@pytest.mark.parametrize(
    ("codes", "more", "reason"),
    [
        (np.full_like(CODES, -128), "", "code of -128"),
        (CODES, "n = ReduceSum(c)", "something else reads the layer's output"),
    ],
)
def test_a_batch_norm_that_stays_is_told_by_the_name_of_its_layer(codes, more, reason, caplog):
    model = parsed(
        f"""<ir_version: 10, opset_import: ["" : 20]> graph (float[N, 3, 2, 2] input) => (float[N, 4, 2, 2] y) {{
            w = DequantizeLinear<axis = 0>(q, s)
            c = Conv(input, w)
            {more}
            y = BatchNormalization(c, g, b, m, v)
        }}""",
        q=codes, s=np.linspace(0.01, 0.04, 4, dtype=np.float32), **statistics(1),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert not FoldBatchNorm()(model).modified
    assert caplog.messages[0].startswith("c_1: BatchNorm stays in the graph")
    assert reason in caplog.messages[0]


class Twice(nn.Module):
    """One convolution, called twice, each call with a BatchNorm of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.first(self.conv(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.second(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "openvino"])
def test_a_convolution_with_two_batch_norms_is_exported_exactly_in_integers(target, tmp_path):
    torch.manual_seed(0)
    images, model = torch.rand(16, 1, 16, 16), Twice().train()
    with torch.no_grad():
        for norm in (model.first, model.second):
            norm.weight.uniform_(-1.5, 1.5)
        for _ in range(20):
            model(images)
    student = prepare(model.eval(), [images])
    exported = export_onnx(student, images, tmp_path / "s.onnx", target)
    assert exported.parity.runtime_deviation < 1e-4
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(exported.path).graph.node}


# -- one graph, many passes


def test_an_initializer_is_never_taken_for_another_of_its_name():
    graph = parsed('<ir_version: 10, opset_import: ["" : 20]> graph (float[N] input) => (float[N] y) { y = Relu(input) }').graph
    first = initializer(graph, "a", np.float32([1, 2]))
    assert initializer(graph, "a", np.float32([1, 2])) is first
    others = [initializer(graph, "a", array) for array in (np.float32([1, 3]), np.float32([[1, 2]]), np.int8([1, 2]))]
    assert [value.name for value in others] == ["a#1", "a#2", "a#3"]
    assert initializer(graph, "a", np.float32([1, 3])) is others[0]


class Pooled(nn.Module):
    """Something for every pass: BatchNorm, ReLU6, a pooling, two readers of one tensor, a linear layer in floating point."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.left, self.right, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.pool(nn.functional.relu6(self.norm(self.conv(x))))
        return self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def pooled():
    torch.manual_seed(0)
    images, model = torch.rand(16, 1, 16, 16), Pooled().train()
    with torch.no_grad():
        for _ in range(20):
            model(images)
    student = prepare(model.eval(), [images], weight_bits=4, activation_bits=4)
    return write._export(trace(adapter_for(student).export_form(student), images)), images.numpy()


OPTIONAL = [FoldBatchNorm, QuantizeAfterRelu, MergeClips, CarryThroughMaxPool, MergeEqualQuantizers, PackInt4, RaiseOpset]


@pytest.mark.parametrize("skipped", OPTIONAL, ids=lambda one: one.__name__)
def test_a_pass_can_be_left_out_and_the_numbers_stay(skipped, pooled):
    exported, images = pooled
    whole, without = canonicalize(copied(exported)), canonicalize(copied(exported), without={skipped})
    expected, got = run(whole, images)[0], run(without, images)[0]
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.ptp(expected))
    if skipped in {FoldBatchNorm, QuantizeAfterRelu, MergeEqualQuantizers}:
        assert [node.op_type for node in without.graph] != [node.op_type for node in whole.graph]


@pytest.mark.parametrize(
    ("rewrite", "body", "left"),
    [
        (MergeClips, "a = Relu(input) b = Clip(a, low, high) y = Clip(b, low)", ["Clip"]),
        (MergeClips, "a = Relu(input) b = Clip(a, low, high) y = Add(a, b)", ["Relu", "Clip", "Add"]),
        (
            CarryThroughMaxPool,
            "q = QuantizeLinear(input, s) d = DequantizeLinear(q, s) m = MaxPool<kernel_shape = [2]>(d) y = Relu(m)",
            ["QuantizeLinear", "DequantizeLinear", "MaxPool", "QuantizeLinear", "DequantizeLinear", "Relu"],
        ),
    ],
)
def test_clips_are_merged_and_quantizers_carried_with_the_same_numbers(rewrite, body, left):
    model = parsed(
        f"""<ir_version: 10, opset_import: ["" : 20]> graph (float[1, 2, 8] input) => (float[A, B, C] y)
        <float low = {{-1.0}}, float high = {{0.7}}, float s = {{0.01}}> {{ {body} }}"""
    )
    x = np.random.default_rng(0).normal(size=(1, 2, 8)).astype(np.float32)
    expected = run(model, x)[0]
    assert rewrite()(model).modified == (len(left) != 3)
    assert [node.op_type for node in model.graph] == left
    np.testing.assert_array_equal(run(model, x)[0], expected)


def test_a_form_for_a_target_leaves_the_canonical_model_as_it_was(pooled):
    canonical = canonicalize(copied(pooled[0]))
    before = to_proto(canonical).SerializeToString()
    for change in (to_tensorrt_form, to_onnxruntime_form, to_openvino_form, to_float16, copied):
        assert change(canonical) is not canonical
        assert to_proto(canonical).SerializeToString() == before, change.__name__


def test_what_cannot_be_negative_is_found_through_sums_and_shapes():
    model = parsed(
        """<ir_version: 10, opset_import: ["" : 20]> graph (float[2, 3] input) => (float[N, M] y)
        <float low = {-1.0}, float zero = {0.0}, float[1] up = {0.5}, float[1] down = {-0.5}, int64[2] shape = {3, 2}> {
            a = Relu(input)
            b = Reshape(a, shape)
            c = Add(b, up)
            d = Add(b, down)
            e = Clip(input, zero)
            f = Clip(input, low)
            g = Mul(a, input)
            h = Clip(a, low)
            y = Identity(g)
        }"""
    )
    assert {value.name for value in non_negative_values(model.graph)} == {"a", "b", "c", "e", "h"}


# -- what cannot be written is told in one line


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_computed_scale_is_refused_by_the_name_of_its_quantizer():
    model = parsed('<ir_version: 10, opset_import: ["" : 20]> graph (float[N] input) => (float[N] y) { y = Relu(input) }')
    (relu,) = model.graph
    computed = ir.node("ReduceMax", [relu.inputs[0]], name="max")
    computed.outputs[0].name = "max:out"
    carrier = ir.node("QDQ", [relu.inputs[0], computed.outputs[0]], {"name": "conv.input"}, domain=DOMAIN)
    carrier.outputs[0].name = "carried"
    model.graph.insert_before(relu, [computed, carrier])
    relu.replace_input_with(0, carrier.outputs[0])
    with pytest.raises(ExportError) as caught:
        canonicalize(model)
    assert "conv.input: its scale is computed by the graph" in one_line(caught)


def test_what_onnx_does_not_know_is_told_in_one_line(pooled):
    model = canonicalize(copied(pooled[0]))
    next(node for node in model.graph if node.op_type == "Conv").op_type = "Konv"
    with pytest.raises(ExportError, match=r"^the model cannot be written as ONNX: .*Konv") as caught:
        to_proto(model)
    assert "conv/Conv" in one_line(caught)


def test_what_is_larger_than_a_file_may_be_is_told_with_its_largest_tensor(monkeypatch, tmp_path):
    monkeypatch.setattr(write, "_LARGEST_FILE", 1000)
    with pytest.raises(ExportError, match=r"^the model takes .* GiB.* its largest tensor is right\.weight") as caught:
        export_float(Pooled(), torch.rand(2, 1, 16, 16), tmp_path / "net.onnx")
    one_line(caught)
    assert not list(tmp_path.iterdir())


def test_constants_that_the_exporter_left_out_of_its_file_are_stored():
    text = '<ir_version: 10, opset_import: ["": 21]> agraph (float[4] x) => (float[4] y) { y = Clip(x, low, high) }'
    model = parsed(text, low=np.float32(-1), high=np.float32(0.5))
    whole = to_proto(copied(model)).SerializeToString()
    for name in ("low", "high"):
        model.graph.initializers.pop(name)
    write._store_constants(model.graph)
    assert to_proto(model).SerializeToString() == whole
