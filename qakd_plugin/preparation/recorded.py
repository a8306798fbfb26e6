"""What ``prepare`` was asked for, kept with the model, so that a student's file says how to prepare a float model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._common.notes import notes_of
from .._common.precision import dtype_name
from ..tasks.inputs import Inputs, first_samples

_KEY = "qakd_preparation"


@dataclass(frozen=True)
class Preparation:
    """Arguments of :func:`qakd_plugin.prepare` as plain data.

    Attributes:
        toolkit: its name.
        weight_bits: of weights.
        activation_bits: of activations.
        keep: patterns; None for the default.
        target: of the grids.
        inputs: shape and type of each tensor of one batch, of two samples at most, in the batch's own structure.
        placement: :data:`qakd_plugin.toolkits.PLACEMENT`; files of earlier versions do not say it, and mean 1.
        edges: bits of the first and the last layer's weights; files of earlier versions do not say it, and mean 8.
        quantize_attention: whether the products of attention are quantized; files of earlier versions do not say it, and mean
            False.
    """

    toolkit: str
    weight_bits: int
    activation_bits: int
    keep: list[str] | None
    target: str
    inputs: Any
    placement: int
    edges: int
    quantize_attention: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def record(model: nn.Module, preparation: Preparation) -> None:
    """Keep with a prepared model what it was prepared for; copies of it have it as well."""
    notes_of(model)[_KEY] = preparation


def recorded(model: nn.Module) -> Preparation | None:
    """What :func:`record` kept; None where somebody else prepared the model, or made it again from a file."""
    found = notes_of(model).get(_KEY)
    return found if isinstance(found, Preparation) else None


def described_inputs(inputs: Inputs) -> Any:
    """The structure of a batch as plain data."""
    return _described(first_samples(inputs, 2))


def inputs_like(description: Any, device: torch.device) -> Inputs:
    """A batch of the structure that :func:`described_inputs` describes: floats in [0, 1), bools True, whole
    numbers the largest of the batch: ids that the network knows, and masks that hide nothing. (Earlier descriptions do not say
    it: 0.)

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no such description.
    """
    made: Inputs = _made(description, torch.Generator().manual_seed(0), device)
    return made


def _described(node: Any) -> Any:
    if isinstance(node, Tensor):
        described = {"tensor": list(node.shape), "dtype": dtype_name(node.dtype)}
        whole = not (node.is_floating_point() or node.is_complex() or node.dtype == torch.bool) and node.numel()
        return described | ({"largest": int(node.max())} if whole else {})
    if isinstance(node, Mapping):
        return {"keywords": {str(key): _described(entry) for key, entry in node.items()}}
    if isinstance(node, tuple | list):
        return {type(node).__name__ if type(node) in (tuple, list) else "tuple": [_described(entry) for entry in node]}
    return {"value": node if isinstance(node, bool | int | float | str | None) else None}


def _made(node: Any, draw: torch.Generator, device: torch.device) -> Any:
    if "tensor" in node:
        dtype = getattr(torch, node["dtype"])
        shape = [int(size) for size in node["tensor"]]
        if dtype.is_floating_point:
            return torch.rand(shape, generator=draw).to(device, dtype)
        value = dtype == torch.bool or node.get("largest", 0)
        return torch.full(shape, value, dtype=dtype, device=device)
    if "keywords" in node:
        return {key: _made(entry, draw, device) for key, entry in node["keywords"].items()}
    if "value" in node:
        return node["value"]
    ((kind, entries),) = node.items()
    made = [_made(entry, draw, device) for entry in entries]
    return made if kind == "list" else tuple(made)
