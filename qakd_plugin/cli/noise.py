"""What our commands say on their way; what other packages say at each start, and nobody can act on, is left out."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from .._common.text import visible

_WARNINGS = (
    r"`torch\.jit\.script` is (deprecated|not supported)",
    r"transformers \S+ is not tested with current version of modelopt",
)
_LOGGED = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "torch.utils._pytree": "%s is an Enum subclass",  # of torchao's own
}
"""By logger, how a line begins."""

_PRINTED = re.compile(r"Inserted \d+ quantizers")
"""By ModelOpt, for each network that it prepares."""


@contextmanager
def quiet() -> Iterator[None]:
    """Until the context ends, these lines do not appear; all others do."""
    filters = {logging.getLogger(name): _not_beginning(words) for name, words in _LOGGED.items()}
    for logger, unwanted in filters.items():
        logger.addFilter(unwanted)
    try:
        with warnings.catch_warnings():
            for words in _WARNINGS:
                warnings.filterwarnings("ignore", words)
            with redirect_stdout(_Without(sys.stdout)):  # type: ignore[type-var]
                yield
    finally:
        for logger, unwanted in filters.items():
            logger.removeFilter(unwanted)


class _Without:
    """A stream that leaves out lines of :data:`_PRINTED`; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_line = False

    def write(self, text: str) -> int:
        """``print`` writes a line, and its end."""
        if self._in_line and text == "\n":
            self._in_line = False
            return len(text)
        self._in_line = _PRINTED.fullmatch(text) is not None
        return len(text) if self._in_line else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _not_beginning(words: str) -> Any:
    def kept(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(words)

    return kept


def tell(line: str) -> None:
    """A line about how far a command is, or what it chose; not with ``--quiet``."""
    if logging.getLogger(__package__).isEnabledFor(logging.WARNING):
        print(visible(line), file=sys.stderr)
