"""In what order calls are timed that are to be compared."""

from __future__ import annotations

from collections.abc import Iterator

WARM_UP_CALLS = 10
"""Of each candidate, before the first turn."""

CALLS_PER_TURN = 5


def turns(calls: int) -> Iterator[range]:
    """Numbers of the timed calls of each turn: a candidate makes them one after the other, after one that is not timed."""
    for start in range(0, calls, CALLS_PER_TURN):
        yield range(start, min(start + CALLS_PER_TURN, calls))
