"""The integer weight codes of a file are those of the trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from ...errors import KEEP_FLOAT, ParityError
from ...export_form.modules import StoredWeight
from ...tasks.inputs import Inputs, call
from ..canonical.graph import COARSE_KEY, WEIGHT_KEY, constant, stored_codes, weight_dequantizers
from ..targets.onnxruntime_weights import weight_only_codes
from .report import arrays

_log = logging.getLogger(__name__)


def check_weight_codes(file: ir.Model, form: nn.Module, samples: Inputs) -> int:
    """Compare every stored weight, up to the sign that BatchNorm folding gives a channel, and return how many codes they hold.

    Layers that no output depends on are not in a file; a warning names them.

    Raises:
        ParityError: a code or a scale of the file is not the trained model's; names the layer.
    """
    stored = {name: module for name, module in form.named_modules() if isinstance(module, StoredWeight)}
    found: set[str] = set()
    for node, codes, scale in (*_dequantized(file.graph), *weight_only_codes(file.graph)):
        name = node.metadata_props.get(WEIGHT_KEY, "")
        layer = name.removesuffix(".weight") or "(root)"
        weight = stored.get(name)
        if weight is None:
            continue
        found.add(name)  # a layer that is called twice may appear twice
        trained = weight.codes.numpy().astype(np.int32)
        for channel, bits in _coarse_channels(node):
            trained[channel] = np.rint(trained[channel] / 2.0**bits)
        problem = _codes_differ(codes.astype(np.int32), trained, 0 if weight.block else weight.axis)
        if problem:
            raise ParityError(f"{layer}: {problem} between the file and the trained model. {KEEP_FLOAT}", layer)
        if weight.block and not np.array_equal(scale, _scales(weight, each=scale.shape == codes.shape)):
            raise ParityError(
                f"{layer}: the scales of its blocks differ between the file and the trained model. {KEEP_FLOAT}", layer
            )
        if not np.all(np.isfinite(scale) & (scale > 0)):
            raise ParityError(f"{layer}: the file holds a weight scale that is not finite and positive. {KEEP_FLOAT}", layer)
    missing = [name for name in stored if name not in found]
    for name in missing:
        if _matters(stored[name], form, samples):
            layer = name.removesuffix(".weight")
            raise ParityError(f"{layer}: its stored weight is missing in the file. {KEEP_FLOAT}", layer)
    if missing:
        _log.warning(
            "%s: no output depends on these layers, so the file does not hold them.",
            ", ".join(name.removesuffix(".weight") for name in missing),
        )
    return sum(weight.codes.numel() for name, weight in stored.items() if name in found)


@torch.no_grad()
def _matters(weight: StoredWeight, form: nn.Module, samples: Inputs) -> bool:
    """Whether an output of the export form depends on a weight."""
    own = arrays(call(form, samples))
    hook = weight.register_forward_hook(lambda module, args, output: 1 - 3 * output)
    try:
        other = arrays(call(form, samples))
    finally:
        hook.remove()
    return not all(np.array_equal(one, another, equal_nan=True) for one, another in zip(own, other, strict=True))


def _dequantized(graph: ir.Graph) -> Iterator[tuple[ir.Node, npt.NDArray[Any], npt.NDArray[Any]]]:
    for node in weight_dequantizers(graph):
        scale = constant(node.inputs[1])
        assert scale is not None
        yield node, stored_codes(node), scale


def _scales(weight: StoredWeight, *, each: bool) -> npt.NDArray[Any]:
    """Of a weight's blocks; of ``each`` of its codes."""
    scale = weight.scale.numpy()
    return (
        np.repeat(scale, weight.block, weight.axis).take(range(weight.codes.shape[weight.axis]), weight.axis) if each else scale
    )


def _coarse_channels(node: ir.Node) -> list[tuple[int, int]]:
    """Output channels whose codes lost their lowest bits, with how many: see :mod:`..targets.onnxruntime_bias`."""
    pairs = (entry.split(":") for entry in node.metadata_props.get(COARSE_KEY, "").split(",") if entry)
    return [(int(channel), int(bits)) for channel, bits in pairs]


def _codes_differ(codes: npt.NDArray[np.int32], trained: npt.NDArray[np.int32], axis: int) -> str | None:
    """Codes of a channel, along ``axis``, may differ by a power of two and by a sign, or be all zero."""
    if codes.shape != trained.shape:
        return f"weight shapes differ ({codes.shape} and {trained.shape})"
    codes, trained = np.moveaxis(codes, axis, 0), np.moveaxis(trained, axis, 0)
    rows, reference = codes.reshape(len(codes), -1), trained.reshape(len(trained), -1)
    largest, wanted = (np.abs(part).max(axis=1, initial=0, keepdims=True) for part in (rows, reference))
    factor = np.where(wanted > 0, largest // np.maximum(wanted, 1), 1)
    powers = (factor & (factor - 1) == 0).all(1)
    same = powers & ((rows == reference * factor).all(1) | (rows == -reference * factor).all(1))
    if same.all():
        return None
    channel = int(np.flatnonzero(~same)[0])
    return f"integer weight codes differ, first in output channel {channel},"
