"""A report's files: HTML, Markdown and JSON, of rows or of a document."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._common.files import with_extension, write_atomic
from ..bench.rows import Row
from ..bench.schema import validate
from ..errors import QakdError
from .document import build_document
from .markdown import markdown
from .page import render


def write_report(rows: Sequence[Row] | Mapping[str, Any], path: str | os.PathLike[str], **details: Any) -> Path:
    """Write ``path`` (HTML: one file, no external request), and Markdown and JSON with the same name beside it.

    Args:
        rows: from ``benchmark``, or a document from :func:`build_document`, :func:`read_report` or :func:`merge_reports`.
        path: of the HTML file; its extension may be left out.
        **details: see :func:`build_document`; for rows only, since a document holds them already.

    Returns:
        The path of the HTML file.

    Raises:
        QakdError: there is nothing to report, rows do not fit the schema, details were given for a document, or the folder
            cannot be written.
    """
    if isinstance(rows, Mapping) and details:
        raise QakdError(
            f"{', '.join(details)}: a document has them already. Give them to build_document, or change the document itself."
        )
    if not rows and not details:
        raise QakdError("rows is empty: pass what benchmark returned.")
    document = dict(rows) if isinstance(rows, Mapping) else build_document(rows, **details)
    return _write(document, path, with_json=True)


def write_page(document: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """As :func:`write_report`, without the JSON: for a document whose own JSON stays the source.

    Args:
        document: from :func:`build_document`, :func:`read_report` or :func:`merge_reports`.
        path: of the HTML file; its extension may be left out.

    Returns:
        The path of the HTML file.

    Raises:
        QakdError: the document does not fit the schema, or the folder cannot be written.
    """
    return _write(document, path, with_json=False)


def _write(document: Mapping[str, Any], path: str | os.PathLike[str], *, with_json: bool) -> Path:
    """Nothing is written before all is made."""
    validate(document)
    html = with_extension(path, ".html")
    page, text = render(document), markdown(document)
    if with_json:
        write_atomic(with_extension(html, ".json"), json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_atomic(with_extension(html, ".md"), text)
    return write_atomic(html, page)
