"""What the score of an augmentation is made of, beside its conditional mutual information (CMI)."""

PARTS = {
    "ce": ("cross_entropy", "cross-entropy"),
    "centroid": ("centroid_divergence", "centroid divergence"),
    "pair": ("student_divergence", "student's divergence"),
}
"""By form of the score: the figure that is subtracted from CMI, and its name."""
