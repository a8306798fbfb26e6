"""Losses: pure functions, logits in, one loss per sample out.

Composition is the API: a method adds these up, the loop averages over the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened predictions, ``T^2 * KL(teacher || student)``.

    The factor T^2 keeps gradients of the same size for every temperature. Identical logits give exactly 0. Gradients flow into
    both arguments: detach the one that is not trained.

    Args:
        student_logits: float (N, C).
        teacher_logits: float (N, C).
        temperature: T > 0.

    Returns:
        float32 or float64 (N,), not negative up to rounding.

    Raises:
        ArgumentError: shapes differ, are not (N, C), or the temperature is not positive.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kl_divergence(logits, logits, temperature=4.0)
        tensor([0.])

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; as SQAKD's only loss,
        Zhao and Zhao, AISTATS 2024, arXiv 2403.11106.
    """
    _check_pair(student_logits, teacher_logits)
    if not temperature > 0:
        raise ArgumentError(f"temperature must be positive, got {temperature}: 1 to 10 are usual.")
    student, teacher = _double(student_logits), _double(teacher_logits)
    student_log = F.log_softmax(student / temperature, dim=1)
    teacher_log = F.log_softmax(teacher / temperature, dim=1)
    # Log-probabilities of finite logits are finite, and exp() of them underflows to 0: never NaN.
    divergence = temperature**2 * (teacher_log.exp() * (teacher_log - student_log)).sum(dim=1)
    return divergence.to(torch.promote_types(student_logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against labels.

    Args:
        logits: float (N, C).
        labels: int64 (N,) class indices, or float (N, C) probabilities (CutMix, MixUp).

    Returns:
        float32 or float64 (N,).

    Raises:
        ArgumentError: shapes do not belong together, or an index is outside 0..C-1.
    """
    if logits.ndim != 2:
        raise ArgumentError(f"logits must have shape (N, C), got {tuple(logits.shape)}.")
    logits = _at_least_float32(logits)
    if labels.is_floating_point():
        _check_pair(logits, labels, names=("logits", "labels"))
        return -(labels.to(logits.dtype) * F.log_softmax(logits, dim=1)).sum(dim=1)
    if labels.shape != logits.shape[:1]:
        raise ArgumentError(f"labels must have shape ({len(logits)},) like the batch of logits, got {tuple(labels.shape)}.")
    try:
        return F.cross_entropy(logits, labels.long(), reduction="none")
    except IndexError as error:  # on the CPU; a GPU reports it later, by itself
        raise ArgumentError(f"labels must lie in 0..{logits.shape[1] - 1}, the classes of the logits: {error}") from error


def _check_pair(first: Tensor, second: Tensor, names: tuple[str, str] = ("student_logits", "teacher_logits")) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ArgumentError(
            f"{names[0]} and {names[1]} must have the same shape (N, C), got {tuple(first.shape)} and {tuple(second.shape)}."
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _double(x: Tensor) -> Tensor:
    """Float64 where the device has it: (N, C) is small, and large logits cancel badly in float32."""
    return x.float() if x.device.type == "mps" else x.double()
