"""Libraries that print and cannot be asked not to."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(library: str) -> Iterator[None]:
    """Within the block one module of a library prints nothing. The process's streams, to which others write, stay as they are.

    Args:
        library: dotted name of the module.
    """
    names = vars(importlib.import_module(library))
    names["print"] = _nothing
    try:
        yield
    finally:
        names.pop("print", None)


def _nothing(*values: object, **options: object) -> None:
    pass
