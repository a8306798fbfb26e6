"""Files of torch.save are read as tensors and plain data, whole, and never larger than they are."""

import io
import random
import zipfile

import pytest
import torch

from qakd_plugin import CheckpointError
from qakd_plugin._common.torch_file import load_plain, tensors_of


def _saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _rewritten(data, compression=zipfile.ZIP_STORED, pickled=None):
    """The same records in another archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for record in old.infolist():
            content = old.read(record)
            new.writestr(record.filename, pickled if pickled and record.filename.endswith("data.pkl") else content)
    return buffer.getvalue()


def test_tensors_and_plain_data_come_back():
    content = {"weights": torch.arange(4.0), "list": [1, 2.5, None, "text", (True, {"inner": torch.ones(2, 2)})]}
    found = load_plain(_saved(content))
    assert found["list"][:4] == content["list"][:4]
    assert [tensor.shape for tensor in tensors_of(found)] == [(4,), (2, 2)]
    assert torch.equal(found["weights"], content["weights"])


def test_no_flipped_bit_of_a_tensor_is_overlooked():
    """torch's own reader does not look at the checksums of a zip file."""
    data, draw = _saved({"weights": torch.rand(64)}), random.Random(0)
    start = data.index(torch.load(io.BytesIO(data))["weights"].numpy().tobytes())
    for _ in range(40):
        damaged = bytearray(data)
        damaged[start + draw.randrange(256)] ^= 1 << draw.randrange(8)
        with pytest.raises(CheckpointError, match=r"it is damaged \(the checksum of archive/data/0 does not match\)"):
            load_plain(bytes(damaged))


def test_records_that_grow_when_they_are_unpacked_are_refused_before():
    bomb = _rewritten(_saved({"weights": torch.zeros(1_000_000)}), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 20_000
    with pytest.raises(CheckpointError, match="its records are compressed"):
        load_plain(bomb)


def test_records_that_share_their_bytes_are_refused():
    data = bytearray(_saved({"a": torch.zeros(1000), "b": torch.ones(1000)}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes = [record.file_size for record in archive.infolist()]
    assert sum(sizes) < len(data)
    for index in range(len(data) - 4):
        if data[index : index + 4] == b"PK\x01\x02":  # each record of the directory claims a lot more
            for field in (20, 24):
                data[index + field : index + field + 4] = (10**8).to_bytes(4, "little")
    with pytest.raises(CheckpointError, match="say that they hold more than the file"):
        load_plain(bytes(data))


def test_a_tensor_that_repeats_one_number_without_end_is_refused():
    data = _saved({"samples": torch.zeros(1, 16, dtype=torch.uint8).expand(10**9, 16)})
    assert len(data) < 3000
    with pytest.raises(CheckpointError, match=r"a tensor of \(1000000000, 16\) is more than the file holds"):
        load_plain(data)
    assert load_plain(_saved(torch.zeros(1).expand(1000))).shape == (1000,)


def test_a_callable_that_makes_gigabytes_of_a_number_is_refused():
    pickled = b"\x80\x02c__builtin__\nbytearray\nK\x05\x85R."
    with pytest.raises(CheckpointError, match="it holds a bytearray"):
        load_plain(_rewritten(_saved({}), pickled=pickled))


@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"rubbish" * 100, _saved({"a": torch.ones(3)})[:-30], _saved([1], _use_new_zipfile_serialization=False)],
    ids=["empty", "short", "rubbish", "cut", "format of 2020"],
)
def test_what_is_no_whole_file_is_refused(data):
    with pytest.raises(CheckpointError, match="it cannot be read: it is cut short, or no file of torch"):
        load_plain(data)
