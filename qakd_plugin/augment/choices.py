"""What a ranking can be asked for."""

from __future__ import annotations

from typing import Literal, get_args

Labels = Literal["dataset", "teacher"]
"""Whose labels: the data set's, or the teacher's answers on the images before augmentation."""
LABELS: tuple[Labels, ...] = get_args(Labels)

Form = Literal["centroid", "ce", "pair"]
"""What is subtracted from CMI: the centroid divergence, the cross-entropy, or the divergence of the student."""
FORMS: tuple[Form, ...] = get_args(Form)

WORTH: dict[str, str] = {
    "ce": "Trust this to reject what costs accuracy; where images are seen many times, what gains was not found by it.",
    "centroid": "Where images are seen many times this found what gains; elsewhere it did not tell good from bad.",
    "pair": "In the study of docs/augmentation.md this put what trained worst first; form='ce' did not.",
}
"""What the score of each form was worth in the studies of docs/augmentation.md, for who uses it."""
