"""Reports: one self-contained HTML file, Markdown and JSON beside it.

Names are imported when they are first used: what draws and checks reports takes longer to import than this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.lazy import lazy

__all__ = ["build_document", "console_table", "merge_reports", "read_report", "write_page", "write_report"]

if TYPE_CHECKING:
    from .document import build_document as build_document
    from .document import merge_reports as merge_reports
    from .document import read_report as read_report
    from .tables import console_table as console_table
    from .write import write_page as write_page
    from .write import write_report as write_report

_HOME = {
    "build_document": "document",
    "console_table": "tables",
    "merge_reports": "document",
    "read_report": "document",
    "write_page": "write",
    "write_report": "write",
}

__getattr__ = lazy(__name__, _HOME)
