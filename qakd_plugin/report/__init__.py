"""Reports: one self-contained HTML file, Markdown and JSON beside it."""

from .write import build_document, console_table, read_report, write_report

__all__ = ["build_document", "console_table", "read_report", "write_report"]
