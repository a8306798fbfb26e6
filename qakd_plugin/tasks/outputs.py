"""What networks output: any tree of tensors, each named by its path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._common.module_mode import eval_mode
from .._common.precision import dtype_name
from ..errors import QakdError
from .inputs import call_in_own_precision

SINGLE = "logits"
"""Name of the output of a network that returns a tensor and nothing else."""


Outputs = Mapping[str, Tensor]
"""What a network outputs, by path."""


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Every tensor in what a network returned, by its path: ``{"logits": ..}``, ``{"boxes.p3": ..}``, ``{"0": .., "1": ..}``.

    Tuples and lists are named by position, mappings (Hugging Face's ``ModelOutput`` too) by key, named tuples and dataclasses
    by field; a tensor alone is "logits". What holds no tensor (None, numbers, caches) is left out.
    """
    if isinstance(output, Tensor):
        return {SINGLE: output}
    found: dict[str, Tensor] = {}
    _collect(output, "", found)
    return found


def _collect(value: Any, path: str, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[path] = value
        return
    for key, item in _children(value):
        _collect(item, f"{path}.{key}" if path else key, found)


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return [(str(index), item) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    logits = getattr(value, SINGLE, None)
    return [] if logits is None else [(SINGLE, logits)]


def listed(outputs: Mapping[str, Tensor]) -> str:
    """Names, shapes and dtypes, for messages."""
    shown = [f"{name!r} {tuple(t.shape)} {dtype_name(t.dtype)}" for name, t in outputs.items()]
    return ", ".join(shown) or "no tensor"


def logits_of(output: Any, name: str) -> Tensor:
    """The logits in what a network outputs: a tensor, or an object or mapping that holds them under ``logits``.

    Raises:
        QakdError: there are none; ``name`` says whose output it was.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise QakdError(
            f"{name} outputs {type(output).__name__} without logits: {listed(named_outputs(output))}. This needs a tensor of "
            "logits (N, C), or an output with a field of that name."
        )
    return logits


def frozen_output(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a network outputs in eval mode, in its own precision and without gradients; its modes are put back."""
    with eval_mode(network), torch.no_grad():
        return call_in_own_precision(network, *args, **kwargs)


def logits_for(network: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """Call a network on images, and pick the logits.

    Raises:
        QakdError: there are no logits; ``name`` says whose output it was.
    """
    return logits_of(network(inputs), name)
