"""Accuracy on a held-out split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from .._common.module_mode import eval_mode
from ..errors import TrainingError
from .batches import BatchFn
from .outputs import logits_for


@torch.no_grad()
def evaluate(
    student: nn.Module, teacher: nn.Module | None, loader: Iterable[Any], batch_fn: BatchFn, device: torch.device
) -> dict[str, float]:
    """Top-1 accuracy of both networks where the split has labels, and how often they agree.

    Args:
        student: in eval mode, ranges frozen.
        teacher: or None.
        loader: held-out batches.
        batch_fn: splits a batch.
        device: of the networks.

    Raises:
        TrainingError: there is nothing to compare with.
    """
    metrics: dict[str, MulticlassAccuracy] = {}

    def update(name: str, logits: Tensor, target: Tensor) -> None:
        if name not in metrics:
            metrics[name] = MulticlassAccuracy(logits.shape[1], average="micro").to(device)
        metrics[name].update(logits, target)

    for batch in loader:
        x, labels = batch_fn(batch)
        x = x.to(device)
        logits = logits_for(student, x, "student")
        labelled = isinstance(labels, Tensor) and labels.ndim == 1
        if labelled:
            update("val_accuracy", logits, labels.to(device))
        if teacher is not None:
            with eval_mode(teacher):
                expected = logits_for(teacher, x, "teacher")
            update("val_agreement", logits, expected.argmax(1))
            if labelled:
                update("val_teacher_accuracy", expected, labels.to(device))
    if not metrics:
        raise TrainingError("val_loader yields neither labels nor, without a teacher, anything to compare with. Yield (x, y).")
    return {name: float(metric.compute()) for name, metric in metrics.items()}
