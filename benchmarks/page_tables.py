"""Tables of docs/ that benchmarks write from their own JSON files, each between two markers with its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qakd_plugin._common.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ROOT / "docs" / "measured.md"
AMX = "_amx"
"""How names of files and tables end whose figures are of a processor with AMX; the others are of one without."""


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(name: str, table: str, page: Path = MEASURED) -> None:
    """Put a table between the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: the file has no such markers.
    """
    before, _, after = _split(name, page)
    write_atomic(page, f"{before}{table}\n{after}")


def write_results(out: Path, document: Any, results: Path, tables: Mapping[str, str], page: Path = MEASURED) -> None:
    """Write figures as JSON; where they go to a committed file their tables go to the page, too."""
    write_atomic(out, json.dumps(document, indent=1) + "\n")
    write_tables(out, results, tables, page)


def write_tables(out: Path, results: Path, tables: Mapping[str, str], page: Path = MEASURED) -> None:
    """Put tables on the page if their figures are committed ones: in ``results``, or the file of a processor with AMX."""
    endings = {results: "", with_amx(results): AMX}
    if (ending := endings.get(out.resolve())) is not None:
        for name, table in tables.items():
            write_table(name + ending, table, page)


def with_amx(results: Path) -> Path:
    """The committed file of a processor with AMX."""
    return results.with_stem(results.stem + AMX)


def read_table(name: str, page: Path = MEASURED) -> str:
    """What stands between the markers."""
    return _split(name, page)[1]


def _split(name: str, page: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} has no table {name!r}: put {begin.strip()} and {end} around its place.")
    before, rest = text.split(begin)
    table, after = rest.split(end)
    return before + begin, table.rstrip("\n"), end + after
