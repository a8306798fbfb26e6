"""The teacher's logits on disk, for training data that look the same in every epoch.

Rows are found by the content of a sample, so shuffling is free and an image that is not the one that was cached is noticed.
The file is safetensors: ``samples`` (N, 16) uint8, the digest of each sample, and ``logits`` (N, C); its header says what they
are of, with a digest of their bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._common.files import write_atomic
from .._common.tensor_file import pack, unpack
from ..errors import CheckpointError, QakdError
from .checkpoint import load_plain
from .distributed.processes import Processes
from .teachers import checksum

_log = logging.getLogger(__name__)
_DIGEST = 16
_FORMAT, _VERSION = "qakd_plugin teacher logits", "2"
"""Version 1 was a file of ``torch.save``, without a digest of its own; it is still read."""


@dataclass(frozen=True)
class _Content:
    teacher: str
    samples: Tensor
    logits: Tensor


class TeacherCache:
    """Logits of a frozen teacher by the content of each sample.

    Args:
        path: the file; read where it exists, else written by :meth:`fill`.
        teacher: its checksum goes into the file, and a file of another teacher is refused.
        precision: of the teacher's forward pass: "no" or "bf16".

    Raises:
        CheckpointError: the file is not one of this package, is damaged, or belongs to another teacher.
    """

    def __init__(self, path: str | os.PathLike[str], teacher: nn.Module, precision: str) -> None:
        self.path = Path(path)
        self._teacher = f"{checksum(teacher)} {precision}"
        self._rows: dict[bytes, int] = {}
        self._logits = torch.empty(0)
        self._missed = 0
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, batches: Iterable[Tensor], logits: Callable[[Tensor], Tensor], processes: Processes) -> None:
        """One pass over the data, unless the file was there already; several processes share the work and the result.

        Args:
            batches: inputs, as training will see them.
            logits: the teacher's forward pass.
            processes: that train together.
        """
        if self._rows:
            return

        mine: dict[bytes, Tensor] = {}
        for x in batches:
            mine.update(zip(_digests(x), logits(x).cpu(), strict=True))
        found = {key: row for part in processes.gather(mine) for key, row in part.items()}
        keys = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, _DIGEST)
        content = _Content(self._teacher, torch.from_numpy(keys.copy()), torch.stack([*found.values()]))
        processes.on_main(lambda: self._write(content))
        self._read()

    def start_epoch(self) -> None:
        """Begin to count samples that are not there."""
        self._missed = 0

    def find(self, x: Tensor) -> Tensor | None:
        """The teacher's logits (N, C) for a batch; None where some of its samples are not in the file and must be computed.

        Raises:
            QakdError: more samples are missing than the uneven end of an epoch explains.
        """
        rows = [self._rows.get(digest) for digest in _digests(x)]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows):
            return self._logits[known].to(x.device)
        # A loader with drop_last leaves out other samples in each epoch: at most a batch of them is new.
        self._missed += len(rows) - len(known)
        if self._missed > len(x) or not known:
            raise QakdError(
                f"cache_teacher: {self._missed} samples of this epoch are not in {self.path} ({len(self)} samples): the data "
                "or the augmentation changed, or the augmentation is random. Train without cache_teacher, seed the "
                "augmentation by sample, or remove the file to make it anew."
            )
        return None

    def _write(self, content: _Content) -> None:
        tensors = {"samples": content.samples, "logits": content.logits}
        facts = {"format": _FORMAT, "version": _VERSION, "teacher": content.teacher}
        write_atomic(self.path, pack(tensors, facts), CheckpointError)
        _log.info("%s: logits of %d samples.", self.path, len(content.samples))

    def _read(self) -> None:
        try:
            content = _read_old(self.path) if zipfile.is_zipfile(self.path) else _read(self.path)
        except CheckpointError as error:
            raise CheckpointError(f"cache_teacher: {self.path} is no file of logits: {error}. Remove it.") from error
        if content.teacher != self._teacher:
            raise CheckpointError(
                f"cache_teacher: {self.path} holds the logits of another teacher, or of one in another precision. Remove it, "
                "or name another file."
            )
        self._logits = content.logits
        self._rows = {key.tobytes(): row for row, key in enumerate(content.samples.numpy())}


def _read(path: Path) -> _Content:
    """A file of this version. The message of a CheckpointError is the reason alone."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error})") from error
    tensors, facts = unpack(data)
    if facts.get("format") != _FORMAT or tensors.keys() != {"samples", "logits"}:
        raise CheckpointError("this package did not write it")
    if facts.get("version") != _VERSION:
        raise CheckpointError(f"its version is {facts.get('version')}, and this package reads {_VERSION} and older ones")
    return _content(facts.get("teacher"), tensors)


def _read_old(path: Path) -> _Content:
    """A file of version 1. The message of a CheckpointError is the reason alone."""
    content = load_plain(path, mmap=True)
    if not isinstance(content, dict) or content.keys() != {"teacher", "samples", "logits"}:
        raise CheckpointError("this package did not write it")
    return _content(content["teacher"], content)


def _content(teacher: Any, tensors: dict[str, Any]) -> _Content:
    samples, logits = tensors["samples"], tensors["logits"]
    fits = (
        isinstance(samples, Tensor)
        and isinstance(logits, Tensor)
        and samples.dtype == torch.uint8
        and samples.shape == (len(logits), _DIGEST)
        and logits.is_floating_point()
        and logits.ndim == 2
    )
    if not (fits and isinstance(teacher, str)):
        raise CheckpointError("what it holds are no digests (N, 16) and logits (N, C)")
    return _Content(teacher, samples, logits)


def _digests(x: Tensor) -> list[bytes]:
    samples: Any = x.detach().contiguous().cpu().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(sample, digest_size=_DIGEST).digest() for sample in samples]
