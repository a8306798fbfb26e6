"""Everything this package raises on purpose, under one base class."""

from __future__ import annotations

import re

_OF_A_WORKER = re.compile(r"\ACaught \w+ in DataLoader worker process \d+\..*\n[\w.]+: ", re.DOTALL)
"""What torch writes before an error of a loader's worker, its traceback included."""

_LINE_BREAK = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")

KEEP_FLOAT = "Prepare the model with this layer in floating point (keep=...)."
"""What to do about a layer that cannot be written, or not proven."""


class QakdError(Exception):
    """Base class: the message says what was wrong, where, and what to do.

    It is one line, whatever it quotes: names come from files of others. What a terminal would obey is written out (``\\x1b``).
    """

    def __init__(self, message: object = "") -> None:
        line = _LINE_BREAK.sub(" ", _OF_A_WORKER.sub("", str(message)).strip())
        super().__init__(written_out(line))


def written_out(text: str) -> str:
    """With what a terminal would obey written out: ESC is ``\\x1b``."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class ArgumentError(QakdError, ValueError):
    """A function was given a tensor or a number of a shape or a value that it cannot take."""


class NotPreparedError(QakdError, ValueError):
    """The model has not been prepared (or not been calibrated) by a quantization toolkit."""


class UnsupportedQuantizerError(QakdError, ValueError):
    """A quantizer cannot be expressed in the form that was asked for."""


class LabelsRequiredError(QakdError, ValueError):
    """The method needs labels and the loader yields none."""


class TrainingError(QakdError, RuntimeError):
    """Training cannot go on: a loss, a gradient or an input is not finite, or nothing can be trained."""


class ExportError(QakdError, RuntimeError):
    """The model cannot be exported without changing what it computes."""


class ParityError(ExportError):
    """The exported file does not compute what was trained; ``layer`` names the first place that differs."""

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


class EngineError(QakdError, RuntimeError):
    """An engine cannot be built, verified or loaded."""


class CheckpointError(QakdError, RuntimeError):
    """A checkpoint is damaged, unsafe, or belongs to another run."""


class MissingPackageError(QakdError, ImportError):
    """An optional package is not installed; the message carries the pip line."""
