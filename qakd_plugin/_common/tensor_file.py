"""Tensors and facts about them in one safetensors file that shows when it is damaged.

The header holds the SHA-256 of the whole file, taken while its own 64 digits are zeros: no bit of a tensor, a name or a fact
changes without being noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from ..errors import CheckpointError

_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_ZEROS = b"0" * 64


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """The bytes of a file.

    Args:
        tensors: of any shape and device; those that share memory are written one by one.
        facts: text by name; "sha256" is taken.
    """
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    data = save(plain, {**facts, "sha256": _ZEROS.decode()})
    start, end = _digits(data) or (0, 0)
    return data[:start] + _digest(data, start, end) + data[end:]


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`pack` was given; of a safetensors file from elsewhere, which holds no digest, the tensors and no facts.

    Raises:
        CheckpointError: the bytes are no such file, or are damaged. The message is the reason alone, for the caller to say
            which file it is.
    """
    digits = _digits(data)
    if digits is not None and data[slice(*digits)] != _digest(data, *digits):
        raise CheckpointError("it is damaged (its checksum does not match)")
    try:
        tensors = load(data)
        facts = json.loads(data[8 : _header_end(data)]).get("__metadata__", {})
    except Exception as error:  # foreign bytes fail in many ways; all mean the same here
        reason = " ".join(str(error).split())
        raise CheckpointError(f"it is damaged, or no safetensors file ({reason})") from error
    if digits is not None:
        return tensors, {name: text for name, text in facts.items() if name != "sha256"}
    if facts.keys() - {"format"}:  # all that the tools of others write; more was ours, and lost its digest
        raise CheckpointError("it is damaged (its checksum is missing)")
    return tensors, {}


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _digits(data: bytes) -> tuple[int, int] | None:
    """Where the digest's digits stand."""
    match = _DIGEST.search(data, 8, min(_header_end(data), len(data)))
    return None if match is None else match.span(1)


def _digest(data: bytes, start: int, end: int) -> bytes:
    view, digest = memoryview(data), hashlib.sha256()
    for part in (view[:start], _ZEROS, view[end:]):
        digest.update(part)
    return digest.hexdigest().encode()
