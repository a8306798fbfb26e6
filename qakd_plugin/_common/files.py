"""Files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import QakdError


@contextmanager
def atomic_path(path: str | os.PathLike[str], error: type[QakdError] = QakdError) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well, remove it otherwise.

    Missing parent folders are created. The file is flushed to disk before it takes its name, so that a crash leaves either the
    old file or the new one.

    Raises:
        error: the folder cannot be created or written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as problem:
        raise error(f"cannot write {target}: {problem.strerror or problem}. Choose a folder that can be written.") from problem
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        _flush_folder(target.parent)
    except OSError as problem:
        raise error(f"cannot write {target}: {problem.strerror or problem}.") from problem
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str, error: type[QakdError] = QakdError) -> Path:
    """Write a whole file through :func:`atomic_path` and return its path."""
    with atomic_path(path, error) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
