"""Files that a command is to write: tried before its work starts, never one that it reads, replaced with --force only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .._common.files import atomic_path
from ..errors import QakdError


class _Tried(Exception):
    pass


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path | str | None], *, force: bool, flag: str = "--out") -> None:
    """See to it that files can be written, and that nothing is lost.

    Args:
        outputs: what the command writes.
        inputs: what it reads: files, and MODULE:FUNCTION of a recipe, whose file is the module's.
        force: whether files that are there are replaced.
        flag: that names the outputs, for errors.

    Raises:
        QakdError: an output is an input, is there already, or cannot be written.
    """
    read = [path for given in inputs if given is not None and os.path.exists(path := _file_of(given))]
    for path in outputs:
        there = os.path.exists(path)
        if os.path.isdir(path):
            raise QakdError(f"{flag}: {path} is a folder. Name a file.")
        lost = next((given for given in read if there and path.samefile(given)), None)
        if lost is not None:
            raise QakdError(f"{flag}: {path} would replace {lost}, which is read. Name another file.")
        if there and not force:
            raise QakdError(f"{flag}: {path} is there already. Name another file, or pass --force to replace it.")
        _try(path)


def check_folder(folder: Path, results: Iterable[str], *, resume: bool) -> None:
    """See to it that a run can write into its folder, and that it replaces nothing of another run.

    Args:
        folder: of checkpoints.
        results: files that the run ends with.
        resume: whether it goes on with the run that is there.

    Raises:
        QakdError: a file is in the folder's place or one of another run in the result's, or nothing can be written there.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise QakdError(f"--out: {folder} is a file. Name a folder.")
    for path in (folder / name for name in results):
        if not resume and os.path.exists(path):
            raise QakdError(f"--out: {path} is there already. Name another folder, or pass --resume to go on with its run.")
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one tries: they would remove each other's folder
            _try(path)


def _file_of(given: Path | str) -> Path:
    module, colon, _ = str(given).partition(":")
    return Path(module.replace(".", "/") + ".py") if colon and not os.path.exists(given) else Path(given)


def _try(path: Path) -> None:
    """Write beside a path what is removed again, with the folders that had to be made."""
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with suppress(_Tried), atomic_path(path):
            raise _Tried
    finally:
        for folder in made:
            with suppress(OSError):  # another one writes there by now, or it was never made
                folder.rmdir()
