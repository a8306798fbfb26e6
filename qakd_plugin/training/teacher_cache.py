"""The teacher's logits on disk, for training data that look the same in every epoch.

Rows are found by the content of a sample, so shuffling is free and an image that is not the one that was cached is noticed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._common.files import write_atomic
from ..errors import CheckpointError, QakdError
from .checkpoint import load_plain
from .distributed.processes import Processes

_log = logging.getLogger(__name__)
_DIGEST = 16


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
        self._checksum = f"{_checksum(teacher)} {precision}"
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
        found: dict[bytes, Tensor] = {}
        for x in batches:
            found.update(zip(_digests(x), logits(x).cpu(), strict=True))
        found = {key: row for part in processes.gather(found) for key, row in part.items()}
        keys = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, _DIGEST)
        content = {
            "teacher": self._checksum,
            "samples": torch.from_numpy(keys.copy()),
            "logits": torch.stack([*found.values()]),
        }
        processes.on_main(lambda: self._write(content))
        self._read()

    def start_epoch(self) -> None:
        """Begin to count samples that are not there."""
        self._missed = 0

    def logits(self, x: Tensor, teacher: Callable[[Tensor], Tensor]) -> Tensor:
        """The teacher's logits (N, C) for a batch; samples that are not in the file are computed.

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
        return teacher(x)

    def _write(self, content: dict[str, Any]) -> None:
        write_atomic(self.path, lambda file: torch.save(content, file), CheckpointError)
        _log.info("%s: logits of %d samples.", self.path, len(content["samples"]))

    def _read(self) -> None:
        try:
            content = load_plain(self.path, mmap=True)
        except CheckpointError as error:
            raise CheckpointError(f"cache_teacher: {self.path} is no file of logits: {error}. Remove it.") from error
        if not isinstance(content, dict) or content.keys() != {"teacher", "samples", "logits"}:
            raise CheckpointError(f"cache_teacher: {self.path} is not a file of logits that this package wrote.")
        if content["teacher"] != self._checksum:
            raise CheckpointError(
                f"cache_teacher: {self.path} holds the logits of another teacher, or of one in another precision. Remove it, "
                "or name another file."
            )
        self._logits = content["logits"]
        self._rows = {key.tobytes(): row for row, key in enumerate(content["samples"].numpy())}


def _digests(x: Tensor) -> list[bytes]:
    samples: Any = x.detach().contiguous().cpu().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(sample, digest_size=_DIGEST).digest() for sample in samples]


def _checksum(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, their names and shapes."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
