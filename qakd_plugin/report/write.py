"""Rows or a document -> HTML, Markdown and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._common.files import write_atomic
from ..bench.rows import Row, validate
from .document import build_document
from .markdown import markdown
from .page import render


def write_report(rows: Sequence[Row] | Mapping[str, Any], path: str | os.PathLike[str], **details: Any) -> Path:
    """Write ``path`` (HTML: one file, no external request), and Markdown and JSON with the same name beside it.

    Args:
        rows: from ``benchmark``, or a document from :func:`build_document`, :func:`read_report` or :func:`merge_reports`.
        path: of the HTML file.
        **details: see :func:`build_document`.

    Returns:
        The path of the HTML file.

    Raises:
        QakdError: the rows do not fit the schema, or the folder cannot be written.
    """
    document = dict(rows) if isinstance(rows, Mapping) else build_document(rows, **details)
    return _write(document, path, with_json=True)


def write_page(document: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """As :func:`write_report`, without the JSON: for a document whose own JSON stays the source.

    Args:
        document: from :func:`build_document`, :func:`read_report` or :func:`merge_reports`.
        path: of the HTML file.

    Returns:
        The path of the HTML file.

    Raises:
        QakdError: the document does not fit the schema, or the folder cannot be written.
    """
    return _write(document, path, with_json=False)


def _write(document: Mapping[str, Any], path: str | os.PathLike[str], *, with_json: bool) -> Path:
    """Nothing is written before all is made."""
    validate(document)
    html = Path(path).with_suffix(".html")
    page, text = render(document), markdown(document)
    if with_json:
        write_atomic(html.with_suffix(".json"), json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomic(html.with_suffix(".md"), text)
    return write_atomic(html, page)
