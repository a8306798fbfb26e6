"""ModelOpt: sums of residual blocks are quantized by the block that returns them, trained, saved, and exported exactly."""

import copy

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.nn.functional as F
from agreement import ties_are_rare
from torch import nn
from torchvision.ops import StochasticDepth

from qakd_plugin import (
    LSQ,
    QKD,
    NotPreparedError,
    build_engine,
    configuration,
    describe,
    distill,
    export_onnx,
    load,
    prepare,
    restore_modelopt,
    save,
    use_quantizers,
)
from qakd_plugin.bench.census import optimized_nodes
from qakd_plugin.placement.placement import place_quantizers
from qakd_plugin.preparation.again import prepare_again
from qakd_plugin.preparation.prepared import prepare_as
from qakd_plugin.preparation.recorded import recorded
from qakd_plugin.toolkits import adapter_for

WIDTH = 8


def _conv(size=3, inputs=WIDTH):
    return nn.Sequential(nn.Conv2d(inputs, WIDTH, size, padding=size // 2, bias=False), nn.BatchNorm2d(WIDTH))


class Block(nn.Module):
    """As torchvision writes it: one ReLU, in place, called twice."""

    def __init__(self, shortcut=False):
        super().__init__()
        self.first, self.second, self.relu = _conv(), _conv(), nn.ReLU(inplace=True)
        self.shortcut = _conv(1) if shortcut else None

    def forward(self, x):
        y = self.second(self.relu(self.first(x)))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)


class Inverted(nn.Module):
    """A sum without a ReLU, and stochastic depth, which does nothing in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.depth = _conv(), _conv(), StochasticDepth(0.2, "row")

    def forward(self, x):
        return self.depth(self.second(F.relu(self.first(x)))) + x


class Untraceable(Block):
    """torch.fx cannot see through it, torch.export can."""

    def forward(self, x):
        return super().forward(x if x.shape[-1] > 1 else -x)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.relu, self.blocks = _conv(inputs=3), nn.ReLU(), nn.Sequential(*blocks)
        self.last, self.head = _conv(), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.blocks(self.relu(self.stem(x)))
        return self.head((self.last(x) + x).relu().mean([2, 3]))


def _seen(model, images):
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.rand(16, 3, 16, 16)


@pytest.fixture(scope="module")
def net(images):
    torch.manual_seed(0)
    return _seen(Net(Block(), Inverted(), Block(shortcut=True)), images)


SUMS = [f"blocks.{index}.output_quantizer" for index in range(3)]


def _activations(model):
    return {q.name: (q.quant_min, q.quant_max) for q in describe(model).quantizers if q.role == "activation"}


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_each_block_quantizes_the_sum_that_it_returns_once_for_all_that_read_it(net, images, target):
    ranges = _activations(prepare(net, [images], target=target))
    after_relu = (-128, 127) if target == "tensorrt" else (0, 255)
    assert [ranges.get(name) for name in SUMS] == [after_relu, (-128, 127), after_relu]
    assert not any(name in ranges for name in ("blocks.1.first.0.input_quantizer", "last.0.input_quantizer"))


def test_a_network_that_torch_fx_cannot_trace_gets_the_same_quantizers(images):
    torch.manual_seed(0)
    ranges = _activations(prepare(_seen(Net(Block(), Untraceable(), Block()), images), [images]))
    assert set(SUMS) <= set(ranges)


def test_a_sum_that_no_module_returns_is_named(net, images, caplog):
    prepare(net, [images])
    (warning,) = (record.message for record in caplog.records if "sums" in record.message)
    assert "last.1 + blocks.2" in warning or "last.1 + blocks.2.relu" in warning
    assert "pt2e" in warning


class Shared(nn.Module):
    """Whose output is no place for a quantizer: see each test case."""

    def __init__(self, how):
        super().__init__()
        self.how, self.block, self.branch, self.head = how, Block(), _conv(), nn.Linear(WIDTH, 5)
        self.stem = _conv(inputs=3)

    def forward(self, x):
        x = self.block(self.stem(x))
        if self.how == "called twice":
            x = self.block(x)
        return self.head((self.branch(x) + x).mean([2, 3]))


class ReadsInside(Block):
    """Its sum is read by a layer of its own, which would not see the quantizer."""

    def forward(self, x):
        y = super().forward(x)
        self.kept = self.second(y)
        return y


@pytest.mark.parametrize("kind", ["called twice", ReadsInside])
def test_a_module_that_cannot_quantize_its_sum_does_not(kind, images):
    torch.manual_seed(0)
    model = Shared(kind)
    if isinstance(kind, type):
        model.block = kind()
    assert place_quantizers(_seen(model, images), None, images).sums == ()


def _scales(model):
    adapter = adapter_for(model)
    return {q.fqn: float(adapter.qparams(q).scale) for q in adapter.quantizers(model) if q.fqn in SUMS}


@pytest.fixture(scope="module")
def distilled(net, images):
    """A student of four bits that learned its ranges by QKD, and the scales of its sums before and after."""
    student = use_quantizers(prepare(net, [images], weight_bits=4, activation_bits=4), LSQ())
    before = _scales(student)
    distill(student, copy.deepcopy(net), [(images, torch.arange(16) % 5)], method=QKD(), epochs=4, seed=0)
    return student, before, _scales(student)


def test_quantizers_of_sums_learn_as_all_others_do(distilled):
    _, before, after = distilled
    assert set(before) == set(SUMS)
    assert all(before[name] != after[name] for name in SUMS)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_what_was_learned_on_sums_is_exported_exactly(distilled, images, target, tmp_path):
    exported = export_onnx(distilled[0], images, tmp_path / "s.onnx", target=target)
    assert exported.parity.runtime_deviation < 1e-4
    assert ties_are_rare(exported.parity)
    if target == "onnxruntime":
        assert [node.op_type for node in optimized_nodes(exported)].count("QLinearAdd") == 3
    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx_bindings")
        layers = build_engine(exported, tmp_path / "s.engine", "tensorrt_rtx", capabilities=["SM86"]).manifest["convolutions"]
        assert layers["int8"] == layers["total"] == 9


def test_saved_students_come_back_and_modelopts_own_restore_says_by_what(net, images, tmp_path):
    student = use_quantizers(prepare(net, [images]), LSQ())
    mto.save(student, tmp_path / "student.pth")
    restored = restore_modelopt(net, tmp_path / "student.pth")
    with torch.no_grad():
        assert torch.equal(restored(images), student(images))
    assert _activations(restored) == _activations(student)
    with pytest.raises(NotPreparedError, match=r"blocks.0.*restore_modelopt\(float_model, path\)"):
        mto.restore(copy.deepcopy(net), tmp_path / "student.pth")


def test_students_saved_without_quantized_sums_go_on_loading(net, images, tmp_path):
    config = qakd_config_without_sums(net)
    student = mtq.quantize(copy.deepcopy(net), config, lambda model: model(images))
    mto.save(student, tmp_path / "old.pth")
    for restored in (restore_modelopt(net, tmp_path / "old.pth"), mto.restore(copy.deepcopy(net), tmp_path / "old.pth").eval()):
        with torch.no_grad():
            assert torch.equal(restored(images), student(images))


def qakd_config_without_sums(net):
    """What earlier versions asked ModelOpt for: every layer its own input quantizer after a sum."""
    placement = place_quantizers(net)
    names = [f"{name}.{kind}_quantizer" for name in placement.layers for kind in ("weight", "input")]
    entries = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": name, "cfg": {"num_bits": 8, "axis": 0 if "weight" in name else None}} for name in names]
    return {"quant_cfg": entries, "algorithm": "max"}


def test_children_of_a_block_keep_their_names_in_the_export_form(net, images):
    form = adapter_for(student := prepare(net, [images])).export_form(student)
    names = {name for name, _ in form.named_modules()}
    assert {"blocks.0.output_qdq", "blocks.0.first.0.weight"} <= names
    assert not any("blocks.0.inner" in name for name in names)


def test_the_configuration_for_modelopts_own_call_asks_for_nothing_that_it_has_no_place_for(net, images):
    student = mtq.quantize(copy.deepcopy(net), configuration(net), lambda model: model(images))
    read = {name.removesuffix(".input_quantizer") for name in _activations(student) if name.endswith("input_quantizer")}
    assert {"blocks.1.first.0", "blocks.2.first.0", "last.0"} <= read  # which read sums


@pytest.mark.parametrize("toolkit", ["modelopt", "pt2e"])
def test_a_student_of_an_earlier_version_is_prepared_as_it_was(net, images, toolkit, tmp_path):
    asked = {"target": "openvino", "batch_fn": lambda batch: (batch, None)}
    old = prepare_as(net, [images], toolkit, 8, 8, None, placement=1, **asked)
    restored = load(save(old, tmp_path / "old.safetensors"), net)
    with torch.no_grad():
        assert torch.equal(restored(images), old(images))
    unsaid = {key: value for key, value in recorded(old).as_dict().items() if key != "placement"}
    assert _activations(prepare_again(net, unsaid, {})) == _activations(old)
    if toolkit == "modelopt":
        assert not set(SUMS) & set(_activations(old))
    new = prepare(net, [images], toolkit, target="openvino")
    with torch.no_grad():
        assert torch.equal(load(save(new, tmp_path / "new.safetensors"), net)(images), new(images))
