"""What a diagnosis says; apart from it, so that reports are read without the library that reads graphs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One reason, and what to do about it.

    Attributes:
        kind: short name of the reason, the same for all files: "float weights", "output not quantized", ...
        layers: the layers concerned, under their names in the trained model, in execution order; empty for the whole file.
        advice: a sentence or two: what it costs, and what to do.
    """

    kind: str
    layers: tuple[str, ...]
    advice: str
