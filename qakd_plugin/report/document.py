"""What a report says, as plain data: built from rows, read from a file, merged from several."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .._common.files import read_whole
from ..bench.rows import Row
from ..bench.schema import SCHEMA_VERSION, validate
from ..deploy.file_record import finite
from ..errors import QakdError
from ..runtimes.host import environment
from .verdicts import warnings_of

_LARGEST_FILE = 64 * 2**20
"""Bytes; a thousand rows take a few MiB, and Python needs twenty times as much memory as a hostile one has bytes."""
_LISTS = ("training", "parity", "engines")


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
    """Everything a report says, as plain data that fits the schema (:mod:`qakd_plugin.bench.schema`).

    Args:
        rows: from ``benchmark``.
        title: heading.
        notes: sentences a reader should know.
        seeds: by what they seeded.
        training: {"name", "history"} of each run of ``distill``. Without it, the page shows what measured files have recorded.
        parity: {"name", ...} of each exported file: ``ParityReport.as_dict()``. Likewise.
        engines: {"name", "sha256", ...} of each engine: its manifest.

    Raises:
        QakdError: something does not fit the schema; names it.
    """
    run = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seeds": dict(seeds or {}),
        "notes": list(notes),
        "warnings": warnings_of(rows),
    }
    document = {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "created": run["created"],
        "runs": [run],
        "rows": [{**row.as_dict(), "run": 0} for row in rows],
        # Identical outputs have an infinite ratio of signal to noise, and a loss may be NaN: JSON knows neither.
        "training": [finite(dict(entry)) for entry in training],
        "parity": [finite(dict(entry)) for entry in parity],
        "engines": [dict(engine) for engine in engines],
    }
    validate(document)
    return document


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``report.json`` of this schema version or of an earlier one.

    Returns:
        The document as this version has it.

    Raises:
        QakdError: the file is missing, unreadable, no JSON, or does not fit; says where.
    """
    try:
        data = read_whole(path, _LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise QakdError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB: no report is. Name a file of write_report.")
        document = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise QakdError(f"{path} does not exist. Check the path.") from error
    except OSError as error:
        raise QakdError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    except RecursionError as error:
        raise QakdError(f"{path} is not a report: it is nested too deep. Name a file of write_report.") from error
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise QakdError(f"{path} is not valid JSON: {str(error)[:200]}. Name a file of write_report.") from error
    if not isinstance(document, dict):
        raise QakdError(f"{path} is not a report: an object is expected.")
    version = document.get("schema_version")
    if type(version) is not int or version not in range(1, SCHEMA_VERSION + 1):
        raise QakdError(
            f"{path} is not a report that this version reads: its schema_version is {str(version)[:40]!r}, "
            f"1 to {SCHEMA_VERSION} are known."
        )
    current = _from_version_1(document) if version == 1 else {**document, "schema_version": SCHEMA_VERSION}
    try:
        validate(current)
    except QakdError as error:
        raise QakdError(f"{path}: {error}") from error
    return current


def merge_reports(documents: Sequence[Mapping[str, Any]], title: str | None = None) -> dict[str, Any]:
    """One document with the runs of several, from one machine or many.

    Rows keep their run and its environment, and ratios stay what they were within it: nothing is compared across runs. Runs
    that several documents share appear once, and so do entries of training, parity and engines.

    Args:
        documents: from :func:`read_report` or :func:`build_document`.
        title: heading; the documents' own by default.

    Raises:
        QakdError: there is none, or one does not fit the schema.
    """
    if not documents:
        raise QakdError("documents is empty: name at least one report.")
    for document in documents:
        validate(document)
    merged: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "title": title or " + ".join(dict.fromkeys(document["title"] for document in documents)),
        "created": max(document["created"] for document in documents),
        **{name: [] for name in _LISTS},
    }
    runs: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for document in documents:
        for index, run in enumerate(document["runs"]):
            rows = [{**row, "run": 0} for row in document["rows"] if row.get("run", 0) == index]
            if (run, rows) not in runs:
                runs.append((run, rows))
        for name in _LISTS:
            merged[name] += [entry for entry in document.get(name, ()) if entry not in merged[name]]
    merged["runs"] = [run for run, _ in runs]
    merged["rows"] = [{**row, "run": index} for index, (_, rows) in enumerate(runs) for row in rows]
    return merged


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a document that fits the schema."""
    return [Row.from_dict(row) for row in document["rows"]]


def _from_version_1(document: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 had one run, whose parts lay in the document itself."""
    of_run = ("created", "environment", "seeds", "notes")
    run = {key: document[key] for key in of_run if key in document}
    rest = {key: value for key, value in document.items() if key not in of_run}
    return {**rest, "schema_version": SCHEMA_VERSION, "created": document.get("created"), "runs": [run]}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number.")
