"""Which augmentation to distill with: the teacher's contextual mutual information says."""

from .candidates import Candidate as Candidate
from .candidates import default_candidates as default_candidates
from .cmi import AugmentationScore as AugmentationScore
from .cmi import CmiStatistics as CmiStatistics
from .compositions import Search as Search
from .ranking import Ranking as Ranking
