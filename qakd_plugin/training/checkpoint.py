"""Checkpoints that are whole or not there.

The name of a file holds the first digits of its own SHA-256, so one rename makes it appear and a damaged one is recognised.
It says which format it has, and is read as tensors and plain data, never code. A checkpoint whose numbers are not finite is
passed over, as a damaged one is.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .._common.files import read_whole, require_writable, write_atomic
from .._common.torch_file import load_plain, tensors_of
from ..errors import CheckpointError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")
_REMAINS = re.compile(r"\.(step-\d{9}-[0-9a-f]{16}\.pt|history\.jsonl|\.lock-holder\.json)\.[0-9a-f]{16}\.tmp")
_KEPT = 2
_LOCK, _HOLDER = ".lock", ".lock-holder.json"
_FORMAT, _VERSION = "qakd checkpoint", "2"
"""Version 1 did not say what it was."""


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: created on the first save.
        fingerprint: plain data that says which run this is: method, toolkit, parameter shapes, length of the loader ...
        hidden: why this run cannot go on with the same bits, and what to do; None where it can.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], hidden: str | None = None) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._hidden = hidden
        self._lock = FileLock(folder / _LOCK)

    def require_writable(self) -> None:
        """Raise CheckpointError where nothing could be written: before anything is computed that would be lost."""
        require_writable(self.folder / "history.jsonl", CheckpointError)

    def lock(self) -> None:
        """Take the folder for this process, until :meth:`unlock` or its death: two runs would prune each other's files.

        Raises:
            CheckpointError: another run has it, or it cannot be written; names it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as taken:
            raise CheckpointError(
                f"checkpoint_dir={self.folder} is in use by another run ({self._holder()}). Wait for its end, stop it, or "
                "choose another folder."
            ) from taken
        except NotImplementedError:
            _log.warning("%s is on a file system without locks: see to it that no other run writes there.", self.folder)
            return
        except (OSError, ValueError) as problem:  # the second for a path that no system can have
            reason = getattr(problem, "strerror", None) or problem
            raise CheckpointError(f"cannot write {self.folder}: {reason}. Choose a folder that can be written.") from problem
        holder = json.dumps({"pid": os.getpid(), "host": platform.node()})
        write_atomic(self.folder / _HOLDER, holder, CheckpointError)

    def unlock(self) -> None:
        """Give the folder back; nothing of the lock is left in it."""
        if not self._lock.is_locked:
            return
        for name in (_HOLDER, _LOCK):
            with suppress(OSError):  # a system where what is open cannot be removed: the next run takes it over
                (self.folder / name).unlink(missing_ok=True)
        self._lock.release()

    def _holder(self) -> str:
        try:
            found = json.loads(read_whole(self.folder / _HOLDER))
            return f"process {found['pid']} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has just begun, or has just ended
            return "a process that has not said which"

    def begin(self) -> None:
        """Start a run of its own: nothing of an earlier one may be taken for its checkpoints.

        Raises:
            CheckpointError: the folder holds checkpoints already.
        """
        self._say_what_is_hidden()
        if (path := self.newest()) is not None:
            raise CheckpointError(
                f"checkpoint_dir={self.folder} holds the checkpoints of an earlier run ({path.name}). Pass resume=True to go "
                "on with it, or choose another folder."
            )
        self._remove_remains()

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and drop all but the newest two. A failed write loses nothing already saved.

        Raises:
            CheckpointError: it cannot be written; says which one is the last.
        """
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "version": _VERSION, "fingerprint": self.fingerprint, "state": state}, buffer)
        data = buffer.getvalue()
        name = f"step-{step:09d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        try:
            path = write_atomic(self.folder / name, data, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._way_on()}") from error
        self._prune()
        return path

    def save_history(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write ``history.jsonl``, one row a line.

        Raises:
            CheckpointError: it cannot be written.
        """
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            write_atomic(self.folder / "history.jsonl", lines, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._way_on()}") from error

    def newest(self) -> Path | None:
        """The newest file, whole or not."""
        return next(iter(self._paths()), None)

    def before(self, step: int) -> tuple[Path | None, Path | None]:
        """The newest file of an earlier step, and that of this step or of a later one; None for none."""
        paths = self._paths()
        earlier = (path for path in paths if _step(path) < step)
        return next(earlier, None), next((path for path in paths if _step(path) >= step), None)

    def load(self, *, force: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole and finite, and its state; or None in an empty folder.

        Args:
            force: also of a run that another fingerprint describes; a warning says what differs.

        Raises:
            CheckpointError: files are there but none is whole and finite, one holds more than tensors and plain data, or it
                belongs to another run; says what differs.
        """
        self._remove_remains()
        paths, useless = self._paths(), list[tuple[Path, str]]()
        for path in paths:
            try:
                data = read_whole(path)
            except OSError as problem:
                useless.append((path, f"it cannot be read: {problem.strerror or problem}"))
                continue
            if hashlib.sha256(data).hexdigest()[:16] != _named(path)[2]:
                useless.append((path, "it is damaged: its checksum does not match"))
                continue
            content = _read(path, data)
            if (name := not_finite(content["state"])) is not None:
                useless.append((path, f"its {name} is not finite"))
                continue
            self._check(path, content["fingerprint"], force)
            if self._hidden is not None and not force:
                raise CheckpointError(f"{path}: {self._hidden}.")
            self._put_aside(useless)
            self._prune()
            return path, content["state"]
        if paths:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in useless)
            raise CheckpointError(
                f"{self.folder}: none of {len(paths)} checkpoints is whole ({reasons}). Remove them to start afresh."
            )
        self._say_what_is_hidden()
        return None

    def _say_what_is_hidden(self) -> None:
        if self._hidden is not None:
            _log.warning("This run will not go on bit-identically after an interruption. %s.", self._hidden)

    def _put_aside(self, useless: Sequence[tuple[Path, str]]) -> None:
        """Out of the way, lest they count among the two that are kept."""
        for path, reason in useless:
            _log.warning("%s is put aside (%s); the one before it is used.", path, reason)
            with suppress(OSError):  # in a folder that cannot be written, the next save says so
                path.replace(path.with_name(f"damaged-{path.name}"))

    def _paths(self) -> list[Path]:
        """Checkpoints, the newest first."""
        return sorted((path for path in self._entries() if _NAME.fullmatch(path.name)), reverse=True)

    def _entries(self) -> list[Path]:
        try:
            return [*self.folder.iterdir()] if self.folder.is_dir() else []
        except OSError as problem:
            reason = problem.strerror or problem
            raise CheckpointError(
                f"cannot look into checkpoint_dir={self.folder}: {reason}. Choose another folder."
            ) from problem

    def _prune(self) -> None:
        for old in self._paths()[_KEPT:]:
            _remove(old)

    def _remove_remains(self) -> None:
        """Remove what a run that was killed while it wrote has left; nobody else can know these names."""
        for path in self._entries():
            if _REMAINS.fullmatch(path.name):
                _remove(path)

    def _way_on(self) -> str:
        path = self.newest()
        saved = "No checkpoint was written before it." if path is None else f"{path} and what came before it are still there."
        return f" {saved} Make room or choose another folder; resume=True goes on from the newest checkpoint."

    def _check(self, path: Path, found: dict[str, Any], force: bool) -> None:
        for key, expected in self.fingerprint.items():
            prolonged = key == "epochs" and type(found.get(key)) is int and found[key] < expected
            if key in found and (found[key] == expected or prolonged):
                continue
            there, here = _difference(found.get(key), expected)
            differs = f"{path}: the checkpoint belongs to another run: {key} is {there} there and {here} here"
            if not force:
                raise CheckpointError(
                    f"{differs}. Use another checkpoint_dir, or resume=False after moving the old files away; or, to go on all "
                    'the same and with other numbers, resume="force".'
                )
            _log.warning('%s. resume="force" goes on with it.', differs)


def not_finite(state: Mapping[str, Any]) -> str | None:
    """Which number of a run is not finite: of a network's parameters and statistics, an average or an optimizer's state.

    Args:
        state: of the parts of a run, by name.

    Returns:
        Where it stands, e.g. ``"student.bn1.running_var"``; None where all are finite. Infinite values of other buffers, as
        ranges have that saw nothing yet, are none.
    """
    for part, content in state.items():
        for name, tensor in _tensors(content, ()):
            if _is_finite(tensor):
                continue
            of_layer = name[-1].rpartition(".")[2].startswith(("weight", "bias", "running_"))
            if bool(torch.isnan(tensor).any()) or of_layer or part.endswith("optimizer"):
                return ".".join([part, *name])
    return None


def _tensors(content: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Floating-point tensors in nested mappings and sequences, each with the keys that lead to it."""
    if isinstance(content, Tensor):
        if content.is_floating_point():
            yield name, content
    elif isinstance(content, Mapping):
        for key, part in content.items():
            yield from _tensors(part, (*name, str(key)))
    elif isinstance(content, list | tuple):
        for index, part in enumerate(content):
            yield from _tensors(part, (*name, str(index)))


def _is_finite(tensor: Tensor) -> bool:
    """A sum takes no memory, and is finite where no number is not, unless it overflows."""
    if tensor.element_size() == 1:  # types of eight bits do not compute
        tensor = tensor.float()
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _named(path: Path) -> re.Match[str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match


def _step(path: Path) -> int:
    return int(_named(path)[1])


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as problem:  # it does no harm where it is
        _log.warning("cannot remove %s: %s.", path, problem.strerror or problem)


_ELSEWHERE = "Only checkpoints that this package wrote are loaded: choose another checkpoint_dir."


def _read(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = load_plain(data, intact=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}. {_ELSEWHERE}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("fingerprint", "state")):
        raise CheckpointError(f"{path}: not a checkpoint of this package. {_ELSEWHERE}")
    if any(True for key in content.keys() - {"state"} for _ in tensors_of(content[key])):  # they are compared, which makes more
        raise CheckpointError(f"{path}: not a checkpoint of this package: it says what it is in tensors. {_ELSEWHERE}")
    found = content.get("format"), content.get("version")
    if found != (_FORMAT, _VERSION):
        raise CheckpointError(
            f"{path}: another version of this package wrote it (its format is {found[1] or '1'}, and {_VERSION} is read). "
            "Finish the run with that version, or choose another checkpoint_dir."
        )
    return content


def _difference(there: Any, here: Any) -> tuple[str, str]:
    """What differs, in few words: of two lists the first entry that does."""
    if isinstance(there, list) and isinstance(here, list):
        pairs = zip_longest(there, here, fillvalue="nothing")
        there, here = next(pair for pair in pairs if pair[0] != pair[1])
    return _short(there), _short(here)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
