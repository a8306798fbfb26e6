"""What a ranking can be asked for."""

from __future__ import annotations

from typing import Literal, get_args

Labels = Literal["dataset", "teacher"]
"""Whose labels: the data set's, or the teacher's answers on the images before augmentation."""
LABELS: tuple[Labels, ...] = get_args(Labels)

Form = Literal["centroid", "ce", "pair"]
"""What is subtracted from CMI: the centroid divergence, the cross-entropy, or the divergence of the student."""
FORMS: tuple[Form, ...] = get_args(Form)
