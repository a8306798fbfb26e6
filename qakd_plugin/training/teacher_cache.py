"""What the teacher outputs, on disk, for training data that look the same in every epoch.

Rows are found by the content of a sample, all of its input tensors, so shuffling is free and a sample that is not the one that
was cached is noticed. The file is safetensors: ``samples`` (N, 16) uint8, the digest of each sample, and ``outputs.PATH``
(N, ...) for each output that is kept; its header says what they are of, with a digest of their bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._common.files import read_whole, require_writable, write_atomic
from .._common.tensor_file import pack, unpack
from .._common.torch_file import load_plain
from ..errors import CheckpointError, QakdError
from ..tasks.inputs import Inputs, device_of, named_tensors, sample_count
from ..tasks.outputs import SINGLE, Outputs, listed
from .distributed.processes import Processes
from .teachers import checksum

_log = logging.getLogger(__name__)
_DIGEST = 16
_FORMAT, _VERSION = "qakd_plugin teacher logits", "3"
"""Version 2 held "logits" (N, C) alone, under that name; version 1 was the same as a file of ``torch.save``, without a digest
of its own. Both are still read."""
_PREFIX = "outputs."


@dataclass(frozen=True)
class _Content:
    teacher: str
    samples: Tensor
    outputs: dict[str, Tensor]


class TeacherCache:
    """Outputs of a frozen teacher by the content of each sample.

    Args:
        path: the file; read where it exists, else written by :meth:`fill`.
        teacher: its checksum goes into the file, and a file of another teacher is refused.
        precision: of the teacher's forward pass: "no" or "bf16".

    Raises:
        CheckpointError: the file is not one of this package, is damaged, belongs to another teacher, or could not be written.
    """

    def __init__(self, path: str | os.PathLike[str], teacher: nn.Module, precision: str) -> None:
        self.path = Path(path)
        self._teacher = f"{checksum(teacher)} {precision}"
        self._rows: dict[bytes, int] = {}
        self._outputs: dict[str, Tensor] = {}
        self._missed = 0
        if os.path.exists(self.path):  # Path.exists raises where it may not look
            self._read()
        else:
            require_writable(self.path, CheckpointError)

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, batches: Iterable[Inputs], outputs: Callable[[Inputs], Outputs], processes: Processes) -> None:
        """One pass over the data, unless the file was there already; several processes share the work and the result.

        Args:
            batches: inputs, as training will see them.
            outputs: the teacher's forward pass: what is to be kept of it, by path, (N, ...) each.
            processes: that train together.

        Raises:
            QakdError: a batch or an output cannot be taken apart into samples, or samples differ in shape.
        """
        if self._rows:
            return

        mine: dict[bytes, dict[str, Tensor]] = {}
        for inputs in batches:
            digests = _digests(inputs)
            columns = {name: tensor.cpu() for name, tensor in outputs(inputs).items()}
            _require_rows(columns, len(digests))
            mine.update((digest, {name: rows[i] for name, rows in columns.items()}) for i, digest in enumerate(digests))
        found = {key: row for part in processes.gather(mine) for key, row in part.items()}
        keys = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, _DIGEST)
        content = _Content(self._teacher, torch.from_numpy(keys.copy()), _stacked([*found.values()]))
        processes.on_main(lambda: self._write(content))
        self._read()

    def require(self, names: Iterable[str]) -> None:
        """Raise CheckpointError where a file that was there already lacks an output that training compares."""
        missing = [name for name in names if name not in self._outputs]
        if self._rows and missing:
            raise CheckpointError(
                f"cache_teacher: {self.path} holds {listed(self._outputs)} and not {missing[0]!r}, which match compares. "
                "Remove it, or name another file."
            )

    def start_epoch(self) -> None:
        """Begin to count samples that are not there."""
        self._missed = 0

    def find(self, inputs: Inputs) -> Outputs | None:
        """What the teacher outputs for a batch, by path, (N, ...) each; None where some of its samples are not in the file and
        must be computed.

        Raises:
            QakdError: more samples are missing than the uneven end of an epoch explains.
        """
        rows = [self._rows.get(digest) for digest in _digests(inputs)]
        known = [row for row in rows if row is not None]
        if len(known) == len(rows):
            return {name: tensor[known].to(device_of(inputs)) for name, tensor in self._outputs.items()}
        # A loader with drop_last leaves out other samples in each epoch: at most a batch of them is new.
        self._missed += len(rows) - len(known)
        if self._missed > len(rows) or not known:
            raise QakdError(
                f"cache_teacher: {self._missed} samples of this epoch are not in {self.path} ({len(self)} samples): the data "
                "or the augmentation changed, or the augmentation is random, or sequences are padded to the longest of a "
                "batch. Train without cache_teacher, seed the augmentation by sample, pad to one length, or remove the file "
                "to make it anew."
            )
        return None

    def _write(self, content: _Content) -> None:
        tensors = {"samples": content.samples, **{_PREFIX + name: tensor for name, tensor in content.outputs.items()}}
        facts = {"format": _FORMAT, "version": _VERSION, "teacher": content.teacher}
        write_atomic(self.path, pack(tensors, facts), CheckpointError)
        _log.info("%s: %s of %d samples.", self.path, ", ".join(content.outputs), len(content.samples))

    def _read(self) -> None:
        try:
            content = _read(self.path)
        except CheckpointError as error:
            raise CheckpointError(
                f"cache_teacher: {self.path} is no file of a teacher's outputs: {error}. Remove it."
            ) from error
        if content.teacher != self._teacher:
            raise CheckpointError(
                f"cache_teacher: {self.path} holds the outputs of another teacher, or of one in another precision. Remove it, "
                "or name another file."
            )
        self._outputs = content.outputs
        self._rows = {key.tobytes(): row for row, key in enumerate(content.samples.numpy())}


def _read(path: Path) -> _Content:
    """A file of any version. The message of a CheckpointError is the reason alone."""
    try:
        data = read_whole(path)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror or error})") from error
    if data.startswith(b"PK"):
        return _read_version_1(load_plain(data))
    tensors, facts = unpack(data)
    if facts.get("format") != _FORMAT or "samples" not in tensors:
        raise CheckpointError("this package did not write it")
    if facts.get("version") == "2":
        return _of_logits(facts.get("teacher"), tensors)
    if facts.get("version") != _VERSION:
        raise CheckpointError(f"its version is {facts.get('version')}, and this package reads {_VERSION} and older ones")
    samples = tensors.pop("samples")
    return _content(facts.get("teacher"), samples, {name.removeprefix(_PREFIX): rows for name, rows in tensors.items()})


def _read_version_1(content: Any) -> _Content:
    if not isinstance(content, dict) or "teacher" not in content:
        raise CheckpointError("this package did not write it")
    return _of_logits(content.pop("teacher"), content)


def _of_logits(teacher: Any, tensors: dict[str, Any]) -> _Content:
    if tensors.keys() != {"samples", SINGLE}:
        raise CheckpointError("this package did not write it")
    return _content(teacher, tensors["samples"], {SINGLE: tensors[SINGLE]})


def _content(teacher: Any, samples: Any, outputs: dict[str, Any]) -> _Content:
    fits = isinstance(samples, Tensor) and samples.dtype == torch.uint8 and samples.ndim == 2 and samples.shape[1] == _DIGEST
    fits = fits and bool(outputs) and all(isinstance(rows, Tensor) and rows.ndim > 0 for rows in outputs.values())
    fits = fits and all(rows.layout == torch.strided for rows in (samples, *outputs.values()))
    if not (fits and isinstance(teacher, str) and all(len(rows) == len(samples) for rows in outputs.values())):
        raise CheckpointError("what it holds are no digests (N, 16) and outputs (N, ...)")
    if not len(samples):
        raise CheckpointError("it holds no sample")
    return _Content(teacher, samples, outputs)


def _require_rows(columns: Mapping[str, Tensor], count: int) -> None:
    """Raise QakdError where an output does not hold one row for each sample."""
    for name, tensor in columns.items():
        if tensor.ndim == 0 or len(tensor) != count:
            raise QakdError(
                f"cache_teacher: the teacher outputs {name!r} as {tuple(tensor.shape)} for {count} samples, which is no row "
                "for each. Leave cache_teacher out, or match another output."
            )


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all samples together, by output.

    Raises:
        QakdError: they differ in shape.
    """
    for name in rows[0]:
        shapes = sorted({tuple(row[name].shape) for row in rows})
        if len(shapes) > 1:
            raise QakdError(
                f"cache_teacher: the teacher outputs {name!r} as {shapes[0]} for one sample and as {shapes[-1]} for another. "
                "Pad all batches to one length and images to one size, or leave cache_teacher out."
            )
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _digests(inputs: Inputs) -> list[bytes]:
    """One for each sample; of a single tensor, of its bytes alone."""
    if isinstance(inputs, Tensor):
        return [hashlib.blake2b(row, digest_size=_DIGEST).digest() for row in _bytes_of_rows(inputs)]
    if isinstance(inputs, list):
        raise QakdError("cache_teacher: a list of images has no rows to be found again. Leave cache_teacher out.")
    count, tensors = sample_count(inputs), named_tensors(inputs)
    hashes = [hashlib.blake2b(digest_size=_DIGEST) for _ in range(count)]
    for name, tensor in tensors.items():
        # What all samples share (a scalar, positions of one row) is part of each.
        own = tensor.ndim > 0 and len(tensor) == count
        shape = tuple(tensor.shape[1:]) if own else tuple(tensor.shape)
        rows = _bytes_of_rows(tensor) if own else [_bytes_of_rows(tensor[None])[0]] * count
        for digest, row in zip(hashes, rows, strict=True):
            digest.update(f"{name} {tensor.dtype} {shape} ".encode())
            digest.update(row)
    return [digest.digest() for digest in hashes]


def _bytes_of_rows(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().cpu().reshape(len(tensor), -1).view(torch.uint8).numpy()
