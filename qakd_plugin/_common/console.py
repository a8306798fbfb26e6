"""A progress bar on terminals, a line for each epoch elsewhere; and names as cells of tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import track as rich_track
from rich.text import Text

from .text import visible

T = TypeVar("T")

_log = logging.getLogger(__name__)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar on terminals."""
    console = Console(stderr=True)
    yield from rich_track(items, description, console=console, transient=True, disable=not _is_watched(console))


def cell(text: str) -> Text:
    """Text in a table of rich: what would be its markup, or what a terminal would obey, is shown."""
    return Text(visible(text))


def say(line: str) -> None:
    """One line for the person in front of the terminal; silence elsewhere."""
    console = Console(stderr=True)
    if _is_watched(console):
        console.print(line, highlight=False, markup=False)


def _is_watched(console: Console) -> bool:
    """Whether somebody sits before the console, and has not asked for errors only."""
    return console.is_terminal and _log.isEnabledFor(logging.WARNING)


class Progress:
    """Steps done, the phase, running losses, remaining time.

    Args:
        total: steps of the whole run.
        enabled: False on all processes but the first.
    """

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        self._console = console = Console(stderr=True)
        self._silent = not enabled or console.is_terminal
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            transient=True,
            disable=not (enabled and _is_watched(console)),
        )
        self._task = self._bar.add_task("starting", total=total, losses="")
        self._means: dict[str, float] = {}

    def update(self, phase: str, losses: dict[str, float], images_per_second: float, agreement: float | None) -> None:
        """One step is done.

        Args:
            phase: its name.
            losses: of this step; their running means are shown.
            images_per_second: of this epoch.
            agreement: share of this epoch's images on which student and teacher name the same class; None without a teacher.
        """
        for name, value in losses.items():
            self._means[name] = value if name not in self._means else 0.9 * self._means[name] + 0.1 * value
        text = "  ".join(f"{name} {value:.4f}" for name, value in self._means.items())
        if agreement is not None:
            text += f"  agree {agreement:.1%}"
        self._bar.update(self._task, advance=1, description=phase, losses=f"{text}  {images_per_second:,.0f} images/s")

    def advance(self, steps: int) -> None:
        """Steps that an earlier run has done."""
        self._bar.update(self._task, advance=steps)

    def line(self, text: str, log: logging.Logger) -> None:
        """Log one line at INFO; where that is not shown, warnings are, and there is no terminal, print it."""
        log.info("%s", text)
        if not self._silent and log.isEnabledFor(logging.WARNING) and not log.isEnabledFor(logging.INFO):
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
