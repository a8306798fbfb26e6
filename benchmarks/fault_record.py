"""What a trial of faults has found, kept in a file so that a trial that was stopped goes on: a part of ``faults.py``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Finding = tuple[str, str | None]
"""What came of something that was tried; and what was lost, in one line, or None."""


class Record:
    """The trials that were done, a line of JSON each.

    Args:
        path: of the file; None for none.
        run: what the trials are drawn from, and of which version: with another run nothing in the file counts.

    Raises:
        SystemExit: the file is of another run.
    """

    def __init__(self, path: Path | None = None, run: dict[str, Any] | None = None) -> None:
        self._path = path
        self._done: dict[tuple[str, str], tuple[list[Finding], float]] = {}
        if path is None:
            return
        if not path.exists():
            path.write_text(json.dumps(run) + "\n")
            return
        first, *lines = path.read_text().splitlines()
        if json.loads(first) != run:
            raise SystemExit(f"--record: {path} is of {first}, and this run is {json.dumps(run)}: name another file.")
        for line in lines:
            part, trial, findings, seconds = json.loads(line)
            self._done[part, trial] = [(outcome, lost) for outcome, lost in findings], seconds

    def carry_out(self, part: str, trial: str, work: Callable[[], list[Finding]]) -> tuple[list[Finding], float]:
        """What a trial finds, and its seconds: now, or as the file has it."""
        if (part, trial) not in self._done:
            started = time.monotonic()
            findings = work()
            self._done[part, trial] = findings, time.monotonic() - started
            if self._path is not None:
                with open(self._path, "a") as file:
                    file.write(json.dumps([part, trial, *self._done[part, trial]]) + "\n")
        return self._done[part, trial]


@dataclass
class Tally:
    """What one part of the trial has tried.

    Attributes:
        part: its name.
        record: of the trials that are done.
        outcomes: how often each came about.
        lost: what must not be, a line each.
        seconds: that it took.
    """

    part: str
    record: Record = field(default_factory=Record)
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def carry_out(self, trial: str, work: Callable[[], list[Finding]]) -> None:
        """Do what a trial does, if it is not done yet, and count what it finds."""
        findings, seconds = self.record.carry_out(self.part, trial, work)
        self.seconds += seconds
        for outcome, lost in findings:
            self.outcomes[outcome if lost is None else "lost"] += 1
            if lost is not None:
                self.lost.append(lost)

    def __str__(self) -> str:
        found = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.outcomes.items()))
        return f"{self.part}: {sum(self.outcomes.values())} tried: {found} ({self.seconds:.0f} s)"
