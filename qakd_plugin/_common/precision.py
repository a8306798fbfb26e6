"""Types of numbers: a wide one for sums over many samples, and their short names."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(value: Tensor) -> Tensor:
    """Float64 where the device has it, for sums over many samples."""
    return value.float() if value.device.type == "mps" else value.to(torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """For messages and tables: "float32"."""
    return str(dtype).removeprefix("torch.")
