"""Losses: pure functions, tensors in, one loss per sample out.

Composition is the API: a method adds these up, the loop averages over the batch. Where an output has further dimensions
(pixels, tokens, anchors), a sample's loss is the mean over its positions, or over those that ``where`` counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common.labels import label_range
from .errors import ArgumentError


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, dim: int = 1, where: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of softened predictions, ``T^2 * KL(teacher || student)``.

    The factor T^2 keeps gradients of the same size for every temperature. Identical logits give exactly 0. Gradients flow into
    both arguments: detach the one that is not trained.

    Args:
        student_logits: float (N, C), or with further dimensions, e.g. (N, C, H, W) or (N, T, C).
        teacher_logits: float, of the same shape.
        temperature: T > 0.
        dim: of the classes; at least two of them, since a single class has probability 1 whatever its logit.
        where: which positions count, and how much: bool or not negative, of the shape of the logits without ``dim``, or of its
            first dimensions. All alike if None. A sample of which nothing counts has loss 0.

    Returns:
        float32 or float64 (N,), not negative up to rounding.

    Raises:
        ArgumentError: shapes differ or do not belong together, or the temperature is not positive.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kl_divergence(logits, logits, temperature=4.0)
        tensor([0.])

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; as SQAKD's only loss,
        Zhao and Zhao, AISTATS 2024, arXiv 2403.11106.
    """
    _check_pair(student_logits, teacher_logits)
    dim = _class_dim(student_logits, dim)
    _check_temperature(temperature)
    student, teacher = _precise(student_logits), _precise(teacher_logits)
    student_log = F.log_softmax(student / temperature, dim=dim)
    teacher_log = F.log_softmax(teacher / temperature, dim=dim)
    # Log-probabilities of finite logits are finite, and exp() of them underflows to 0: never NaN.
    divergence = temperature**2 * (teacher_log.exp() * (teacher_log - student_log)).sum(dim=dim)
    return _per_sample(divergence, where).to(torch.promote_types(student_logits.dtype, torch.float32))


def binary_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, where: Tensor | None = None) -> Tensor:
    """``T^2 * KL(teacher || student)`` of independent yes-or-no predictions: one logit, multi-label, heat maps, objectness.

    Args:
        student_logits: float (N,) or (N, ...): each is a logit of its own.
        teacher_logits: float, of the same shape.
        temperature: T > 0.
        where: which logits count, as in :func:`kl_divergence`.

    Returns:
        float32 or float64 (N,): the mean over a sample's logits.

    Raises:
        ArgumentError: as :func:`kl_divergence`.

    Example:
        >>> binary_kl(torch.tensor([[0.0]]), torch.tensor([[0.0]]))
        tensor([0.])

    Source: Hinton et al., arXiv 1503.02531, for a Bernoulli variable.
    """
    _check_pair(student_logits, teacher_logits)
    _check_temperature(temperature)
    student, teacher = _precise(student_logits) / temperature, _precise(teacher_logits) / temperature
    yes, no = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    divergence = yes.exp() * (yes - F.logsigmoid(student)) + no.exp() * (no - F.logsigmoid(-student))
    return _per_sample(temperature**2 * divergence, where).to(torch.promote_types(student_logits.dtype, torch.float32))


def l2(student: Tensor, teacher: Tensor, where: Tensor | None = None) -> Tensor:
    """Squared difference, the mean over a sample's values: boxes, depth, embeddings.

    Args:
        student: float (N, ...).
        teacher: float, of the same shape.
        where: which values count, as in :func:`kl_divergence`.

    Returns:
        float32 or float64 (N,).

    Raises:
        ArgumentError: shapes differ or do not belong together.
    """
    _check_pair(student, teacher)
    return _per_sample((_at_least_float32(student) - _at_least_float32(teacher)).square(), where)


def l1(student: Tensor, teacher: Tensor, where: Tensor | None = None) -> Tensor:
    """Absolute difference, the mean over a sample's values. Arguments and errors as :func:`l2`."""
    _check_pair(student, teacher)
    return _per_sample((_at_least_float32(student) - _at_least_float32(teacher)).abs(), where)


def smooth_l1(student: Tensor, teacher: Tensor, beta: float = 1.0, where: Tensor | None = None) -> Tensor:
    """Quadratic below ``beta``, linear above: ``d^2 / (2 beta)`` and ``d - beta / 2`` of the absolute difference d.

    Args:
        student: float (N, ...).
        teacher: float, of the same shape.
        beta: where the two pieces meet, > 0.
        where: which values count, as in :func:`kl_divergence`.

    Returns:
        float32 or float64 (N,): the mean over a sample's values.

    Raises:
        ArgumentError: shapes differ or do not belong together, or beta is not positive.

    Source: Girshick, "Fast R-CNN", arXiv 1504.08083.
    """
    _check_pair(student, teacher)
    if not beta > 0:
        raise ArgumentError(f"smooth_l1: beta={beta} must be positive.")
    found = F.smooth_l1_loss(_at_least_float32(student), _at_least_float32(teacher), beta=beta, reduction="none")
    return _per_sample(found, where)


def cosine(student: Tensor, teacher: Tensor, dim: int = -1, where: Tensor | None = None) -> Tensor:
    """``1 - cos`` of the angle between two vectors, the mean over a sample's positions: embeddings, tokens.

    Args:
        student: float (N, D), or with further dimensions.
        teacher: float, of the same shape.
        dim: along which the vectors lie.
        where: which positions count, as in :func:`kl_divergence`.

    Returns:
        float32 or float64 (N,), 0 to 2. A vector of zeros has no direction: it counts as orthogonal to all.

    Raises:
        ArgumentError: shapes differ or do not belong together.
    """
    _check_pair(student, teacher)
    dim = _class_dim(student, dim)
    angles = 1 - F.cosine_similarity(_precise(student), _precise(teacher), dim=dim)
    return _per_sample(angles, where).to(torch.promote_types(student.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, dim: int = 1, ignore_index: int = -100) -> Tensor:
    """Cross-entropy against labels.

    Args:
        logits: float (N, C), or with further dimensions, e.g. (N, C, H, W) or (N, T, C).
        labels: integer class indices of the shape of the logits without ``dim``; or float probabilities of the shape of the
            logits, which sum to 1 (CutMix, MixUp).
        dim: of the classes.
        ignore_index: positions with this label do not count. A sample of which nothing counts has loss 0.

    Returns:
        float32 or float64 (N,): the mean over a sample's positions that count.

    Raises:
        ArgumentError: shapes do not belong together, or, of labels on the CPU, an index is outside 0..C-1 or rows name several
            classes at once (multi-hot), which is a binary cross-entropy's.
    """
    dim = _class_dim(logits, dim)
    classes, positions = logits.shape[dim], tuple(logits.shape[:dim] + logits.shape[dim + 1 :])
    logits = _at_least_float32(logits)
    if labels.shape == logits.shape:
        if labels.device.type == "cpu":  # elsewhere looking at values would stop the device at every step
            _check_probabilities(labels, dim)
        return _per_sample(-(labels.to(logits.dtype) * F.log_softmax(logits, dim=dim)).sum(dim=dim), None)
    if tuple(labels.shape) != positions:
        raise ArgumentError(
            f"labels must have shape {positions}, one class for each position of logits {tuple(logits.shape)}, got "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ArgumentError(f"labels must be integers, class indices, got {labels.dtype}.")
    labels = labels.long()
    counts = labels != ignore_index
    if labels.device.type == "cpu":
        label_range(labels[counts], classes)
    found = F.cross_entropy(logits.movedim(dim, 1), labels, reduction="none", ignore_index=ignore_index)
    return found if labels.ndim == 1 else _per_sample(found, counts)


def _per_sample(values: Tensor, where: Tensor | None) -> Tensor:
    """(N, ...) -> (N,): the mean over positions, weighted by ``where``."""
    if where is not None:
        if tuple(where.shape) != tuple(values.shape[: where.ndim]) or where.ndim == 0:
            raise ArgumentError(
                f"where: a mask of shape {tuple(where.shape)} does not fit: expected the shape of the positions, "
                f"{tuple(values.shape)}, or its first dimensions."
            )
        weights = where.to(device=values.device, dtype=values.dtype)
        weights = weights.reshape(*where.shape, *[1] * (values.ndim - where.ndim)).expand_as(values)
        if values.ndim == 1:
            return torch.where(weights > 0, values * weights, torch.zeros_like(values))
        # What does not count may be anything, infinite as well.
        kept = torch.where(weights > 0, values * weights, torch.zeros_like(values))
        return kept.flatten(1).sum(1) / weights.flatten(1).sum(1).clamp(min=torch.finfo(values.dtype).tiny)
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _check_probabilities(labels: Tensor, dim: int) -> None:
    sums = labels.detach().float().sum(dim=dim)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ArgumentError(
            f"labels of shape {tuple(labels.shape)} do not sum to 1 over the classes (dim {dim}): they are no probabilities. "
            "For several classes at once (multi-label) pass task_loss=torch.nn.BCEWithLogitsLoss(reduction='none')."
        )


def _class_dim(logits: Tensor, dim: int) -> int:
    if not -logits.ndim <= dim < logits.ndim or dim % logits.ndim == 0:
        raise ArgumentError(
            f"dim={dim} is no dimension of logits {tuple(logits.shape)} other than the batch, which comes first: "
            "name that of the classes."
        )
    return dim % logits.ndim


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ArgumentError(f"temperature must be positive, got {temperature}.")


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.ndim == 0 or first.shape != second.shape:
        raise ArgumentError(
            f"student and teacher must have the same shape (N, ...), got {tuple(first.shape)} and {tuple(second.shape)}."
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _precise(x: Tensor) -> Tensor:
    """Float64 for (N, C), where the device has it: that is small, and large logits cancel badly in float32."""
    return x.double() if x.ndim <= 2 and x.device.type != "mps" else _at_least_float32(x)
