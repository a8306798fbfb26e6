"""What networks put out: logits, or an object that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._common.module_mode import eval_mode
from ..errors import QakdError


def logits_of(output: Any, name: str) -> Tensor:
    """The logits in what a network puts out: a tensor, or an object or mapping that holds them under ``logits``.

    Raises:
        QakdError: there are none; ``name`` says whose output it was.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise QakdError(
            f"{name} puts out {type(output).__name__} without logits. Wrap it in a module whose forward returns the tensor of "
            "logits (N, C), or an output with a field of that name."
        )
    return logits


def frozen_logits(teacher: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A teacher's logits in eval mode and without gradients; its modes are put back."""
    with eval_mode(teacher), torch.no_grad():
        return logits_of(teacher(*args, **kwargs), "teacher")
