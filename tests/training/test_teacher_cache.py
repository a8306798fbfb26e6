"""The file of the teacher's outputs: safe to exchange, whole, and of this teacher."""

import copy
import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import CheckpointError, QakdError
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
        TeacherCache(path, network, "no").fill(images.split(4), lambda x: {"logits": network(x)}, Processes())
    return path


def test_rows_are_found_by_content_and_what_is_new_is_not(path, network, images):
    cache = TeacherCache(path, network, "no")
    order = torch.randperm(10)
    with torch.no_grad():
        assert torch.equal(cache.find(images[order])["logits"], network(images)[order])
    assert cache.find(torch.cat([images[:3], torch.rand(1, 1, 2, 2)])) is None


def test_the_file_is_safetensors_with_its_facts_in_the_header(path):
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    assert facts["format"] == "qakd_plugin teacher logits"
    assert facts["teacher"].endswith(" no")
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {
        "samples": (10, 16),
        "outputs.logits": (10, 3),
    }


@pytest.mark.parametrize("tensor", ["samples", "outputs.logits"])
def test_one_changed_bit_is_noticed(tensor, path, network):
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    start, _ = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    data[8 + size + start] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is no file of a teacher's outputs: it is damaged.*Remove it"):
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


def _tensors_of_version_2(path):
    found = load_file(path)
    return {"samples": found["samples"], "logits": found["outputs.logits"]}


def _teacher(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["teacher"]


def _as_version_1(path, tmp_path):
    old = tmp_path / "logits.pt"
    torch.save({"teacher": _teacher(path), **_tensors_of_version_2(path)}, old)
    return old


def _as_version_2(path, tmp_path):
    old = tmp_path / "old.safetensors"
    facts = {"format": "qakd_plugin teacher logits", "version": "2", "teacher": _teacher(path)}
    old.write_bytes(pack(_tensors_of_version_2(path), facts))
    return old


@pytest.mark.parametrize("older", [_as_version_1, _as_version_2])
def test_files_of_the_versions_before_are_read(older, path, tmp_path, network, images):
    cache = TeacherCache(older(path, tmp_path), network, "no")
    assert torch.equal(cache.find(images)["logits"], TeacherCache(path, network, "no").find(images)["logits"])


def test_tensors_that_do_not_belong_together_are_refused(path, tmp_path, network):
    old = _as_version_1(path, tmp_path)
    content = torch.load(old, weights_only=True)
    torch.save({**content, "logits": content["logits"][:4]}, old)
    with pytest.raises(CheckpointError, match=r"no digests \(N, 16\) and outputs"):
        TeacherCache(old, network, "no")


class Tagger(nn.Module):
    """Two outputs of tokens and their mask: one per token, one per sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.tag, self.value = nn.Embedding(20, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.calls = 0

    def forward(self, input_ids, attention_mask):
        self.calls += not self.training
        hidden = self.embed(input_ids) * attention_mask[..., None]
        return {"tags": self.tag(hidden), "values": self.value(hidden.mean(1))}


def _sentences(*lengths):
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(20, (4, length), generator=generator) for length in lengths]
    return [{"input_ids": x, "attention_mask": (torch.rand(x.shape, generator=generator) > 0.3).long()} for x in ids]


MATCH = {"tags": qakd.KL(dim=-1, where="attention_mask"), "values": qakd.L2()}


def _train(loader, path, match=MATCH, teacher=None):
    teacher = Tagger().eval() if teacher is None else teacher
    student = qakd.prepare(Tagger().eval(), loader, weight_bits=4)
    method = qakd.SQAKD(match=match)
    return qakd.distill(student, teacher, loader, method=method, epochs=2, lr=1e-3, seed=0, cache_teacher=path).model


def test_every_matched_output_of_several_inputs_is_held(tmp_path):
    loader, path = _sentences(6, 6, 6), tmp_path / "cache"
    teacher = Tagger().eval()
    cached = _train(loader, path, teacher=teacher)
    calls = teacher.calls
    assert calls == 4  # the look at the first batch, and one pass
    again = _train(list(reversed(loader)), path, teacher=teacher)
    assert teacher.calls == calls + 1
    without = _train(loader, None)
    for own, other in zip(cached.parameters(), without.parameters(), strict=True):
        assert torch.equal(own, other)
    assert any(not torch.equal(own, other) for own, other in zip(again.parameters(), without.parameters(), strict=True))
    assert {name: tuple(rows.shape) for name, rows in load_file(path).items()} == {
        "samples": (12, 16),
        "outputs.tags": (12, 6, 4),
        "outputs.values": (12, 2),
    }


def test_a_sample_is_known_by_all_of_its_inputs(tmp_path):
    loader, path = _sentences(6, 6), tmp_path / "cache"
    _train(loader, path)
    other = copy.deepcopy(loader)
    other[0]["attention_mask"] = 1 - other[0]["attention_mask"]
    with pytest.raises(QakdError, match="samples of this epoch are not in"):
        _train(other, path)


def test_masks_of_the_users_may_read_any_output_of_the_teacher(tmp_path):
    match = {"tags": qakd.KL(dim=-1, where=lambda inputs, student, teacher: teacher["values"][:, 0] > -1e9)}
    _train(_sentences(6), tmp_path / "cache", match)
    assert "outputs.values" in load_file(tmp_path / "cache")


def test_what_cannot_be_cached_is_named(tmp_path):
    with pytest.raises(QakdError, match=r"'tags' as \(5, 4\) for one sample and as \(6, 4\) for another. Pad all batches"):
        _train(_sentences(6, 5), tmp_path / "cache")
    _train(_sentences(6), tmp_path / "values", {"values": qakd.L2()})
    with pytest.raises(CheckpointError, match=r"holds 'values' .* and not 'tags', which match compares"):
        _train(_sentences(6), tmp_path / "values")


# -- files that are not what they seem


def test_no_flipped_bit_of_the_first_versions_file_is_overlooked(path, tmp_path, network):
    old = _as_version_1(path, tmp_path)
    data = bytearray(old.read_bytes())
    start = data.index(_tensors_of_version_2(path)["logits"].numpy().tobytes())
    data[start + 3] ^= 0x40
    old.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is no file of a teacher's outputs: it is damaged \(the checksum of"):
        TeacherCache(old, network, "no")


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (torch.zeros(1, 16, dtype=torch.uint8).expand(10**9, 16), "is more than the file holds"),
        (torch.zeros(0, 16, dtype=torch.uint8), r"(it holds no sample|no digests)"),
        (None, r"no digests \(N, 16\)"),
        (torch.zeros(10, 16, dtype=torch.uint8).to_sparse(), r"no digests \(N, 16\)"),
    ],
)
def test_samples_that_are_none_are_refused_at_once(samples, reason, path, tmp_path, network):
    old = _as_version_1(path, tmp_path)
    content = torch.load(old, weights_only=True)
    logits = content["logits"][:0] if samples is not None and len(samples) == 0 else content["logits"]
    torch.save({**content, "samples": samples, "logits": logits}, old)
    before = old.read_bytes()
    with pytest.raises(CheckpointError, match=reason):
        TeacherCache(old, network, "no")
    assert old.read_bytes() == before


def test_what_is_no_file_or_cannot_be_written_is_named_before_the_teacher_works(tmp_path, network):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in [("pipe", "it cannot be read .It is a pipe"), (".", "Is a directory"), ("pipe/under", "cannot write")]:
        with pytest.raises(CheckpointError, match=reason):
            TeacherCache(tmp_path / name, network, "no")
    (tmp_path / "link").symlink_to("new")
    assert len(TeacherCache(tmp_path / "link", network, "no")) == 0
