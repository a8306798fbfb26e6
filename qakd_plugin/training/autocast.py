"""Autocast, and quantizers that compute in float32 whatever it does around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..toolkits import Adapter
from .config import MixedPrecision


def autocast(precision: MixedPrecision, device: torch.device) -> AbstractContextManager[Any]:
    """Forward passes within the block compute in ``precision``."""
    return nullcontext() if precision == "no" else torch.autocast(device.type, dtype=torch.bfloat16)


def float32_hooks(adapter: Adapter, model: nn.Module) -> list[RemovableHandle]:
    """Let every quantizer see float32 while autocast is on: in bfloat16 neighbouring 8-bit codes fall together.

    Without autocast the hooks pass on what they get, so that a float64 or a bfloat16 model stays one.

    Args:
        adapter: of the toolkit that prepared ``model``.
        model: the prepared model itself, not a wrapper of it.

    Returns:
        Handles; ``remove()`` each to take the hooks off again.
    """
    return [quantizer.module.register_forward_pre_hook(_to_float32) for quantizer in adapter.quantizers(model)]


@contextmanager
def float32_quantizers(adapter: Adapter, model: nn.Module) -> Iterator[None]:
    """:func:`float32_hooks` for the length of a block."""
    handles = float32_hooks(adapter, model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# A function of the module, not a lambda: a model that holds it can still be pickled.
def _to_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
        return (x.float(), *args[1:])
    return args
