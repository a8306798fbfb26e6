"""Text from outside, as it can be shown: names come from files and recipes of others."""

from __future__ import annotations

from ..errors import written_out


def visible(text: str) -> str:
    """On one line, with what a terminal would obey written out: ESC is ``\\x1b``."""
    return written_out(" ".join(text.split()))
