"""Measurement of deployed files: latency, accuracy through the runtime, integer layers. Knows files; torch is imported only
where a torch module is measured as a yardstick.

Names are imported when they are first used: the process that measures a file's peak memory must not hold more than the runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Candidate", "LayerTime", "Row", "benchmark"]

if TYPE_CHECKING:
    from .candidates import Candidate as Candidate
    from .measure import benchmark as benchmark
    from .rows import LayerTime as LayerTime
    from .rows import Row as Row

_HOME = {"Candidate": "candidates", "benchmark": "measure", "LayerTime": "rows", "Row": "rows"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
