"""What ``torch.save`` wrote, read as tensors and plain data: never code, never damaged, never larger than its file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

_SMALL = 2**20
"""Bytes that a tensor may have though the file holds fewer of them: a constant that was expanded."""


def load_plain(data: bytes, *, intact: bool = False) -> Any:
    """What a file of ``torch.save`` holds, if it is tensors and plain data; code is refused.

    Nothing in it can be larger than the file itself: compressed records, records that share their bytes, and tensors that
    repeat a number are refused before they take the memory that they ask for.

    Args:
        data: the whole file.
        intact: somebody else has compared a digest already; otherwise every record's checksum is.

    Raises:
        CheckpointError: it holds more, or is damaged. The message is the reason alone, for the caller to say which file it is.
    """
    try:
        _require_bounded(data, intact)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler raises many kinds on foreign bytes; all mean the same here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"it cannot be read as tensors and plain data ({reason})") from error
    for tensor in tensors_of(content):
        if tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > max(len(data), _SMALL):
            raise CheckpointError(f"it cannot be read: a tensor of {tuple(tensor.shape)} is more than the file holds")
    return content


def tensors_of(content: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples, in their order.

    Raises:
        CheckpointError: they are nested beyond all use.
    """
    if depth > 100:
        raise CheckpointError("it cannot be read: what it holds is nested more than 100 deep")
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple | set):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_of(part, depth + 1)


def _require_bounded(data: bytes, intact: bool) -> None:
    if not data.startswith(b"PK\x03\x04") or not zipfile.is_zipfile(io.BytesIO(data)):
        raise CheckpointError("it cannot be read: it is cut short, or no file of torch.save")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise CheckpointError("it cannot be read: its records are compressed, which torch.save never does")
        if sum(record.file_size for record in records) > len(data):
            raise CheckpointError("it cannot be read: its records say that they hold more than the file")
        if not intact and (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"it is damaged (the checksum of {damaged} does not match)")
        for record in records:  # the one callable that weights_only allows and that makes gigabytes of a number
            if record.filename.endswith("data.pkl") and b"bytearray" in archive.read(record):
                raise CheckpointError("it cannot be read: it holds a bytearray")
