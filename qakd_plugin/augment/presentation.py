"""A ranking for people: a table, and a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .._common.console import cell
from .._common.files import write_atomic
from .._common.score_parts import PARTS
from .cmi import AugmentationScore
from .ranking import Ranking


def console_table(ranking: Ranking) -> Table:
    """The ranking for a terminal of 80 columns, the best first."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("augmentation", overflow="fold", min_width=26)
    for heading in (f"score, {ranking.confidence:.0%}", "CMI", PARTS[ranking[0].form][1], "images"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for record in ranking:
        table.add_row(*_cells(record))
    return table


def _cells(record: AugmentationScore) -> list[str | Text]:
    spread = record.interval[1] - record.score
    note = "tied" if record.tied_with_best else ("out" if record.dropped else "")
    return [
        cell(record.name),
        f"{record.score:.3f} ± {spread:.3f}",
        f"{record.cmi:.3f}",
        f"{getattr(record, PARTS[record.form][0]):.3f}",
        str(record.num_samples),
        note,
    ]


def as_document(ranking: Ranking) -> dict[str, Any]:
    """Plain data for JSON; an interval without bounds is null."""
    records: list[dict[str, Any]] = []
    for record in ranking:
        finite = all(abs(bound) < float("inf") for bound in record.interval)
        records.append({**vars(record), "interval": list(record.interval) if finite else None})
    return {"confidence": ranking.confidence, "teacher_forwards": ranking.teacher_forwards, "records": records}


def write_records(ranking: Ranking, path: str | os.PathLike[str]) -> Path:
    """Write all figures as JSON."""
    return write_atomic(path, json.dumps(as_document(ranking), indent=1, allow_nan=False) + "\n")
