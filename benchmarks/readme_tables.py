"""Tables in the README that benchmarks write from their own JSON files, each between two markers with its name."""

from __future__ import annotations

from pathlib import Path

from qakd_plugin._files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(name: str, table: str, readme: Path = README) -> None:
    """Put a table between the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: the file has no such markers.
    """
    before, _, after = _split(name, readme)
    write_atomic(readme, f"{before}{table}\n{after}")


def read_table(name: str, readme: Path = README) -> str:
    """What stands between the markers."""
    return _split(name, readme)[1]


def _split(name: str, readme: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    text = readme.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme} has no table {name!r}: put {begin.strip()} and {end} around its place.")
    before, rest = text.split(begin)
    table, after = rest.split(end)
    return before + begin, table.rstrip("\n"), end + after
