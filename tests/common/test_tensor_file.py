"""Files of tensors: what goes in comes out, and damage is noticed."""

import pytest
import torch
from safetensors.torch import save

from qakd_plugin import CheckpointError
from qakd_plugin._common.tensor_file import pack, unpack

WEIGHT = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "weight": WEIGHT,
    "turned": WEIGHT.t(),  # not contiguous, and in the same memory
    "row": WEIGHT[1],
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
}


def test_tensors_and_facts_come_back_as_they_were():
    tensors, facts = unpack(pack(TENSORS, {"kind": "a test", "note": '"sha256":"' + "0" * 64 + '"'}))
    assert facts == {"kind": "a test", "note": '"sha256":"' + "0" * 64 + '"'}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_no_bit_of_a_file_can_change_unnoticed():
    data = pack({"weight": WEIGHT}, {"kind": "a test"})
    for index in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[index] ^= 1 << bit
            with pytest.raises(CheckpointError, match="damaged"):
                unpack(bytes(damaged))


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_file_that_was_cut_is_refused(size):
    data = pack({"weight": WEIGHT}, {"kind": "a test"})
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(data[:size])


def test_files_of_other_tools_are_read_without_facts():
    for metadata in (None, {"format": "pt"}):
        tensors, facts = unpack(save({"weight": WEIGHT}, metadata))
        assert facts == {}
        assert torch.equal(tensors["weight"], WEIGHT)
