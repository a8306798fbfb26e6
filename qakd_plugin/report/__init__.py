"""Reports: one self-contained HTML file, Markdown and JSON beside it."""

from .document import build_document, merge_reports, read_report
from .tables import console_table
from .write import write_page, write_report

__all__ = ["build_document", "console_table", "merge_reports", "read_report", "write_page", "write_report"]
