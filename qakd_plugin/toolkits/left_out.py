"""Layers that were to be quantized, and that a toolkit left alone without a word."""

from __future__ import annotations

import logging

from torch import nn

from ..placement.placement import Placement
from .adapter import Adapter

_log = logging.getLogger(__name__)


def name_left_out(adapter: Adapter, prepared: nn.Module, placement: Placement) -> None:
    """Warn of layers of a placement whose weight has no quantizer in the model that the toolkit prepared."""
    prefix = adapter.wrapper_prefix(prepared)
    weights = [quantizer for quantizer in adapter.quantizers(prepared) if quantizer.role == "weight"]
    quantized = {layer.removeprefix(prefix) for quantizer in weights for layer in quantizer.layers}
    if left_out := [layer for layer in placement.layers if layer not in quantized]:
        _log.warning(
            "%s: toolkit=%r left these layers in floating point: it does not know their class, or does not see them called. "
            "toolkit='pt2e' knows layers by what they compute, 'modelopt' sees every call.",
            ", ".join(left_out),
            adapter.name,
        )
