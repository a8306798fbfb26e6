"""Work that cannot be done twice at once in one process: threads take turns.

``torch.export``, ``torch.fx`` and ModelOpt keep state of the process while they trace or prepare a model, training draws from
the global generators, and whatever is timed must be alone. So all of it takes turns, in whatever thread it is called.

What a user calls without this package takes none: a forward pass, alone or in a loop of one's own (``attach``). While a model
is traced, torch puts a function of its own in the place of ``nn.Module.__call__``, for all threads; it comes before any hook or
lock that could be put on a model, so that such a call fails in ``torch.fx``, or the tracing does.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class _Turns:
    def __init__(self) -> None:
        self._free = threading.RLock()  # work may begin other work, as a callback that exports does
        self._working = ""

    @contextmanager
    def turn(self, work: str) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            _log.warning("%s waits for %s, which another thread of this process is in.", work, self._working or "other work")
            self._free.acquire()
        before, self._working = self._working, work
        try:
            yield
        finally:
            self._working = before
            self._free.release()


_turns = _Turns()


def _start_anew() -> None:
    """In a forked process only one thread lives on: whoever had the turn may be gone."""
    global _turns
    _turns = _Turns()


if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=_start_anew)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose calls wait until no other thread is in any function of this kind."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _turns.turn(function.__name__):
            return function(*args, **kwargs)

    return alone
