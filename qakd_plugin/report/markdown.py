"""A report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..bench.rows import Row
from .document import rows_of
from .scatter import pareto
from .tables import CONFIGURATION, SideBySide, common_setting, run_names, short, shown_columns, side_by_side
from .verdicts import RULE, Recommendation, recommendations, verdicts


def markdown(document: Mapping[str, Any]) -> str:
    """All rows and what they mean; parts that need drawings are left to the page.

    Args:
        document: that fits the schema.
    """
    rows = rows_of(document)
    names, advice = run_names(document), recommendations(rows)
    lines = [f"# {_md(document['title'])}", "", _md(common_setting(rows)), ""]
    for index, (name, run) in enumerate(zip(names, document["runs"], strict=True)):
        lines += _deployment([one for one in advice if one.run == index], several=len(advice) > 1)
        lines += [f"{_md(run['created'])} on {_md(name)}, Python {_md(run['environment'].get('python', 'unknown'))}", ""]
        lines += [f"- **Warning**: {_md(text)}" for text in run.get("warnings", ())]
        lines += [f"- {_md(text)}" for text in run.get("notes", ())]
        lines += _diagnosis([row for row in rows if row.run == index])
        lines += [""]
    lines += _rows(rows, names)
    beside = side_by_side(rows)
    if beside is not None:
        lines += ["## Side by side", "", *_side_by_side(beside, names), ""]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    columns = shown_columns(rows)
    better = "better" if any(row.metrics for row in rows) else "more accurate"
    several = len(names) > 1
    header = ["", *(["machine"] if several else []), *(column.heading for column in columns)]
    lines = ["| " + " | ".join(map(_md, header)) + " |", "|" + "---|" * len(header)]
    for row, best in zip(rows, pareto(rows), strict=True):
        cells = ["*" if best else "", *([names[row.run]] if several else []), *(column.text(row) for column in columns)]
        lines.append("| " + " | ".join(map(_md, cells)) + " |")
    return [
        *lines,
        "",
        f"\\* on the left: no other row of its model, batch, threads and machine is {better} and faster.",
        "",
    ]


def _side_by_side(beside: SideBySide, names: Sequence[str]) -> list[str]:
    header = ["", "FP32", "best float", *beside.methods]
    lines = ["| " + " | ".join(map(_md, header)) + " |", "|" + "---|" * len(header)]
    for run, what, cells in beside.lines:
        first = ", ".join(
            what[index] if index < 4 else f"{CONFIGURATION[index]} {what[index]}" for index in beside.distinguishing
        )
        first += f", {names[run]}" if len(names) > 1 else ""
        lines.append("| " + " | ".join(map(_md, [first, *map(_cell, cells)])) + " |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    counted = "" if row.metric is None else f"{row.metric.text}, "
    return f"{counted}{row.p50_ms:.3f} ms"


def _deployment(advice: Sequence[Recommendation], *, several: bool) -> list[str]:
    lines = []
    for one in advice:
        start = f"{_md(one.setting)}: " if several else ""
        lines += [f"{start}{'**Deploy** ' if one.row else ''}{_md(one.text)} {_md(one.why)}".rstrip(), ""]
    return [*lines, _md(RULE), ""] if lines else []


def _diagnosis(rows: Sequence[Row]) -> list[str]:
    lines = []
    for verdict in verdicts(rows):
        lines.append(f"- {_md(verdict.text)}")
        for finding in verdict.findings:
            where = f" ({', '.join(finding.layers)})" if finding.layers else ""
            lines.append(f"  - {_md(finding.kind)}{_md(where)}: {_md(finding.advice)}")
    return lines


def _md(text: object) -> str:
    """Text from outside stays text: it cannot end a table cell, become markup or HTML, or be made a link."""
    line = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", short(text, 900))
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?i)\b(www)\.", r"\1&#46;", line).replace("://", ":&#47;&#47;").replace("@", "&#64;")
