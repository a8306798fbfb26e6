"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import QakdError

EXTENSIONS = frozenset({".onnx", ".engine", ".html", ".md", ".json", ".png", ".svg"})
"""What :func:`with_extension` takes for an extension; in ``resnet18.v2`` the dot belongs to the name."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_path(path: str | os.PathLike[str], error: type[QakdError] = QakdError) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well, remove it otherwise.

    Missing parent folders are created. The file is flushed to disk before it takes its name, so that a crash leaves either the
    old file or the new one. What the block raises passes, unless it is about writing the temporary file.

    Raises:
        error: the folder cannot be created or written, or the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, mode = _create_beside(target)
    except OSError as problem:
        raise error(f"cannot write {target}: {problem.strerror or problem}. Choose a folder that can be written.") from problem
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
        temporary.unlink(missing_ok=True)


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
        if callable(content):
            try:
                content(temporary)
            except RuntimeError as problem:  # torch.save raises nothing else where the disk is full
                reason = " ".join(str(problem).split())
                raise error(f"cannot write {path}: {reason}. Make sure that there is room on the disk.") from problem
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
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


def _create_beside(target: Path) -> tuple[Path, int]:
    """An empty file in the same folder that did not exist before, and its permissions, which the system's umask gave it."""
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return temporary, stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _cannot_write(target: Path, problem: OSError, error: type[QakdError]) -> QakdError:
    return error(f"cannot write {target}: {problem.strerror or problem}.")


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
