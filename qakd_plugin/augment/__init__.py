"""Which augmentation to distill with: the teacher's contextual mutual information says."""

from .candidates import Candidate as Candidate
from .candidates import default_candidates as default_candidates
