"""What networks output: logits, or an object that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import QakdError


def logits_of(output: Any, name: str) -> Tensor:
    """The logits in what a network outputs: a tensor, or an object or mapping that holds them under ``logits``.

    Raises:
        QakdError: there are none; ``name`` says whose output it was.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise QakdError(
            f"{name} outputs {type(output).__name__} without logits. Wrap it in a module whose forward returns the tensor of "
            "logits (N, C), or an output with a field of that name."
        )
    return logits


def logits_for(network: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """Call a network on the inputs of a batch, and pick what is compared.

    Raises:
        QakdError: there are no logits; ``name`` says whose output it was.
    """
    return logits_of(network(inputs), name)
