"""What a loader yields -> images, and labels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ..errors import QakdError

BatchFn: TypeAlias = Callable[[Any], tuple[Tensor, Any]]
"""Splits a batch into images and labels; labels may be None."""

_IMAGE_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def default_batch(batch: Any) -> tuple[Tensor, Any]:
    """Split ``x``, ``(x,)``, ``(x, y, ...)`` or a mapping with the usual keys into ``(x, y)``; y is None where there is none.

    Labels are passed on as they are: nothing here looks at them.

    Raises:
        QakdError: no tensor of images is found; the message says how to write a ``batch_fn``.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        x = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
        y = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 0:
        x, y = batch[0], batch[1] if len(batch) > 1 else None
    else:
        x, y = None, None
    if not isinstance(x, Tensor):
        keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise QakdError(
            f"loader: cannot find the images in a batch of type {type(batch).__name__}{keys}. "
            "Yield x or (x, y), or pass batch_fn=lambda batch: (images, labels)."
        )
    return x, y
