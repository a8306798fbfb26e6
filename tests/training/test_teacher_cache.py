"""The file of the teacher's logits: safe to exchange, whole, and of this teacher."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qakd_plugin import CheckpointError
from qakd_plugin._common.tensor_file import pack
from qakd_plugin.training.distributed.processes import Processes
from qakd_plugin.training.teacher_cache import TeacherCache


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def images():
    return torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path, network, images):
    path = tmp_path / "logits.safetensors"
    with torch.no_grad():
        TeacherCache(path, network, "no").fill(images.split(4), network, Processes())
    return path


def test_rows_are_found_by_content_and_what_is_new_is_not(path, network, images):
    cache = TeacherCache(path, network, "no")
    order = torch.randperm(10)
    with torch.no_grad():
        assert torch.equal(cache.find(images[order]), network(images)[order])
    assert cache.find(torch.cat([images[:3], torch.rand(1, 1, 2, 2)])) is None


def test_the_file_is_safetensors_with_its_facts_in_the_header(path):
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    assert facts["format"] == "qakd_plugin teacher logits"
    assert facts["teacher"].endswith(" no")
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {"samples": (10, 16), "logits": (10, 3)}


@pytest.mark.parametrize("tensor", ["samples", "logits"])
def test_one_changed_bit_is_noticed(tensor, path, network):
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    start, _ = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    data[8 + size + start] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is no file of logits: it is damaged.*Remove it"):
        TeacherCache(path, network, "no")


@pytest.mark.parametrize(
    ("tensors", "facts", "reason"),
    [
        ({"a": torch.zeros(1)}, {}, "did not write it"),
        ({"samples": torch.zeros(1), "logits": torch.zeros(1)}, {"format": "another"}, "did not write it"),
        (
            {"samples": torch.zeros(1), "logits": torch.zeros(1)},
            {"format": "qakd_plugin teacher logits", "version": "9"},
            "its version is 9",
        ),
    ],
)
def test_other_files_are_refused(tensors, facts, reason, tmp_path, network):
    (tmp_path / "file").write_bytes(pack(tensors, facts))
    with pytest.raises(CheckpointError, match=reason):
        TeacherCache(tmp_path / "file", network, "no")


def test_another_precision_is_another_teacher(path, network):
    with pytest.raises(CheckpointError, match="another precision"):
        TeacherCache(path, network, "bf16")


def _as_version_1(path, tmp_path):
    with safe_open(path, framework="pt") as file:
        teacher = file.metadata()["teacher"]
    old = tmp_path / "logits.pt"
    torch.save({"teacher": teacher, **load_file(path)}, old)
    return old


def test_a_file_of_the_version_before_is_read(path, tmp_path, network, images):
    cache = TeacherCache(_as_version_1(path, tmp_path), network, "no")
    assert torch.equal(cache.find(images), TeacherCache(path, network, "no").find(images))


def test_tensors_that_do_not_belong_together_are_refused(path, tmp_path, network):
    old = _as_version_1(path, tmp_path)
    content = torch.load(old, weights_only=True)
    torch.save({**content, "logits": content["logits"][:4]}, old)
    with pytest.raises(CheckpointError, match=r"no digests \(N, 16\) and logits"):
        TeacherCache(old, network, "no")
