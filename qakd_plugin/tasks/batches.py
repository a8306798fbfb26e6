"""What a loader yields -> inputs of a network, and targets where a method asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from .._common.batch_keys import INPUT_KEYS, TARGET_KEYS
from ..errors import QakdError
from .inputs import Inputs, forward_names

BatchFn: TypeAlias = Callable[[Any], tuple[Inputs, Any]]
"""Splits a batch into inputs (a tensor, a tuple of positional arguments, a mapping of keywords) and targets, or None."""


def default_batch(batch: Any) -> tuple[Any, Any]:
    """Split ``x``, ``(x,)``, ``(x, y, ...)`` or a mapping with the usual keys into ``(x, y)``; y is None where there is none.

    Targets are passed on as they are: nothing here looks at them. Where a network is known, :func:`batch_splitter` also finds
    what its forward takes by name.

    Raises:
        QakdError: no tensor is found; the message says how to write a ``batch_fn``.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        x = next((batch[key] for key in INPUT_KEYS if key in batch), None)
        y = _targets(batch)
    elif isinstance(batch, Sequence) and len(batch) > 0:
        x, y = batch[0], batch[1] if len(batch) > 1 else None
    else:
        x, y = None, None
    if not isinstance(x, Tensor):
        keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise QakdError(
            f"loader: cannot find the inputs in a batch of type {type(batch).__name__}{keys}. "
            "Yield x or (x, y), or pass batch_fn=lambda batch: (inputs, targets)."
        )
    return x, y


def batch_splitter(batch_fn: BatchFn, network: nn.Module) -> BatchFn:
    """``batch_fn``; or, for the default one, a function that knows which names ``network.forward`` takes.

    Of a mapping, what forward takes by name goes in by keyword; "labels", "label", "targets", "target" and "y" stay out and
    become targets. A single argument that forward takes first goes in as a tensor.
    """
    if batch_fn is not default_batch:
        return batch_fn
    names, takes_any = forward_names(network)

    def split(batch: Any) -> tuple[Inputs, Any]:
        if not isinstance(batch, Mapping):
            return default_batch(batch)
        known = [key for key in batch if key not in TARGET_KEYS and (key in names or takes_any)]
        if not any(isinstance(batch[key], Tensor) for key in known):
            return default_batch(batch)
        if len(known) == 1 and names[:1] == known:
            return batch[known[0]], _targets(batch)
        return {key: batch[key] for key in known}, _targets(batch)

    return split


def _targets(batch: Mapping[Any, Any]) -> Any:
    return next((batch[key] for key in TARGET_KEYS if key in batch), None)
