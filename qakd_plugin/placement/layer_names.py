"""Which layers of a model can be quantized, by their dotted names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import QakdError

WEIGHTED = (_ConvNd, nn.Linear)


def quantizable_layers(model: nn.Module, keep: Sequence[str]) -> list[str]:
    """Convolutions and linear layers whose dotted name no pattern of ``keep`` matches.

    Raises:
        QakdError: a pattern matches nothing, or nothing is left to quantize.
    """
    uncalled = never_called(model)
    names = [name for name, module in model.named_modules() if isinstance(module, WEIGHTED) and name not in uncalled]
    for pattern in keep:
        if not fnmatch.filter([name for name, _ in model.named_modules()], pattern):
            raise QakdError(
                f"keep: {pattern!r} matches no module of {type(model).__name__}; layers are called, e.g., {names[:4]}."
            )
    left = [name for name in names if not any(within(name, pattern) for pattern in keep)]
    if not left:
        raise QakdError(
            f"{type(model).__name__} holds no convolution or linear layer to quantize"
            + (f" beside those kept in floating point by keep={list(keep)}." if names else ".")
        )
    return left


def never_called(model: nn.Module) -> set[str]:
    """Layers whose weight is read by the module around them, which does not call them: a quantizer there would never act."""
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }


def within(name: str, pattern: str) -> bool:
    """Whether ``pattern`` matches the module or one that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: index + 1]), pattern) for index in range(len(parts)))
