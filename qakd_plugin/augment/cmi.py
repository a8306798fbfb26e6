"""Contextual mutual information of a teacher's predictions, in one pass.

For images x with labels y and a teacher's predictions P_x (softmax at temperature 1), with Q_y the mean of P_x over the images
of class y:

- contextual mutual information, CMI = mean over x of KL(P_x || Q_y): what predictions say beyond the label;
- centroid divergence = mean over the classes that occur of -log Q_y[y]: how far a class's mean prediction is from its label;
- score = CMI - centroid divergence, or CMI - mean cross-entropy.

Because KL(P || Q) = sum_c P_c log P_c - sum_c P_c log Q_c, and the second sum is linear in P, the mean over a class is
H(Q_y) - mean H(P_x): sums over images are all that is needed, and nothing of size N is kept.

With labels that are probabilities t_x (CutMix, MixUp), Q_y is the mean of P_x weighted by t_x[y], and CMI = mean over x of
sum_y t_x[y] KL(P_x || Q_y): the information of the prediction about the image once the label is known, if labels are drawn from
t_x. The alternative, KL(P_x || sum_y t_x[y] Q_y), is smaller (KL is convex) by what the prediction says about which of the two
labels was drawn; it is no function of sums over images and would take a second pass over all predictions. Both are the same for
labels that are classes.

Source: Ye et al., ICLR 2024 (CMI of a network), arXiv 2401.08732; Kur and Zhao, 2025, arXiv 2509.03850 (for augmentations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t
from torch import Tensor

from ..errors import QakdError
from .choices import FORMS

DEFAULT_FORM = "ce"
_ROWS = 4096
"""Predictions in float64 at a time: what a pass holds beside its sums."""


@dataclass(frozen=True)
class AugmentationScore:
    """What the teacher's predictions on augmented images say.

    Attributes:
        name: of the augmentation.
        score: CMI minus centroid divergence or cross-entropy, as ``form`` says: higher is better.
        cmi: contextual mutual information, not negative: what predictions say beyond the label.
        centroid_divergence: mean over classes of -log of the mean probability of the class.
        cross_entropy: mean of -log of the label's probability: the teacher's loss.
        variance: mean over images of |P_x - Q_y|^2, the teacher's variance within classes, as a baseline: lower is better.
            (Wang et al., NeurIPS 2022, arXiv 2012.02909, compare augmentations by the standard deviation of the teacher's mean
            probability over repeated draws, which one pass does not give; this is its counterpart for single draws.)
        num_samples: images that were scored.
        interval: confidence interval of ``score``, by a jackknife over blocks of images.
        form: "centroid" or "ce".
        tied_with_best: whether the data leave open that this one is better than the first of its ranking.
        dropped: whether a race gave it up before the last image.
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


class Sums:
    """Sums over images from which every figure follows, kept apart for each block of images; float64, O(blocks C^2).

    Args:
        blocks: how many.
        classes: C.
        device: where the sums are kept.
    """

    def __init__(self, blocks: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.mass = self.count.new_zeros(blocks, classes)
        """Images of each class."""
        self.predictions = self.count.new_zeros(blocks, classes, classes)
        """Row y is the sum of P_x over class y."""
        self.log_hits = self.count.new_full((blocks, classes), -math.inf)
        """Log of the diagonal of ``predictions``, which may be too small for float64 itself."""
        self.scalars = self.count.new_zeros(blocks, 3)
        """Sums of the entropy of P_x, of |P_x|^2 and of the cross-entropy."""

    def add(self, log_p: Tensor, targets: Tensor, block: Tensor) -> None:
        """Count images.

        Args:
            log_p: float64 (n, C), logarithms of the predictions.
            targets: int64 (n,) or float64 (n, C).
            block: int64 (n,): of each image.
        """
        p, classes = log_p.exp(), log_p.shape[1]
        if targets.is_floating_point():
            row, label = targets.nonzero(as_tuple=True)
            weight = targets[row, label]
        else:
            row, label = torch.arange(len(p), device=p.device), targets
            weight = torch.ones_like(p[:, 0])
        cell = block[row] * classes + label
        if len(row) <= 4 * len(p):
            self.predictions.view(-1, classes).index_add_(0, cell, weight[:, None] * p[row])
        else:  # labels with many classes each: as many rows would not fit
            for index in range(len(self.count)):
                mine = block == index
                self.predictions[index].addmm_(targets[mine].T, p[mine])
        hits = log_p[row, label]
        self.count.index_add_(0, block, torch.ones_like(p[:, 0]))
        self.mass.view(-1).index_add_(0, cell, weight)
        new = _scatter_logsumexp(weight.log() + hits, cell, self.log_hits.numel())
        self.log_hits = torch.logaddexp(self.log_hits, new.view_as(self.log_hits))
        own = torch.stack([-(p * log_p).sum(1), p.square().sum(1)], 1)[row]
        self.scalars.index_add_(0, block[row], weight[:, None] * torch.cat([own, -hits[:, None]], 1))

    def figures(self) -> Figures:
        """CMI and the rest, of all images."""
        return _figures(
            self.count.sum(0, keepdim=True),
            self.mass.sum(0, keepdim=True),
            self.predictions.sum(0, keepdim=True),
            self.log_hits.logsumexp(0, keepdim=True),
            self.scalars.sum(0, keepdim=True),
        )[0]

    def without_each(self) -> list[Figures]:
        """The same without the images of one block, for each block that has any; empty if fewer than two have."""
        filled = self.count > 0
        if int(filled.sum()) < 2:
            return []
        # Sums before a block and behind it: a difference from the whole would leave rounding where nothing is.
        return _figures(
            _sum_of_others(self.count[filled]),
            _sum_of_others(self.mass[filled]),
            _sum_of_others(self.predictions[filled]),
            _sum_of_others(self.log_hits[filled], logarithms=True),
            _sum_of_others(self.scalars[filled]),
        )


def _sum_of_others(parts: Tensor, *, logarithms: bool = False) -> Tensor:
    """For each index of the first dimension, the sum over all others; of the exponentials, where ``parts`` are logarithms."""
    nothing = torch.full_like(parts[:1], -math.inf if logarithms else 0.0)
    accumulate = torch.logcumsumexp if logarithms else torch.cumsum
    before = torch.cat([nothing, accumulate(parts[:-1], 0)])
    behind = torch.cat([accumulate(parts[1:].flip(0), 0).flip(0), nothing])
    return torch.logaddexp(before, behind) if logarithms else before + behind


def _figures(count: Tensor, mass: Tensor, predictions: Tensor, log_hits: Tensor, scalars: Tensor) -> list[Figures]:
    """Figures of several sets of images: the first dimension of all sums."""
    present = mass > 0
    centroids = (
        predictions / mass.where(present, torch.ones_like(mass))[:, :, None]
    )  # 0 for absent classes, and counted 0 times
    within = (mass * torch.special.entr(centroids).sum(2)).sum(1) - scalars[:, 0]
    spread = scalars[:, 1] - (mass * centroids.square().sum(2)).sum(1)
    far = (mass.log() - log_hits).where(present, torch.zeros_like(mass)).sum(1) / present.sum(1)
    # Rounding may leave a little below zero what cannot be negative.
    columns = (within.clamp(min=0) / count, far, scalars[:, 2] / count, spread.clamp(min=0) / count)
    return [Figures(*row) for row in torch.stack(columns, 1).tolist()]


@dataclass(frozen=True)
class Figures:
    """The figures of one set of images; see :class:`AugmentationScore`."""

    cmi: float
    centroid_divergence: float
    cross_entropy: float
    variance: float

    def score(self, form: str) -> float:
        """CMI minus what ``form`` names."""
        return self.cmi - (self.centroid_divergence if form == "centroid" else self.cross_entropy)


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
        self.num_classes, self.num_samples = num_classes, 0
        self.blocks = blocks or (20 if num_classes <= 256 else 10)
        self.sums = Sums(self.blocks, num_classes, device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            logits: float (n, C), at temperature 1.
            targets: int64 (n,) classes, or float (n, C) probabilities.

        Raises:
            QakdError: shapes do not fit, logits are not finite, or labels are out of range; says where.
        """
        device = self.sums.count.device
        check_pair(logits, targets, self.num_classes, self.num_samples)
        targets = targets.double() if targets.is_floating_point() else targets.long()
        for z, y in zip(torch.split(logits.detach(), _ROWS), torch.split(targets, _ROWS), strict=True):
            if not len(z):
                continue
            block = torch.arange(self.num_samples, self.num_samples + len(z), device=device) % self.blocks
            self.sums.add(z.to(device).double().log_softmax(1), y.to(device), block)
            self.num_samples += len(z)

    def figures(self) -> Figures:
        """Over all images so far."""
        if self.num_samples == 0:
            raise QakdError("no image has been scored: the data are empty.")
        return self.sums.figures()

    def without_each_block(self) -> list[Figures]:
        """Over all images but those of one block, for each block that has any; empty if fewer than two have."""
        return self.sums.without_each()

    def result(self, name: str = "", form: str = DEFAULT_FORM, confidence: float = 0.95) -> AugmentationScore:
        """The record of all images so far.

        Args:
            name: for the record.
            form: "centroid" or "ce".
            confidence: of the interval.
        """
        check_form(form)
        figures = self.figures()
        score = figures.score(form)
        spread = Jackknife.of(score, [part.score(form) for part in self.without_each_block()]).half_width(confidence)
        return AugmentationScore(
            name, score, **vars(figures), num_samples=self.num_samples, interval=(score - spread, score + spread), form=form
        )


@dataclass(frozen=True)
class Jackknife:
    """How far a figure can be trusted, by leaving out one block of images at a time.

    Attributes:
        corrected: the figure without its bias of first order: centroids of few images lie too close to them, so CMI is too
            small.
        error: standard error; infinite with fewer than two blocks.
        freedom: blocks - 1.
    """

    corrected: float
    error: float
    freedom: int

    @classmethod
    def of(cls, whole: float, parts: Sequence[float]) -> Jackknife:
        """Of the figure of all images, and of all but each block."""
        count = len(parts)
        if count < 2:
            return cls(whole, math.inf, 0)
        mean = math.fsum(parts) / count
        variance = (count - 1) / count * math.fsum((part - mean) ** 2 for part in parts)
        return cls(count * whole - (count - 1) * mean, math.sqrt(variance), count - 1)

    def half_width(self, confidence: float) -> float:
        """Of the two-sided interval, by Student's t."""
        return self.upper_quantile((1 - confidence) / 2) * self.error if self.freedom else math.inf

    def upper_quantile(self, tail: float) -> float:
        """Standard errors beyond which lies a probability of ``tail`` on one side."""
        return float(student_t.isf(tail, self.freedom))


def cmi_score(
    logits: Tensor, targets: Tensor, num_classes: int | None = None, *, form: str = DEFAULT_FORM, confidence: float = 0.95
) -> AugmentationScore:
    """Contextual mutual information of predictions, and the score made of it. See the module's head for the formulas.

    Args:
        logits: float (N, C), the teacher's, at temperature 1.
        targets: int64 (N,) classes, or float (N, C) probabilities (CutMix, MixUp).
        num_classes: C, checked against the logits; None takes theirs.
        form: "ce" subtracts the mean cross-entropy from CMI, "centroid" the centroid divergence.
        confidence: of the interval.

    Returns:
        The record, computed in float64.

    Raises:
        QakdError: shapes do not fit, logits are not finite, or labels are out of range; says where.

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
    statistics.update(logits, targets)
    return statistics.result(form=form, confidence=confidence)


def check_form(form: str) -> str:
    """Whether ``form`` names a score."""
    if form not in FORMS:
        raise QakdError(f"form={form!r} is unknown: use one of {', '.join(map(repr, FORMS))}.")
    return form


def check_pair(logits: Tensor, targets: Tensor, classes: int, start: int = 0) -> None:
    """Whether logits and labels can be scored; ``start`` is the number of the first image, for messages."""
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise QakdError(f"logits must have shape (N, {classes}), one column per class, got {tuple(logits.shape)}.")
    finite = logits.isfinite().all(1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise QakdError(f"logits of image {row} are not finite: check the teacher and its input_stats.")
    if targets.is_floating_point():
        _check_soft(logits, targets, start)
        return
    if targets.shape != logits.shape[:1] or targets.dtype == torch.bool or targets.is_complex():
        raise QakdError(
            f"targets must be int64 ({len(logits)},) or float {tuple(logits.shape)}, "
            f"got {targets.dtype} {tuple(targets.shape)}."
        )
    wrong = (targets < 0) | (targets >= classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise QakdError(
            f"targets: label {int(targets[row])} of image {start + row} is out of range: it must lie in 0..{classes - 1}."
        )


def _check_soft(logits: Tensor, targets: Tensor, start: int) -> None:
    if targets.shape != logits.shape:
        raise QakdError(f"targets that are probabilities must have shape {tuple(logits.shape)}, got {tuple(targets.shape)}.")
    wrong = ~((targets >= 0).all(1) & ((targets.double().sum(1) - 1).abs() <= 1e-3))  # NaN is wrong, too
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise QakdError(f"targets: row {start + row} is out of range: probabilities are not negative and add up to 1.")


def _scatter_logsumexp(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """(count,): log of the sum of exp(values) in each class; -inf for empty ones."""
    empty = values.new_full((count,), -math.inf)
    top = empty.scatter_reduce(0, classes, values, "amax")
    total = torch.zeros_like(top).index_add_(0, classes, (values - top[classes]).exp())
    return torch.where(total > 0, top + total.log(), empty)
