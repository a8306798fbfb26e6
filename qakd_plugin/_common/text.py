"""Text from outside, as it can be shown: names come from files and recipes of others."""

from __future__ import annotations


def visible(text: str) -> str:
    """On one line, with what a terminal would obey written out: ESC is ``\\x1b``."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)
