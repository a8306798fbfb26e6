"""Structures of common networks, each in a small module: exact for every target, in integers wherever there is a weight."""

import copy
import importlib.util
import json

import onnx
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from qakd_plugin import build_engine, describe, export_onnx, prepare
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.canonical.clamps import quantizers_after_relu
from qakd_plugin.deploy.canonical.graph import WEIGHT_KEY, weight_dequantizers
from qakd_plugin.deploy.canonical.write import export_canonical, to_proto
from qakd_plugin.deploy.parity.gate import check_parity
from qakd_plugin.deploy.targets.onnxruntime import to_onnxruntime_form
from qakd_plugin.errors import ExportError, ParityError
from qakd_plugin.export_form.modules import QuantizedModule
from qakd_plugin.placement.attention import OpenAttention, open_attention
from qakd_plugin.placement.placement import place_quantizers
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.toolkits.modelopt import restore_modelopt

RTX = "tensorrt_rtx"


def _conv(inputs, outputs, act=None, **options):
    norm = nn.BatchNorm2d(outputs)
    layers = [nn.Conv2d(inputs, outputs, options.pop("kernel", 1), bias=False, **options), norm]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class _SqueezeExcite(nn.Module):
    def __init__(self, channels, act, gate):
        super().__init__()
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), act(), gate()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return self.gate(self.up(self.act(self.down(self.pool(x))))) * x


class _InvertedResidual(nn.Module):
    """MobileNetV3 with Hardswish and ReLU, EfficientNet with SiLU."""

    def __init__(self, act, squeeze_act, gate):
        super().__init__()
        self.stem = _conv(3, 8, act, kernel=3, stride=2, padding=1)
        self.expand, self.depthwise = _conv(8, 16, act), _conv(16, 16, act, kernel=3, padding=1, groups=16)
        self.squeeze, self.project = _SqueezeExcite(16, squeeze_act, gate), _conv(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.squeeze(self.depthwise(self.expand(x))))
        return self.head(x.mean([2, 3]))


class _Shuffle(nn.Module):
    """ShuffleNet: split, concatenate, shuffle channels, split again."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = _conv(3, 8, nn.ReLU, kernel=3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.first, self.second = _conv(4, 4, nn.ReLU, kernel=3, padding=1), _conv(4, 4, nn.ReLU)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        for branch in (self.first, self.second):
            kept, changed = x.chunk(2, dim=1)
            x = torch.cat([kept, branch(changed)], dim=1)
            batch, channels, height, width = x.shape
            x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(x.mean([2, 3]))


class _Vision(nn.Module):
    """A vision transformer of one block: patches, class token, attention, LayerNorm, GELU."""

    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class _OwnLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class _SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class _NormAct(nn.BatchNorm2d):
    """BatchNorm and activation in one module, as timm writes them."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        torch._assert(x.ndim == 4, "images expected")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class _Foreign(nn.Module):
    """Layers of classes that are not PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = _SamePadding(3, 8, 2, stride=2, bias=False), _NormAct(8, nn.ReLU)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), _NormAct(8, nn.SiLU)
        self.head = _OwnLinear(8, 5)

    def forward(self, x):
        x = self.norm1(self.stem(x))
        return self.head((x + self.norm2(self.conv(x))).mean([2, 3]))


def _ready(model):
    """Random weights, no zeros that would hide an error, BatchNorm statistics that fit; and images."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.normal_(std=0.3)
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
        for _ in range(20):
            model(images)
    return model.eval(), images


def _deploy(student, images, folder):
    """Both forms of one export, exact; the census, and the engine's manifest where TensorRT-RTX is installed."""
    form = adapter_for(student).export_form(student)
    canonical = export_canonical(form, images)
    rewritten = to_onnxruntime_form(canonical)
    for file, fused in ((canonical, False), (rewritten, True)):
        proof = check_parity(file, form, student, images, fused=fused, after_relu=quantizers_after_relu(canonical.graph))
        assert proof.runtime_deviation < 1e-5
        assert proof.toolkit_deviation < 1e-5
    assert not any(node.op_type == "BatchNormalization" for node in canonical.graph)
    (folder / "canonical.onnx").write_bytes(to_proto(canonical).SerializeToString())
    (folder / "ort.onnx").write_bytes(to_proto(rewritten).SerializeToString())
    manifest = None
    if importlib.util.find_spec("tensorrt_rtx_bindings"):
        manifest = build_engine(folder / "canonical.onnx", folder / "net.engine", RTX, capabilities=["SM86"]).manifest
    return census(folder / "ort.onnx"), manifest


STRUCTURES = {
    "hardswish": (lambda: _InvertedResidual(nn.Hardswish, nn.ReLU, nn.Hardsigmoid), 4),
    "silu": (lambda: _InvertedResidual(nn.SiLU, nn.SiLU, nn.Sigmoid), 8),
    "shuffle": (_Shuffle, 4),
    "foreign": (_Foreign, 4),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_layer_computes_in_integers(structure, tmp_path):
    make, bits = STRUCTURES[structure]
    model, images = _ready(make())
    student = prepare(model, [images], "modelopt", weight_bits=bits, activation_bits=bits)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    assert describe(student).weight_quantizers == layers
    counted, manifest = _deploy(student, images, tmp_path)
    assert counted.integer == counted.total == layers, counted.float_layers
    if manifest is not None:
        assert manifest["convolutions"]["int8"] + manifest["matmuls"]["int8"] == layers


def test_a_vision_transformer_computes_all_but_its_two_attention_products_in_integers(tmp_path):
    model, images = _ready(_Vision())
    student = prepare(model, [images], "modelopt", weight_bits=4, activation_bits=4)
    assert isinstance(model.attention, nn.MultiheadAttention)
    counted, manifest = _deploy(student, images, tmp_path)
    assert (counted.integer, counted.total) == (8, 10)  # patches, query, key, value, output, two of the MLP, head
    if manifest is not None:
        floating = [layer for layer in manifest["layers"] if layer["inputs"][0] != "int8"]
        assert len(floating) == 2
        assert all("attention/MatMul" in layer["name"] for layer in floating)


def test_an_encoder_layer_of_pytorch_computes_its_layers_in_integers(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    model, images = _ready(Encoder())
    student = prepare(model, [images], "modelopt")
    assert describe(student).weight_quantizers == 8
    export_onnx(student, images, tmp_path / "s.onnx", target="onnxruntime")
    assert census(tmp_path / "s.onnx").integer == 8


def test_a_bias_that_overflows_the_runtimes_32_bits_gets_room(tmp_path):
    """A channel that BatchNorm has faded out, but for its bias."""
    model, images = _ready(
        nn.Sequential(_conv(3, 8, nn.ReLU), _conv(8, 8, nn.ReLU, kernel=3), nn.Flatten(), nn.Linear(1568, 5))
    )
    for channel, gamma in enumerate((1e-7, -1e-8, 1e-10, 1e-20)):
        model[1][1].weight.data[channel], model[1][1].bias.data[channel] = gamma, 0.5
    student = prepare(model, [images], "modelopt")
    export_onnx(student, images, tmp_path / "ort.onnx", target="onnxruntime")
    assert census(tmp_path / "ort.onnx").integer == 3
    marks = {prop.key: prop.value for node in onnx.load(tmp_path / "ort.onnx").graph.node for prop in node.metadata_props}
    assert [entry.split(":")[0] for entry in marks["qakd.coarse"].split(",")][-2:] == ["2", "3"]


# -- attention


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("own_sizes", [True, False])
@pytest.mark.parametrize("mask", [None, "matrix", "per_head", "bool", "padding"])
def test_opened_attention_computes_what_the_closed_one_does(mask, own_sizes, batch_first, batched):
    torch.manual_seed(0)
    closed = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6 if own_sizes else None, vdim=6 if own_sizes else None)
    nn.init.normal_(closed.in_proj_bias)
    nn.init.normal_(closed.out_proj.bias)
    opened = OpenAttention(closed.eval())
    query, key = torch.randn(3, 5, 8), torch.randn(3, 7, 6 if own_sizes else 8)
    if not batched:
        query, key = query[0], key[0]
    elif not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    options = {
        None: {},
        "matrix": {"attn_mask": torch.randn(5, 7)},
        "per_head": {"attn_mask": torch.randn(6 if batched else 2, 5, 7)},
        "bool": {"attn_mask": torch.arange(7).expand(5, 7) > torch.arange(5)[:, None] + 1},
        "padding": {"key_padding_mask": torch.arange(7).expand(*([3] if batched else []), 7) > 4},
    }[mask]
    for need_weights, average in ((False, True), (True, True), (True, False)):
        options |= {"need_weights": need_weights, "average_attn_weights": average}
        expected, found = closed(query, key, key, **options), opened(query, key, key, **options)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if need_weights:
            torch.testing.assert_close(found[1], expected[1])


def test_attention_is_opened_in_a_copy_once_per_module(caplog):
    shared = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.MultiheadAttention(8, 2, add_zero_attn=True)})
    opened = open_attention(model)
    assert isinstance(opened["a"], OpenAttention)
    assert opened["a"] is opened["b"]
    assert isinstance(opened["c"], nn.MultiheadAttention)
    assert "c: add_bias_kv or add_zero_attn" in caplog.text
    assert model["a"] is shared
    assert isinstance(open_attention(shared), OpenAttention)
    plain = nn.Linear(2, 2)
    assert open_attention(plain) is plain


def test_quantizers_that_never_act_are_exported_as_what_they_do_and_named(tmp_path, caplog):
    import modelopt.torch.quantization as mtq

    model, images = _ready(_Vision())
    student = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda network: network(images))
    assert not any("out_proj" in quantizer.name for quantizer in describe(student).quantizers)
    proof = export_onnx(student, images, tmp_path / "s.onnx").parity
    assert proof.toolkit_deviation < 1e-5
    assert "attention.out_proj: nn.MultiheadAttention reads its weight without calling it" in caplog.text


# -- placement


def test_a_quantizer_stands_between_a_batch_norm_and_an_activation_of_one_module():
    placement = place_quantizers(_Foreign().eval())
    assert [(output.name, output.clamp, output.in_front) for output in placement.outputs] == [
        ("norm1.drop", (0.0, float("inf")), True),
        ("norm2.drop", None, True),
    ]
    assert placement.layers == ("stem", "conv", "head")


def test_layers_that_the_forward_pass_does_not_call_are_named(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.first(x), self.second.weight)

    assert place_quantizers(Tied()).layers == ("first",)
    assert "does not call second" in caplog.text


def test_what_modelopt_quantizes_elsewhere_does_not_change():
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    model, images = _ready(_Foreign())
    prepare(model, [images], "modelopt")
    assert not any(kind in QuantModuleRegistry for kind in (_OwnLinear, _SamePadding, _NormAct, nn.Identity))


@pytest.mark.parametrize("make", [_Foreign, _Vision])
def test_what_modelopt_saved_comes_back(make, tmp_path):
    import modelopt.torch.opt as mto

    model, images = _ready(make())
    student = prepare(model, [images], "modelopt", weight_bits=4)
    mto.save(student, tmp_path / "student.pth")
    restored = restore_modelopt(make().eval(), tmp_path / "student.pth")
    with torch.no_grad():
        assert torch.equal(student(images), restored(images))


# -- real networks


@pytest.mark.parametrize(
    ("name", "bits"), [("mobilenet_v3_small", 4), pytest.param("mobilenetv4_conv_small", 8, marks=pytest.mark.matrix)]
)
def test_every_layer_of_a_real_network_computes_in_integers(name, bits, tmp_path):
    net = next(net for net in zoo.NETS if net.name == name)
    if net.library == "timm":
        pytest.importorskip("timm")
    model, images = zoo.random_weights(net)
    student = prepare(model, [images], "modelopt", weight_bits=bits, activation_bits=bits)
    counted, manifest = _deploy(student, images, tmp_path)
    assert counted.integer == counted.total == describe(student).weight_quantizers
    if manifest is not None:
        assert manifest["convolutions"]["int8"] + manifest["matmuls"]["int8"] == counted.total


class _Windows(nn.Module):
    """Attention within windows: (N, 16, 8) to (N, 10)."""

    def __init__(self, masked=False):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 10)
        self.mask = torch.ones(4, 4).tril().bool() if masked else None

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(-1, 4, 4, 3, 2, 4).permute(3, 0, 4, 1, 2, 5)
        mixed = F.scaled_dot_product_attention(q, k, v, self.mask)  # (N, heads, windows, places, 4)
        return self.head(mixed.permute(0, 2, 3, 1, 4).reshape(-1, 16, 8).mean(1))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_within_windows_is_exact_for_every_target(masked, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randn(4, 16, 8)
    student = prepare(_Windows(masked).eval(), [tokens])
    for target in ("tensorrt", "onnxruntime", "openvino"):
        file = export_onnx(student, tokens, tmp_path / f"{target}.onnx", target)
        assert file.parity.toolkit_deviation < 1e-6


class _Table(nn.Module):
    """Adds a bias that a small network makes of a table, as Swin v2 does: (N, 8) to (N, 10)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(6, 2))
        self.bias, self.mix, self.head = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        rows = self.table[None].expand(x.shape[0], -1, -1)
        return self.head(self.mix(x) + self.bias(rows).mean(1))


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_layers_that_read_constants_stay_in_floating_point_and_are_named(toolkit, tmp_path, caplog):
    torch.manual_seed(0)
    inputs = torch.randn(4, 8)
    student = prepare(_Table().eval(), [inputs], toolkit)
    quantized = {name for q in adapter_for(student).quantizers(student) if q.role == "weight" for name in q.layers}
    assert quantized == {"mix", "head"}
    assert "bias: what they read does not depend on the input" in caplog.text
    for target in ("tensorrt", "onnxruntime"):
        assert export_onnx(student, inputs, tmp_path / "x.onnx", target).parity.toolkit_deviation < 1e-6


class _Unused(nn.Module):
    """A head whose result the network drops, as SigLIP's classifier does with its pooling head: (N, 8) to (N, 5)."""

    def __init__(self):
        super().__init__()
        self.mix, self.pool, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.mix(x)
        self.pool(x)
        return self.head(x)


def test_layers_that_no_output_depends_on_are_not_in_the_file_and_named(tmp_path, caplog):
    torch.manual_seed(0)
    inputs = torch.randn(4, 8)
    student = prepare(_Unused().eval(), [inputs])
    file = export_onnx(student, inputs, tmp_path / "x.onnx")
    assert "pool: no output depends on these layers" in caplog.text
    assert file.parity.weight_codes == 8 * 8 + 8 * 5
    assert not any("pool" in tensor.name for tensor in onnx.load(file).graph.initializer)


def test_a_layer_that_a_file_lost_is_refused():
    torch.manual_seed(0)
    inputs = torch.randn(4, 8)
    student = prepare(_Unused().eval(), [inputs])
    adapter = adapter_for(student)
    form = adapter.export_form(student)
    canonical = export_canonical(form, inputs)
    for node in weight_dequantizers(canonical.graph):
        if node.metadata_props[WEIGHT_KEY].startswith("mix"):
            node.metadata_props[WEIGHT_KEY] = "of no layer"
    with pytest.raises(ParityError, match=r"^mix: its stored weight is missing in the file"):
        check_parity(canonical, form, student, inputs, fused=False)


class _Standardized(nn.Conv2d):
    """Weight standardization as timm writes it: a BatchNorm of the weight, without statistics."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


def test_pt2e_takes_weight_standardization():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    network = nn.Sequential(_Standardized(3, 8, 3), nn.ReLU(), _conv(8, 8), nn.Flatten(), nn.Linear(288, 5)).eval()
    assert describe(prepare(network, [images], "pt2e")).weight_quantizers == 3


def test_a_module_between_quantizers_answers_as_itself():
    layer = nn.Conv2d(2, 3, 1, stride=2)
    module = copy.deepcopy(QuantizedModule(layer, None, None))
    assert (module.weight.dtype, module.stride) == (torch.float32, (2, 2))  # what XCiT's positional encoding asks for
    with pytest.raises(AttributeError, match="'Conv2d' object has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_the_zoo_holds_a_network_of_every_family_of_timm():
    families = pytest.importorskip("timm.models").list_modules()
    assert sorted(net.family for net in zoo.NETS if net.family) == sorted(families)
    assert sum(net.library == "transformers" for net in zoo.NETS) >= 20


def test_only_cells_of_the_zoo_are_committed():
    cells = json.loads(zoo.RESULTS.read_text())["cells"]
    assert cells
    assert set(cells) <= {cell.key(net) for net in zoo.NETS for cell in zoo.CELLS}


def test_a_cell_that_is_done_is_not_run_again(tmp_path, monkeypatch):
    ran = []

    def run(net, todo, keep):
        ran.extend(cell.key(net) for cell in todo)
        for cell in todo:
            problem = {"step": "prepare", "own": True, "message": "nothing was tried"}
            keep(cell.key(net), {"problem": problem, "problems": [problem], "times": {"prepare": 1.0}})

    monkeypatch.setattr(zoo, "run_network", run)
    command = ["zoo.py", "--network", "resnet18", "--out", str(tmp_path / "zoo.json")]
    monkeypatch.setattr("sys.argv", command)
    zoo.main()
    assert ran == [f"torchvision/resnet18 {toolkit} W{n}A{n}" for toolkit in ("modelopt", "pt2e") for n in (8, 4)] + [
        "torchvision/resnet18 modelopt W8A8 as made"
    ]
    zoo.main()
    assert len(ran) == 5
    monkeypatch.setattr("sys.argv", [*command, "--fresh", "--bits", "4", "--toolkit", "pt2e"])
    zoo.main()
    assert ran[5:] == ["torchvision/resnet18 pt2e W4A4"]
    cells = json.loads((tmp_path / "zoo.json").read_text())["cells"]
    assert not any("times" in cell for cell in cells.values())
    table = zoo.make_table(cells).splitlines()
    assert table[2] == "| resnet18 | 64 | 0 of 4 | none | none | none | prepare: (1) |"
    assert table[-1] == "(1) `nothing was tried`"
    assert "| torchvision | modelopt, W8A8 | 0 of 1 (0 %) | 1 | 0 |" in zoo.make_summary(cells)


def test_files_that_share_a_torch_export_are_those_that_do_not(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(_conv(3, 8, nn.ReLU), nn.Flatten(), nn.Linear(8, 10)).eval()
    images = torch.randn(2, 3, 1, 1)
    student = prepare(network, [images], weight_bits=4, activation_bits=4)

    def files(folder):
        folder.mkdir()
        return [export_onnx(student, images, folder / name, name).path.read_bytes() for name in zoo.TARGETS]

    alone = files(tmp_path / "alone")
    with zoo.one_torch_export():
        assert files(tmp_path / "shared") == alone
    assert len(set(alone)) == 3


def test_a_torch_export_that_fails_fails_for_every_target():
    calls = []

    def fails(model):
        calls.append(model)
        raise ExportError("no operator for this")

    shared = zoo._once(fails)
    for _ in range(2):
        with pytest.raises(ExportError, match="no operator for this"):
            shared("model")
    assert calls == ["model"]


def test_a_process_that_dies_is_a_failure_of_its_cells():
    kept = {}
    zoo.run_network(zoo.Net("no_such_network"), list(zoo.CELLS[:2]), kept.__setitem__)
    assert list(kept) == ["torchvision/no_such_network modelopt W8A8", "torchvision/no_such_network modelopt W4A4"]
    for cell in kept.values():
        assert "the process ended with 1: ValueError: Unknown model no_such_network" in cell["problem"]["message"]
        assert not zoo.passes(cell)


def test_layers_that_nothing_names_are_found():
    network = nn.Sequential(_conv(3, 8, nn.ReLU), nn.Flatten(), nn.Linear(8, 10)).eval()
    said = zoo._Said()
    student = prepare(network, [torch.randn(2, 3, 1, 1)], keep=["0.0"])
    accounts = zoo._accounts(network, student, said)
    assert (accounts["layers"], accounts["quantized"], accounts["unnamed"]) == (2, 1, ["0.0"])
    said.lines = ["0.00, 10.0: other layers", "0.0: kept in floating point"]
    assert zoo._accounts(network, student, said)["floating"] == {"0.0": "0.0: kept in floating point"}
    accounts = zoo._accounts(network, student, said, ["2/Gemm", "1/MatMul"])
    assert (accounts["quantized"], accounts["unnamed"]) == (0, ["2"])
