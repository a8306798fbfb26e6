"""Measurement of deployed files: latency, accuracy through the runtime, integer layers. Knows files; torch is imported only
where a torch module is measured as a yardstick.

Names are imported when they are first used: the process that measures a file's peak memory must not hold more than the runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.lazy import lazy

__all__ = ["Candidate", "LayerTime", "Row", "benchmark"]

if TYPE_CHECKING:
    from .candidates import Candidate as Candidate
    from .measure import benchmark as benchmark
    from .rows import LayerTime as LayerTime
    from .rows import Row as Row

_HOME = {"Candidate": "candidates", "benchmark": "measure", "LayerTime": "rows", "Row": "rows"}

__getattr__ = lazy(__name__, _HOME)
