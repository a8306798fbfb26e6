"""The two operators an export form is made of, with ONNX's own arithmetic.

``qakd::qdq`` is QuantizeLinear followed by DequantizeLinear, ``qakd::dq`` is DequantizeLinear of stored integers. Both run in
eager PyTorch, so that an export form can be compared with the prepared model before any ONNX exists, and both are opaque to
``torch.export``, so that nothing is folded away on the way to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("qakd::qdq", mutates_args=())
def qdq(x: Tensor, scale: Tensor, zero_point: int, quant_min: int, quant_max: int, name: str) -> Tensor:
    """Quantize and dequantize ``x`` per tensor: divide, round half to even, clamp (ONNX QuantizeLinear).

    Args:
        x: float, any shape.
        scale: float32, 0-d, positive.
        zero_point: the code that stands for 0.
        quant_min: lowest integer code.
        quant_max: highest integer code.
        name: of the quantizer; it travels with the operator into the exported graph.
    """
    # In place: at large activations every new tensor costs more than the arithmetic in it.
    return (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)


@qdq.register_fake
def _(x: Tensor, scale: Tensor, zero_point: int, quant_min: int, quant_max: int, name: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qakd::dq", mutates_args=())
def dq(codes: Tensor, scale: Tensor, axis: int, block: int, name: str) -> Tensor:
    """Dequantize stored symmetric integer codes (ONNX DequantizeLinear).

    Args:
        codes: int8, any shape.
        scale: float32; 0-d per tensor, (C,) per channel of ``axis``, or the shape of ``codes`` with ``axis`` divided by
            ``block``.
        axis: channel dimension, or the blocked one; ignored per tensor.
        block: block length along ``axis``, 0 unless blocked.
        name: of the weight.
    """
    return codes.to(scale.dtype) * _broadcast_scale(scale, codes.shape, axis, block)


@dq.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, block: int, name: str) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


def _broadcast_scale(scale: Tensor, shape: torch.Size, axis: int, block: int) -> Tensor:
    if block:
        return scale.repeat_interleave(block, dim=axis).narrow(axis, 0, shape[axis])
    if scale.ndim == 0:
        return scale
    return scale.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
