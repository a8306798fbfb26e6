"""Optimizers and their schedule: AdamW, linear warm-up, half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .backends import Adapter
from .quantizers.rule import PREFIX


@dataclass(frozen=True)
class Settings:
    """How the optimizers are set up; see :func:`qakd_plugin.distill`."""

    lr: float = 1e-3
    quantizer_lr: float = 1e-3
    teacher_lr: float = 1e-4
    weight_decay: float = 1e-4
    grad_clip: float | None = 1.0
    warmup: float = 0.05
    mixed_precision: str = "no"


def quantizer_parameters(adapter: Adapter, model: nn.Module) -> dict[int, nn.Parameter]:
    """Trained parameters that belong to quantizers, by id."""
    of_quantizers = [p for quantizer in adapter.quantizers(model) for p in quantizer.module.parameters()]
    return {id(p): p for p in of_quantizers if p.requires_grad}


def student_optimizer(adapter: Adapter, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW: weights, biases and norms without decay, and parameters of quantizers with a rate of their own and no decay.

    The rate of quantizers is a relative change per step. Ours are logarithms or ratios already; a scale that a toolkit learns
    as it is gets the rate times its size.
    """
    of_quantizers = quantizer_parameters(adapter, model)
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in of_quantizers]
    relative = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2].startswith(PREFIX)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for key, p in of_quantizers.items() if key in relative], "lr": settings.quantizer_lr},
    ]
    for key, parameter in of_quantizers.items():
        if key not in relative:
            size = float(parameter.detach().abs().mean()) or 1.0
            groups.append({"params": [parameter], "lr": settings.quantizer_lr * size})
    for group in groups[2:]:
        group["weight_decay"] = 0.0
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)


def teacher_optimizer(teacher: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW for a teacher that learns too."""
    return torch.optim.AdamW(teacher.parameters(), lr=settings.teacher_lr, weight_decay=settings.weight_decay)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of all steps, then half a cosine down to 0.

    Args:
        optimizer: whose learning rates are the peaks.
        steps: of the whole run.
        warmup: share of them with a rising rate.
    """
    rising = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
