"""Which augmentation to distill with: the teacher's contextual mutual information says.

Names are imported when they are first used: the command line reads :mod:`.choices` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.lazy import lazy

__all__ = ["AugmentationScore", "Candidate", "CmiStatistics", "Ranking", "Search", "default_candidates"]

if TYPE_CHECKING:
    from .candidates import Candidate as Candidate
    from .candidates import default_candidates as default_candidates
    from .cmi import AugmentationScore as AugmentationScore
    from .cmi import CmiStatistics as CmiStatistics
    from .compositions import Search as Search
    from .ranking import Ranking as Ranking

_HOME = {
    "Candidate": "candidates",
    "default_candidates": "candidates",
    "AugmentationScore": "cmi",
    "CmiStatistics": "cmi",
    "Search": "compositions",
    "Ranking": "ranking",
}

__getattr__ = lazy(__name__, _HOME)
