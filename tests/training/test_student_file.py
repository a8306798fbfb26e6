"""student.safetensors: the weights come back, damage and misfits are refused."""

import copy
import os
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import EWGS, LSQ, PACT, QakdError, describe, prepare, use_quantizers
from qakd_plugin._common.tensor_file import pack, unpack
from qakd_plugin.demo.net import DigitNet

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def images():
    return torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def make_student(images, toolkit="modelopt", seed=0, **bits):
    torch.manual_seed(seed)
    return prepare(DigitNet(width=4).eval(), [images], toolkit, **bits)


@pytest.fixture(scope="module")
def written(images, tmp_path_factory):
    student = make_student(images)
    return student, qakd.save(student, tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e", "torchao"])
def test_a_student_comes_back_with_every_value_and_its_modules_versions(toolkit, images, tmp_path):
    student = make_student(images, toolkit)
    if toolkit != "torchao":
        use_quantizers(student, LSQ())
    path = qakd.save(student, tmp_path / "s.safetensors")
    other = make_student(images, toolkit, seed=1)
    if toolkit != "torchao":
        use_quantizers(other, LSQ())
    before = other.state_dict()
    assert not all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    qakd.load(path, other)
    after = other.state_dict()
    assert after.keys() == student.state_dict().keys()
    for name, value in student.state_dict().items():
        assert torch.equal(after[name], value), name


def test_the_header_says_what_the_weights_were_trained_as(written):
    _, facts = unpack(written[1].read_bytes())
    assert facts["toolkit"] == "modelopt"
    assert '"stem.0.weight_quantizer": "toolkit, codes -127..127"' in facts["quantizers"]
    assert facts["version"] == "1"


def test_flipped_bits_are_refused_and_change_no_weight(written, images, tmp_path):
    student, path = written
    data = path.read_bytes()
    draw = random.Random(0)
    target, bad = make_student(images, seed=1), tmp_path / "bad.safetensors"
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for index in range(0, len(data), len(data) // 50):
        damaged = bytearray(data)
        damaged[index] ^= 1 << draw.randrange(8)
        bad.write_bytes(damaged)
        with pytest.raises(QakdError, match=r"^\S+bad.safetensors: it .*") as refused:
            qakd.load(bad, target)
        assert "\n" not in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    qakd.load(path, target)
    assert torch.equal(target.head.weight, student.head.weight)


def test_student_pt_of_earlier_versions_is_read_and_its_grids_are_compared(images, tmp_path):
    student = make_student(images)
    grids = {q.name: f"{q.kind}, codes {q.quant_min}..{q.quant_max}" for q in describe(student).quantizers}
    torch.save({"state_dict": student.state_dict(), "quantizers": grids}, tmp_path / "student.pt")
    other = make_student(images, seed=1)
    qakd.load(tmp_path / "student.pt", other)
    assert torch.equal(other.head.weight, student.head.weight)
    with pytest.raises(
        QakdError, match=r"was trained as toolkit, codes -127..127, and the model is prepared with toolkit, codes -8..7"
    ):
        qakd.load(tmp_path / "student.pt", make_student(images, weight_bits=4))


def test_weights_of_another_toolkit_are_refused_by_its_name(written, images):
    with pytest.raises(QakdError, match="it was trained with modelopt, and the model is prepared with torch_ao"):
        qakd.load(written[1], make_student(images, "torch_ao"))


def test_a_plain_state_dict_in_either_format_is_taken_as_it_is(written, images, tmp_path):
    student, _ = written
    torch.save(student.state_dict(), tmp_path / "own.pt")
    save_file({name: value.clone() for name, value in student.state_dict().items()}, tmp_path / "own.safetensors")
    for name in ("own.pt", "own.safetensors"):
        other = make_student(images, seed=1)
        qakd.load(tmp_path / name, other)
        assert torch.equal(other.head.weight, student.head.weight)


def test_a_file_of_another_kind_is_refused(images, tmp_path):
    path = tmp_path / "logits.safetensors"
    path.write_bytes(pack({"logits": torch.ones(2)}, {"format": "teacher cache", "version": "1"}))
    with pytest.raises(
        QakdError, match=r"a file of another kind \(teacher cache, version 1; qakd student, version 1 is read\)"
    ):
        qakd.load(path, make_student(images))


class Counting(DigitNet):
    """With a state of its own that is no tensor."""

    def __init__(self):
        super().__init__(width=4)
        self.seen = {"images": 0}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def test_extra_state_that_is_no_tensor_is_kept(images, tmp_path):
    student, other = (prepare(Counting().eval(), [images]) for _ in range(2))
    student.seen = {"images": 7}
    qakd.load(qakd.save(student, tmp_path / "s.safetensors"), other)
    assert other.seen == {"images": 7}


def test_modules_that_read_their_version_find_it(images, tmp_path):
    class Versioned(DigitNet):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
            nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, *args)
            self.found = metadata.get("version")

    student, other = (prepare(Versioned(width=4).eval(), [images]) for _ in range(2))
    qakd.load(qakd.save(student, tmp_path / "s.safetensors"), other)
    assert other.found == 3


@pytest.mark.parametrize(
    ("toolkit", "bits", "learned"),
    [
        ("modelopt", {"weight_bits": 4, "activation_bits": 4}, LSQ()),
        ("modelopt", {"target": "onnxruntime", "keep": ["head"]}, None),
        ("torch_ao", {}, PACT()),
        ("pt2e", {"weight_bits": 4, "activation_bits": 4}, EWGS()),
        ("torchao", {}, None),
    ],
)
def test_a_float_network_becomes_the_student_bit_for_bit(toolkit, bits, learned, images, tmp_path):
    student = make_student(images, toolkit, **bits)
    if learned is not None:
        use_quantizers(student, learned)
        for parameter in student.parameters():  # as after training: no number is what calibration gave
            parameter.data.mul_(1.01)
    expected = student(images)
    network = DigitNet(width=4).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as new residual networks have them
            nn.init.zeros_(module.weight)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    loaded = qakd.load(qakd.save(copy.deepcopy(student), tmp_path / "s.safetensors"), network)
    assert torch.equal(loaded(images), expected)
    assert not loaded.training
    assert all(torch.equal(own[name], value) for name, value in network.state_dict().items())
    assert [(q.name, q.kind, q.quant_min) for q in describe(loaded).quantizers] == [
        (q.name, q.kind, q.quant_min) for q in describe(student).quantizers
    ]


def test_inputs_of_any_structure_are_remembered(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, ids, mask, scale=1.0):
            return self.layer(self.words(ids) * mask[..., None]) * scale

    torch.manual_seed(0)
    batch = {"ids": torch.randint(1, 10, (4, 5)), "mask": torch.ones(4, 5), "scale": 2.0}
    student = prepare(TwoInputs().eval(), [batch], batch_fn=lambda batch: (batch, None))
    loaded = qakd.load(qakd.save(student, tmp_path / "s.safetensors"), TwoInputs().eval())
    assert torch.equal(loaded(**batch), student(**batch))


def test_what_prepare_did_not_prepare_needs_a_prepared_model(images, tmp_path):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    made = [mtq.quantize(DigitNet(width=4).eval(), mtq.INT8_DEFAULT_CFG, lambda network: network(images)) for _ in range(2)]
    path = qakd.save(made[0], tmp_path / "s.safetensors")
    with pytest.raises(QakdError, match=r"the file does not say how it was prepared \(modelopt\).*qakd_plugin.load\("):
        qakd.load(path, DigitNet(width=4).eval())
    assert torch.equal(qakd.load(path, made[1])(images), made[0](images))


@pytest.mark.parametrize("network", [nn.Conv2d(3, 3, 3), DigitNet(width=8)])
def test_another_network_than_the_students_is_refused(network, written):
    with pytest.raises(QakdError, match=r"student.safetensors(: model|\S* does not fit)") as refused:
        qakd.load(written[1], network.eval())
    assert "\n" not in str(refused.value)


def _resealed(path, target, **changed):
    """The same file with other facts in its header, and a digest that fits them."""
    tensors, facts = unpack(path.read_bytes())
    target.write_bytes(pack(tensors, {name: text for name, text in (facts | changed).items() if text is not None}))
    return target


@pytest.mark.parametrize(
    "changed",
    [
        {"quantizers": None},
        {"quantizers": "[1]"},
        {"quantizers": "{"},
        {"pickled": "{}"},
        {"pickled": '["head.weight"]'},
        {"pickled": "[[1]]"},
        {"module_versions": "7"},
        {"module_versions": "[" * 100_000},
        {"version": "2"},
        {"format": None},
    ],
)
def test_a_header_that_says_something_else_is_one_error(changed, written, images, tmp_path):
    path = _resealed(written[1], tmp_path / "s.safetensors", **changed)
    with pytest.raises(QakdError, match=r"^\S+s.safetensors: it") as refused:
        qakd.load(path, make_student(images))
    assert "\n" not in str(refused.value)


def test_no_flipped_bit_of_student_pt_is_overlooked(images, tmp_path):
    student, target = make_student(images), make_student(images, seed=1)
    torch.save({"state_dict": student.state_dict(), "quantizers": {}}, tmp_path / "student.pt")
    data = (tmp_path / "student.pt").read_bytes()
    draw, before = random.Random(0), target.head.weight.detach().clone()
    start = data.index(student.head.weight.detach().numpy().tobytes())
    for _ in range(10):
        damaged = bytearray(data)
        damaged[start + draw.randrange(student.head.weight.numel() * 4)] ^= 1 << draw.randrange(8)
        (tmp_path / "student.pt").write_bytes(damaged)
        with pytest.raises(QakdError, match="it is damaged"):
            qakd.load(tmp_path / "student.pt", target)
    assert torch.equal(target.head.weight, before)


def test_what_is_no_file_is_one_error(images, tmp_path):
    student = make_student(images)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in [("pipe", "It is a pipe"), (".", "Is a directory"), ("gone", "No such file"), ("nul\0", "null")]:
        with pytest.raises(QakdError, match=f".*: .*{reason}"):
            qakd.load(tmp_path / name, student)
