"""Sums over a teacher's predictions from which contextual mutual information follows; see :mod:`qakd_plugin.augment.cmi`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._common.score_parts import PARTS
from ..errors import QakdError


@dataclass(frozen=True)
class Figures:
    """The figures of one set of images; see :class:`~qakd_plugin.augment.cmi.AugmentationScore`."""

    cmi: float
    centroid_divergence: float
    cross_entropy: float
    variance: float
    student_divergence: float

    def score(self, form: str) -> float:
        """CMI minus what ``form`` names."""
        subtracted: float = getattr(self, PARTS[form][0])
        return self.cmi - subtracted


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
        self.scalars = self.count.new_zeros(blocks, 4)
        """Sums of the entropy of P_x, of |P_x|^2, of the cross-entropy and of the student's divergence."""

    def add(self, log_p: Tensor, targets: Tensor, block: Tensor, log_s: Tensor | None = None) -> None:
        """Count images.

        Args:
            log_p: float64 (n, C), logarithms of the predictions.
            targets: int64 (n,) or float64 (n, C).
            block: int64 (n,): of each image.
            log_s: as ``log_p``, of the student; None counts no divergence.
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
        self.scalars[:, :3].index_add_(0, block[row], weight[:, None] * torch.cat([own, -hits[:, None]], 1))
        if log_s is not None:
            self.scalars[:, 3].index_add_(0, block, (p * (log_p - log_s)).sum(1))

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
        # Sums before a block and after it: a difference from the whole would leave rounding where nothing is.
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
    after = torch.cat([accumulate(parts[1:].flip(0), 0).flip(0), nothing])
    return torch.logaddexp(before, after) if logarithms else before + after


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
    within, spread, apart = within.clamp(min=0), spread.clamp(min=0), scalars[:, 3].clamp(min=0)
    columns = (within / count, far, scalars[:, 2] / count, spread / count, apart / count)
    return [Figures(*row) for row in torch.stack(columns, 1).tolist()]


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


def check_student(student_logits: Tensor, logits: Tensor, start: int = 0) -> None:
    """Whether the student's logits can stand beside the teacher's; ``start`` is the number of the first image."""
    if student_logits.shape != logits.shape:
        raise QakdError(
            f"student_logits must have the shape of the teacher's logits, {tuple(logits.shape)}, got "
            f"{tuple(student_logits.shape)}."
        )
    finite = student_logits.isfinite().all(1)
    if not finite.all():
        row = start + int((~finite).nonzero()[0])
        raise QakdError(f"the student's logits of image {row} are not finite: calibrate it, and check its input_stats.")


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
