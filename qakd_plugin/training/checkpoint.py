"""Checkpoints that are whole or not there.

The name of a file holds the first digits of its own SHA-256, so one rename makes it appear and a damaged one is recognised.
Files are read with ``weights_only=True``: tensors and plain data, never code.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout

from .._common.files import write_atomic
from ..errors import CheckpointError

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")
_REMAINS = re.compile(r"\.(step-\d{9}-[0-9a-f]{16}\.pt|history\.jsonl)\..*\.tmp")
_KEPT = 2
_LOCK, _HOLDER = ".lock", ".lock-holder.json"


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: created on the first save.
        fingerprint: plain data that says which run this is: method, toolkit, parameter shapes, length of the loader ...
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._lock = FileLock(folder / _LOCK)

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
        except OSError as problem:
            reason = problem.strerror or problem
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
            found = json.loads((self.folder / _HOLDER).read_text())
            return f"process {found['pid']} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or has just ended
            return "a process that has not said which"

    def begin(self) -> None:
        """Start a run of its own: nothing of an earlier one may be taken for its checkpoints.

        Raises:
            CheckpointError: the folder holds checkpoints already.
        """
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
        torch.save({"fingerprint": self.fingerprint, "state": state}, buffer)
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

    def load(self) -> dict[str, Any] | None:
        """State of the newest whole checkpoint, or None in an empty folder.

        Raises:
            CheckpointError: files are there but none is whole, one holds more than tensors and plain data, or it belongs to
                another run; says what differs.
        """
        self._remove_remains()
        paths, damaged = self._paths(), []
        for path in paths:
            data = path.read_bytes()
            match = _NAME.fullmatch(path.name)
            assert match is not None
            if hashlib.sha256(data).hexdigest()[:16] != match[2]:
                _log.warning("%s is damaged (its checksum does not match); using the one before it.", path.name)
                damaged.append(path)
                continue
            content = _read(path, data)
            self._check(path, content["fingerprint"])
            for useless in damaged:  # out of the way, lest they count among the two that are kept
                useless.replace(useless.with_name(f"damaged-{useless.name}"))
            self._prune()
            state: dict[str, Any] = content["state"]
            return state
        if paths:
            raise CheckpointError(f"{self.folder}: none of {len(paths)} checkpoints is whole. Remove them to start afresh.")
        return None

    def _paths(self) -> list[Path]:
        """Checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)

    def _prune(self) -> None:
        for old in self._paths()[_KEPT:]:
            old.unlink(missing_ok=True)

    def _remove_remains(self) -> None:
        """Remove what a run that was killed while it wrote has left; nobody else can know these names."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _REMAINS.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _way_on(self) -> str:
        path = self.newest()
        saved = "No checkpoint was written before it." if path is None else f"{path} and what came before it are still there."
        return f" {saved} Make room or choose another folder; resume=True goes on from the newest checkpoint."

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        for key, expected in self.fingerprint.items():
            prolonged = key == "epochs" and found.get(key, 0) < expected
            if key in found and found[key] != expected and not prolonged:  # older versions wrote down less
                there, here = _difference(found[key], expected)
                raise CheckpointError(
                    f"{path}: the checkpoint belongs to another run: {key} is {there} there and {here} here. "
                    "Use another checkpoint_dir, or resume=False after moving the old files away."
                )


def load_plain(file: Path | IO[bytes], **options: Any) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain data; code is refused.

    Args:
        file: to read.
        **options: of ``torch.load``.

    Raises:
        CheckpointError: it holds more, or is damaged. The message is the reason alone, for the caller to say which file it is.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # the unpickler raises many kinds on foreign bytes; all mean the same here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"it cannot be read as tensors and plain data ({reason})") from error


def _read(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = load_plain(io.BytesIO(data))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}. Only checkpoints that this package wrote are loaded.") from error
    if not isinstance(content, dict) or not {"fingerprint", "state"} <= content.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this package.")
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
