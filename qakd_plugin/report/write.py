"""Rows -> document -> HTML, Markdown, JSON and a table on the console."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .._files import write_atomic
from ..bench.environment import environment
from ..bench.record import SCHEMA_VERSION, Row, validate
from ..errors import QakdError
from .plot import accuracy_latency_plot, pareto

_HEADINGS = (
    "", "model", "runtime", "batch", "accuracy %", "95 % interval", "p50 ms", "p90 ms", "images/s", "x FP32", "int layers",
    "MiB",
)  # fmt: skip


def build_document(
    rows: Sequence[Row],
    *,
    title: str = "Accuracy and latency",
    notes: Sequence[str] = (),
    seeds: Mapping[str, int] | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    parity: Sequence[Mapping[str, Any]] = (),
    engines: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Everything a report says, as plain data that fits the schema.

    Args:
        rows: from ``benchmark``.
        title: heading.
        notes: sentences a reader should know.
        seeds: by what they seeded.
        training: {"name", "history"} of each run.
        parity: {"name", ...} of each exported file.
        engines: {"name", "sha256", ...} of each engine.

    Raises:
        QakdError: something does not fit the schema; names it.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seeds": dict(seeds or {}),
        "rows": [row.as_dict() for row in rows],
        "notes": list(notes),
        "training": [dict(run) for run in training],
        "parity": [dict(entry) for entry in parity],
        "engines": [dict(engine) for engine in engines],
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))
    validate(plain)
    return plain


def write_report(rows: Sequence[Row] | Mapping[str, Any], path: str | os.PathLike[str], **details: Any) -> Path:
    """Write ``path`` (HTML: one file, no external request), and Markdown and JSON with the same name beside it.

    Args:
        rows: from ``benchmark``, or a document from :func:`build_document` or :func:`read_report`.
        path: of the HTML file.
        **details: see :func:`build_document`.

    Returns:
        The path of the HTML file.

    Raises:
        QakdError: the rows do not fit the schema, or the folder cannot be written.
    """
    document = dict(rows) if isinstance(rows, Mapping) else build_document(rows, **details)
    validate(document)
    html = Path(path).with_suffix(".html")
    write_atomic(html.with_suffix(".json"), json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomic(html.with_suffix(".md"), markdown(document))
    write_atomic(html, _render(document))
    return html


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``report.json`` that fits the schema.

    Raises:
        QakdError: the file is missing, is no JSON, or does not fit.
    """
    try:
        document = json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise QakdError(f"{path} does not exist.") from error
    except OSError as error:
        raise QakdError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise QakdError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise QakdError(f"{path} is not a report: an object is expected.")
    validate(document)
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def console_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The report's table for a terminal of 80 columns: what tells the rows apart, and the figures that matter most."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    wanted = {"", "model", "accuracy %", "p50 ms", "images/s", "x FP32", "int layers"}
    wanted |= {"runtime"} if len({row.runtime for row in rows}) > 1 else set()
    wanted |= {"batch"} if len({row.batch for row in rows}) > 1 else set()
    shown = [index for index, heading in enumerate(_HEADINGS) if heading in wanted]
    for index in shown:
        table.add_column(_HEADINGS[index], justify="left" if index in (1, 2) else "right", no_wrap=True)
    for cells in _table(rows):
        table.add_row(*[cells[index] for index in shown])
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    rows = [Row(**row) for row in document["rows"]]
    env = document["environment"]
    lines = [f"# {_md(document['title'])}", "", f"{document['created']} on {_md(str(env.get('cpu')))}, {env.get('python')}", ""]
    lines += ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    lines += ["| " + " | ".join(map(_md, cells)) + " |" for cells in _table(rows)]
    lines += ["", "* on the left: no other row is both more accurate and faster.", ""]
    lines += [f"- {_md(note)}" for note in document.get("notes", [])]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """Text of every cell; rows name their model where there are several."""
    several = len({row.model for row in rows}) > 1
    return [_cells(row, best, several) for row, best in zip(rows, pareto(rows), strict=True)]


def _cells(row: Row, best: bool, several: bool) -> list[str]:
    interval = "-" if row.accuracy_low is None else f"{100 * row.accuracy_low:.1f} to {100 * (row.accuracy_high or 0):.1f}"
    return [
        "*" if best else "",
        f"{row.model} {row.name}" if several else row.name,
        f"{row.runtime} {row.precision}",
        str(row.batch),
        "-" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
        interval,
        f"{row.p50_ms:.3f}",
        "-" if row.p90_ms is None else f"{row.p90_ms:.3f}",
        f"{row.throughput:,.0f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}",
        "-" if row.total_layers is None else f"{row.integer_layers}/{row.total_layers}",
        f"{row.file_mib:.2f}",
    ]


def _render(document: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qakd_plugin.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    rows = [Row(**row) for row in document["rows"]]
    return environment.get_template("template.html").render(
        document=document,
        headings=_HEADINGS,
        cells=_table(rows),
        plot=accuracy_latency_plot(rows),
    )


def _md(text: str) -> str:
    """Text from outside must not break out of a table cell or become markup."""
    escaped = text.replace("\\", "\\\\").replace("\n", " ").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace(">", "&gt;").replace("`", "\\`").replace("[", "\\[")
