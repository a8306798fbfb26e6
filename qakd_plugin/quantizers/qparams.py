"""The exact numbers of one quantizer: what adapters read, export stores and parity compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QParams:
    """The exact numbers a quantizer works with: ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``.

    Attributes:
        scale: float32, positive; shape () per tensor, (C,) per channel, or the blocked weight's shape with the blocked
            dimension divided by ``block``.
        zero_point: int32, the shape of ``scale``.
        quant_min: lowest integer code.
        quant_max: highest integer code.
        axis: the channel dimension, or the blocked dimension when ``block`` is set; None per tensor.
        block: number of neighbouring elements along ``axis`` that share a scale; None unless blocked.
        code_step: distance of neighbouring codes: 2 where only odd codes are used (grids without a zero).
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None
    block: int | None = None
    code_step: int = 1

    @property
    def symmetric(self) -> bool:
        return not bool(torch.any(self.zero_point != 0))

    @property
    def bits(self) -> int:
        return ((self.quant_max - self.quant_min) // self.code_step).bit_length()
