"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import QakdError

EXTENSIONS = frozenset({".onnx", ".engine", ".html", ".md", ".json", ".png", ".svg"})
"""What :func:`with_extension` takes for an extension; in ``resnet18.v2`` the dot belongs to the name."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_path(path: str | os.PathLike[str], error: type[QakdError] = QakdError) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well, remove it otherwise.

    Missing parent folders are created. The file is flushed to disk before it takes its name, so that a crash leaves either the
    old file or the new one, which keeps the old one's permissions; of a symbolic link the file that it leads to is replaced.
    What the block raises passes, unless it is about writing the temporary file.

    Raises:
        error: the folder cannot be created or written, the disk is full, or there is something else than a file.
    """
    try:
        target = _target(Path(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, mode = _create_beside(target)
    except (OSError, ValueError) as problem:
        raise error(f"cannot write {path}: {_reason(problem)}. Choose a folder that can be written.") from problem
    try:
        try:
            yield temporary
        except OSError as problem:
            if str(problem.filename) == str(temporary) or (problem.filename is None and problem.errno in _NO_ROOM):
                raise _cannot_write(target, problem, error) from problem
            raise
        try:
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(mode)
            temporary.replace(target)
            _flush_folder(target.parent)
        except OSError as problem:
            raise _cannot_write(target, problem, error) from problem
    finally:
        with suppress(OSError):  # the disk is gone: what happened before says so
            temporary.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str], error: type[QakdError] = QakdError) -> None:
    """Raise ``error`` where :func:`write_atomic` could not write this file now: before work begins that would be lost."""
    try:
        target = _target(Path(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, _ = _create_beside(target)
        temporary.unlink()
    except (OSError, ValueError) as problem:
        raise error(f"cannot write {path}: {_reason(problem)}. Choose a folder that can be written.") from problem


def read_whole(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """What a file holds; never waits for a pipe, and never reads a device without end.

    Args:
        path: of the file.
        most: bytes that are read of it; -1 for all.

    Raises:
        OSError: it cannot be read, or is no file; ``strerror`` is the reason in a few words.
    """
    with opened(path) as file:
        return file.read(most)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to read from, as :func:`read_whole` does.

    Raises:
        OSError: likewise.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as problem:  # a path that no system can have
        raise OSError(errno.EINVAL, str(problem), os.fspath(path)) from problem
    try:
        _require_file(os.fstat(handle).st_mode, path)
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def write_atomic(
    path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object], error: type[QakdError] = QakdError
) -> Path:
    """Write a whole file through :func:`atomic_path` and return its path.

    Args:
        path: of the file.
        content: what it holds; or what writes it to the path that it is called with, such as ``torch.save``.
        error: what is raised where it cannot be written.
    """
    with atomic_path(path, error) as temporary:
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as problem:
            if problem.filename not in (None, str(temporary)):
                raise
            raise _cannot_write(Path(path), problem, error) from problem
        except RuntimeError as problem:  # torch.save raises nothing else where the disk is full
            reason = " ".join(str(problem).split())
            raise error(f"cannot write {path}: {reason}. Make sure that there is room on the disk.") from problem
    return Path(path)


def with_extension(path: str | os.PathLike[str], extension: str) -> Path:
    """``path`` with another extension, where it has one of :data:`EXTENSIONS`; with one more otherwise.

    Args:
        path: of a file; ``Path.with_suffix`` would take "resnet18.v2" and "resnet18.v3" for the same one.
        extension: with its dot, ``".json"`` or ``".tuned.onnx"``.

    Raises:
        QakdError: the path names no file.
    """
    file = Path(path)
    if file.name in {"", ".."}:
        raise QakdError(f"{os.fspath(path)!r} names no file: give a file name, with or without the extension {extension}.")
    return file.with_name((file.stem if file.suffix.lower() in EXTENSIONS else file.name) + extension)


def _target(path: Path) -> Path:
    """Where a file of this path is written.

    Raises:
        OSError: there is something that is no file.
        ValueError: no system can have such a path.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if os.path.lexists(target):
        _require_file(target.stat().st_mode, target)
    return target


def _require_file(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "It is a pipe, a socket or a device, and no file", os.fspath(path))


def _create_beside(target: Path) -> tuple[Path, int]:
    """An empty file in the same folder that did not exist before, and the permissions that the target is to have: those it has,
    or those that the system's umask gives."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    temporary = target.parent / f".{target.name[:50]}.{secrets.token_hex(8)}.tmp"  # a name of 255 bytes has no room for more
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return temporary, stat.S_IMODE(os.fstat(handle).st_mode) if mode is None else mode
    finally:
        os.close(handle)


def _cannot_write(target: Path, problem: OSError, error: type[QakdError]) -> QakdError:
    return error(f"cannot write {target}: {_reason(problem)}.")


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)


def _flush_folder(folder: Path) -> None:
    """Let a rename reach the disk as well; systems that cannot open folders (Windows) do so by themselves."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):  # some network file systems refuse; the file has its name already
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
