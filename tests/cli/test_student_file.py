"""student.safetensors: the weights come back, damage and misfits are refused."""

import os
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qakd_plugin import LSQ, QakdError, describe, prepare, use_quantizers
from qakd_plugin._common.tensor_file import pack, unpack
from qakd_plugin.cli.student_file import load_student, write_student
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
    return student, write_student(student, tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.mark.parametrize("toolkit", ["modelopt", "torch_ao", "pt2e", "torchao"])
def test_a_student_comes_back_with_every_value_and_its_modules_versions(toolkit, images, tmp_path):
    student = make_student(images, toolkit)
    if toolkit != "torchao":
        use_quantizers(student, LSQ())
    path = write_student(student, tmp_path / "s.safetensors")
    other = make_student(images, toolkit, seed=1)
    if toolkit != "torchao":
        use_quantizers(other, LSQ())
    before = other.state_dict()
    assert not all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    load_student(other, path)
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
        with pytest.raises(QakdError, match=r"^--weights: \S+bad.safetensors: it .*") as refused:
            load_student(target, bad)
        assert "\n" not in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    load_student(target, path)
    assert torch.equal(target.head.weight, student.head.weight)


def test_student_pt_of_earlier_versions_is_read_and_its_grids_are_compared(images, tmp_path):
    student = make_student(images)
    grids = {q.name: f"{q.kind}, codes {q.quant_min}..{q.quant_max}" for q in describe(student).quantizers}
    torch.save({"state_dict": student.state_dict(), "quantizers": grids}, tmp_path / "student.pt")
    other = make_student(images, seed=1)
    load_student(other, tmp_path / "student.pt")
    assert torch.equal(other.head.weight, student.head.weight)
    with pytest.raises(
        QakdError, match=r"was trained as toolkit, codes -127..127, and the recipe prepares toolkit, codes -8..7"
    ):
        load_student(make_student(images, weight_bits=4), tmp_path / "student.pt")


def test_weights_of_another_toolkit_are_refused_by_its_name(written, images):
    with pytest.raises(QakdError, match="it was trained with modelopt, and the recipe prepares with torch_ao"):
        load_student(make_student(images, "torch_ao"), written[1])


def test_a_plain_state_dict_in_either_format_is_taken_as_it_is(written, images, tmp_path):
    student, _ = written
    torch.save(student.state_dict(), tmp_path / "own.pt")
    save_file({name: value.clone() for name, value in student.state_dict().items()}, tmp_path / "own.safetensors")
    for name in ("own.pt", "own.safetensors"):
        other = make_student(images, seed=1)
        load_student(other, tmp_path / name)
        assert torch.equal(other.head.weight, student.head.weight)


def test_a_file_of_another_kind_is_refused(images, tmp_path):
    path = tmp_path / "logits.safetensors"
    path.write_bytes(pack({"logits": torch.ones(2)}, {"format": "teacher cache", "version": "1"}))
    with pytest.raises(
        QakdError, match=r"a file of another kind \(teacher cache, version 1; qakd student, version 1 is read\)"
    ):
        load_student(make_student(images), path)


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
    load_student(other, write_student(student, tmp_path / "s.safetensors"))
    assert other.seen == {"images": 7}


def test_modules_that_read_their_version_find_it(images, tmp_path):
    class Versioned(DigitNet):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
            nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, *args)
            self.found = metadata.get("version")

    student, other = (prepare(Versioned(width=4).eval(), [images]) for _ in range(2))
    load_student(other, write_student(student, tmp_path / "s.safetensors"))
    assert other.found == 3


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
    with pytest.raises(QakdError, match=r"^--weights: \S+s.safetensors: it") as refused:
        load_student(make_student(images), path)
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
            load_student(target, tmp_path / "student.pt")
    assert torch.equal(target.head.weight, before)


def test_what_is_no_file_is_one_error(images, tmp_path):
    student = make_student(images)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in [("pipe", "It is a pipe"), (".", "Is a directory"), ("gone", "No such file"), ("nul\0", "null")]:
        with pytest.raises(QakdError, match=f"--weights: .*: .*{reason}"):
            load_student(student, tmp_path / name)
