"""Contextual mutual information of a teacher's predictions, in one pass.

For images x with labels y and a teacher's predictions P_x (softmax at temperature 1), with Q_y the mean of P_x over the images
of class y:

- contextual mutual information, CMI = mean over x of KL(P_x || Q_y): what predictions say beyond the label;
- centroid divergence = mean over the classes that occur of -log Q_y[y]: how far a class's mean prediction is from its label;
- score = CMI - centroid divergence, or CMI - mean cross-entropy.

The pair form asks a calibrated student beside the teacher. With S_x its prediction on the same image, student divergence = mean
over x of KL(P_x || S_x), and score = CMI - student divergence = mean over x of sum_c P_x[c] log(S_x[c] / Q_y[c]): of what the
teacher's answer says about the image beyond its label, the part that the student's answer says as well. It is CMI where both
answer alike, and below 0 where the class's mean prediction is nearer the teacher's answer than the student's is. (Read with the
label known, it is Barber and Agakov's lower bound of that information, 2003, with the student as the decoder.)

Because KL(P || Q) = sum_c P_c log P_c - sum_c P_c log Q_c, and the second sum is linear in P, the mean over a class is
H(Q_y) - mean H(P_x): sums over images are all that is needed, and nothing of size N is kept.

With labels that are probabilities t_x (CutMix, MixUp), Q_y is the mean of P_x weighted by t_x[y], and CMI = mean over x of
sum_y t_x[y] KL(P_x || Q_y): the information of the prediction about the image once the label is known, if labels are drawn from
t_x. The alternative, KL(P_x || sum_y t_x[y] Q_y), is smaller (KL is convex) by what the prediction says about which of the two
labels was drawn; it is no function of sums over images and would take a second pass over all predictions. Both are the same for
labels that are classes.

Source: Ye et al., ICLR 2024 (CMI of a network), arXiv 2401.08732; Kur and Zhao, 2025, arXiv 2509.03850 (for augmentations).
Their summary speaks of the consistency between augmented samples and the pair of teacher and quantized student; both scores in
their code ask the teacher alone, and the pair form is this package's reading of that sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import QakdError
from .choices import FORMS
from .jackknife import Jackknife
from .statistics import Figures, Sums, check_pair, check_student

DEFAULT_FORM = "ce"
_ROWS = 4096
"""Predictions in float64 at a time: what a pass holds beside its sums."""


@dataclass(frozen=True)
class AugmentationScore:
    """What the teacher's predictions on augmented images say.

    Attributes:
        name: of the augmentation.
        score: CMI minus centroid divergence, cross-entropy or student divergence, as ``form`` says: higher is better.
        cmi: contextual mutual information, not negative: what predictions say beyond the label.
        centroid_divergence: mean over classes of -log of the mean probability of the class.
        cross_entropy: mean of -log of the label's probability: the teacher's loss.
        variance: mean over images of |P_x - Q_y|^2, the teacher's variance within classes, as a baseline: lower is better.
            (Wang et al., NeurIPS 2022, arXiv 2012.02909, compare augmentations by the standard deviation of the teacher's mean
            probability over repeated draws, which one pass does not give; this is its counterpart for single draws.)
        num_samples: images that were scored.
        interval: confidence interval of ``score``, by a jackknife over blocks of images.
        form: "centroid", "ce" or "pair".
        tied_with_best: whether the data leave open that this one is better than the first of its ranking.
        dropped: whether a race gave it up before the last image.
        student_divergence: mean over images of KL(P_x || S_x), the student's prediction from the teacher's; None without one.
    """

    name: str
    score: float
    cmi: float
    centroid_divergence: float
    cross_entropy: float
    variance: float
    num_samples: int
    interval: tuple[float, float]
    form: str = DEFAULT_FORM
    tied_with_best: bool = False
    dropped: bool = False
    student_divergence: float | None = None


class CmiStatistics:
    """Streaming CMI: predictions go in batch by batch; what is kept does not grow with their number.

    Image number i belongs to block i modulo ``blocks``; leaving out one block at a time (jackknife) says how far the figures
    can be trusted. Memory is O(blocks C^2).

    Args:
        num_classes: C.
        blocks: how many; None takes 20, and 10 from 257 classes on.
        device: where the sums are kept; it must know float64.

    Example:
        >>> statistics = CmiStatistics(num_classes=3)
        >>> statistics.update(torch.eye(3), torch.arange(3))
        >>> round(statistics.result().cmi, 6)
        0.0
    """

    def __init__(self, num_classes: int, *, blocks: int | None = None, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise QakdError(f"num_classes={num_classes} must be at least 2.")
        self.num_classes, self.num_samples, self._pairs = num_classes, 0, 0
        self.blocks = blocks or (20 if num_classes <= 256 else 10)
        self.sums = Sums(self.blocks, num_classes, device)

    def update(self, logits: Tensor, targets: Tensor, student_logits: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: float (n, C), at temperature 1.
            targets: int64 (n,) classes, or float (n, C) probabilities.
            student_logits: float (n, C), the student's on the same images, at temperature 1; for form "pair".

        Raises:
            QakdError: shapes do not fit, logits are not finite, or labels are out of range; says where.
        """
        check_pair(logits, targets, self.num_classes, self.num_samples)
        if student_logits is not None:
            check_student(student_logits, logits, self.num_samples)
        targets = targets.double() if targets.is_floating_point() else targets.long()
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add(logits[rows], targets[rows], None if student_logits is None else student_logits[rows])

    def _add(self, logits: Tensor, targets: Tensor, student_logits: Tensor | None) -> None:
        device, count = self.sums.count.device, len(logits)
        block = torch.arange(self.num_samples, self.num_samples + count, device=device) % self.blocks
        log_p, *log_s = (z.detach().to(device).double().log_softmax(1) for z in (logits, student_logits) if z is not None)
        self.sums.add(log_p, targets.to(device), block, *log_s)
        self.num_samples += count
        self._pairs += count * len(log_s)

    def figures(self) -> Figures:
        """Over all images so far."""
        if self.num_samples == 0:
            raise QakdError("data is empty: no image has been scored. Pass batches of images.")
        return self.sums.figures()

    def without_each_block(self) -> list[Figures]:
        """Over all images but those of one block, for each block that has any; empty if fewer than two have."""
        return self.sums.without_each()

    def result(self, name: str = "", form: str = DEFAULT_FORM, confidence: float = 0.95) -> AugmentationScore:
        """The record of all images so far.

        Args:
            name: for the record.
            form: "centroid", "ce" or "pair".
            confidence: of the interval.

        Raises:
            QakdError: the form is unknown, or "pair" and the student's logits of some images are missing.
        """
        check_form(form)
        figures = self.figures()
        if form == "pair" and self._pairs < self.num_samples:
            raise QakdError(
                f"form='pair' compares a student with the teacher, and the student's logits are known of {self._pairs} of "
                f"{self.num_samples} images: pass student_logits= as well, or take form='ce'."
            )
        score = figures.score(form)
        spread = Jackknife.of(score, [part.score(form) for part in self.without_each_block()]).half_width(confidence)
        found = AugmentationScore(
            name, score, **vars(figures), num_samples=self.num_samples, interval=(score - spread, score + spread), form=form
        )
        return found if self._pairs == self.num_samples else replace(found, student_divergence=None)


def cmi_score(
    logits: Tensor,
    targets: Tensor,
    num_classes: int | None = None,
    *,
    form: str = DEFAULT_FORM,
    confidence: float = 0.95,
    student_logits: Tensor | None = None,
) -> AugmentationScore:
    """Contextual mutual information of predictions, and the score made of it. See the module's head for the formulas.

    Args:
        logits: float (N, C), the teacher's, at temperature 1.
        targets: int64 (N,) classes, or float (N, C) probabilities (CutMix, MixUp).
        num_classes: C, checked against the logits; None takes theirs.
        form: "ce" subtracts the mean cross-entropy from CMI, "centroid" the centroid divergence, "pair" that of the student.
        confidence: of the interval.
        student_logits: float (N, C), of a calibrated student on the same images, at temperature 1; "pair" needs them.

    Returns:
        The record, computed in float64.

    Raises:
        QakdError: shapes do not fit, logits are not finite, or labels are out of range; says where. Or the student's logits
            are missing.

    Example:
        >>> record = cmi_score(torch.tensor([[2.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1, 0, 1]))
        >>> round(record.cmi, 5), record.num_samples
        (0.02227, 4)

    Source: arXiv 2509.03850; CMI: arXiv 2401.08732.
    """
    if logits.ndim != 2:
        raise QakdError(f"logits must have shape (N, C), got {tuple(logits.shape)}.")
    device = "cpu" if logits.device.type == "mps" else logits.device  # which knows no float64
    statistics = CmiStatistics(logits.shape[1] if num_classes is None else num_classes, device=device)
    statistics.update(logits, targets, student_logits)
    return statistics.result(form=form, confidence=confidence)


def check_form(form: str) -> str:
    """Whether ``form`` names a score."""
    if form not in FORMS:
        raise QakdError(f"form={form!r} is unknown: use one of {', '.join(map(repr, FORMS))}.")
    return form
