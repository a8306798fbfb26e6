"""The one quantizer of SQAKD: clip, round, and a backward pass that knows the rounding error.

Forward ``x_q = R(clip(x))``; backward ``dL/dx_c = dL/dx_q + mu (x_c - x_q)``, where ``mu = 0`` is the straight-through
estimator and ``mu = delta |dL/dx_q|`` is EWGS. LSQ, PACT, DoReFa and EWGS differ in what they clip and in which numbers they
learn.

Source: Zhao and Zhao, AISTATS 2024, arXiv 2403.11106; Lee et al., CVPR 2021, arXiv 2104.00903.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import compiled
from .curvature import recorded_calls

_hardtanh_backward = torch.ops.aten.hardtanh_backward.default
"""``g`` where ``low < v < high``, else 0, in one pass over memory."""


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: float,
    high: float,
    *,
    shift: float = 0.0,
    delta: Tensor | None = None,
    gradient_scale: float = 1.0,
    through_rounding: bool = True,
    decay: float = 0.0,
) -> Tensor:
    """``scale * (round(clamp(x / scale, low, high) + shift) - shift)``, and its gradients.

    One function for all quantizers, written so that training keeps no tensor but input and output, and keeps those where
    activation checkpointing and offloading find them. Whatever the type of ``x``, the arithmetic is float32's.

    Args:
        x: float32, float16 or bfloat16, any shape; what is returned has its type.
        scale: float32, positive; 0-d, or broadcastable with one value per channel of the first dimension.
        low: lowest code.
        high: highest code.
        shift: 0 for integer codes; half the number of steps for a grid without 0, whose codes are odd multiples of 1/2.
        delta: 0-d, at least 0: EWGS, on codes scaled to an interval of length 1. None is the straight-through estimator.
        gradient_scale: factor of the gradient of ``scale`` (LSQ: ``1 / sqrt(N Q_p)``).
        through_rounding: whether rounding errors count in the gradient of ``scale`` (LSQ, EWGS) or only values that are
            clipped do (PACT).
        decay: adds the gradient of ``decay / 2 * (high * scale)^2`` to that of ``scale`` (PACT).
    """
    calls = recorded_calls()
    if calls is not None and delta is not None:
        return _twice_differentiable(x.float(), scale, low, high, shift, delta, calls).to(x.dtype)
    if calls is None and compiled.are_on() and compiled.rows_of(x, scale) is not None:
        return _Compiled.apply(x, scale, delta, low, high, shift, gradient_scale, through_rounding, decay)  # type: ignore[no-any-return, no-untyped-call]
    if _comes_in_blocks(x, scale):
        return _InBlocks.apply(x, scale, delta, low, high, shift, gradient_scale, through_rounding, decay)  # type: ignore[no-any-return, no-untyped-call]
    wide = x.float()
    return _FakeQuantize.apply(wide, scale, delta, low, high, shift, gradient_scale, through_rounding, decay).to(x.dtype)  # type: ignore[no-any-return, no-untyped-call]


_Numbers = tuple[float, float, float, float, bool, float]
"""Arguments of :func:`fake_quantize` that are no tensors, in its order, without ``delta``: no class, for a compiler."""


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, delta: Tensor | None, *numbers: Any) -> Tensor:
        out = _quantized(x, scale, numbers)
        # What reads the output may write over it, as nn.ReLU(inplace=True) and ``out += identity`` do in torchvision's
        # networks, and autograd refuses a backward pass that needs a tensor which was changed. An alias with a version counter
        # of its own is not refused, and the output's counter tells whether the alias still holds what was computed. Inference
        # tensors count no versions and have no backward pass; a compiler would make one tensor of the two.
        keeps = not (torch.compiler.is_compiling() or out.is_inference())
        ctx.save_for_backward(x, scale, delta, out.data if keeps else None)
        ctx.changes = _Changes(out) if keeps else None
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, delta, out = ctx.saved_tensors
        if out is None or ctx.changes.any():
            out = _quantized(x, scale, ctx.numbers)
        needs_scale = ctx.needs_input_grad[1]
        g, total = _gradients(gradient, x, out, scale, delta, ctx.numbers, needs_scale)
        return g, _gradient_of_scale(total, scale, ctx.numbers) if needs_scale else None, *_REST


class _InBlocks(torch.autograd.Function):
    """The same on a processor for what is narrower than float32, a few samples at a time: whole tensors in float32 would be
    written to memory and read again for each operation, and the output's would be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, delta: Tensor | None, *numbers: Any) -> Tensor:
        out = torch.empty_like(x)
        for part, quantized in _blocks(x, out):
            quantized.copy_(_quantized(part.float(), scale, numbers))
        ctx.save_for_backward(x, scale, delta)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, delta = ctx.saved_tensors
        needs_scale = ctx.needs_input_grad[1]
        g, total = torch.empty_like(x), torch.zeros_like(scale)
        for part, upstream, downstream in _blocks(x, gradient, g):
            wide = part.float()
            out = _quantized(wide, scale, ctx.numbers)
            block, share = _gradients(upstream.float(), wide, out, scale, delta, ctx.numbers, needs_scale)
            downstream.copy_(block)
            total += share
        return g, _gradient_of_scale(total, scale, ctx.numbers) if needs_scale else None, *_REST


class _Compiled(torch.autograd.Function):
    """The same in compiled kernels, which read memory once: the output is computed again rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, delta: Tensor | None, *numbers: Any) -> Tensor:
        ctx.save_for_backward(x, scale, delta)
        ctx.numbers, ctx.rows = numbers, compiled.rows_of(x, scale)
        return compiled.forward(x, scale, numbers[:3], ctx.rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, delta = ctx.saved_tensors
        needs_scale, through_rounding = ctx.needs_input_grad[1], ctx.numbers[4]
        g, total = compiled.backward(
            gradient,
            x,
            scale,
            delta,
            ctx.numbers[:3],
            ctx.rows,
            through_rounding=through_rounding,
            needs_scale=needs_scale,
        )
        return g, _gradient_of_scale(total, scale, ctx.numbers) if needs_scale else None, *_REST


_REST = (None,) * 7
"""In the place of gradients of what has none."""

_BLOCK = 131072
"""Elements for each thread: a block in float32 stays in the cache, and Python's part of the work is small beside it."""


def _comes_in_blocks(x: Tensor, scale: Tensor) -> bool:
    converted = x.dtype != torch.float32 and x.ndim > 0
    return converted and x.device.type == "cpu" and scale.numel() == 1 and not torch.compiler.is_compiling()


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same samples of each tensor, as views, which need not be contiguous."""
    samples = max(1, len(tensors[0]))
    each = max(1, _BLOCK * torch.get_num_threads() * samples // max(1, tensors[0].numel()))
    return zip(*(tensor.split(each) for tensor in tensors), strict=True)  # type: ignore[no-untyped-call]


def _gradients(
    gradient: Tensor, x: Tensor, out: Tensor, scale: Tensor, delta: Tensor | None, numbers: _Numbers, needs_scale: bool
) -> tuple[Tensor, Tensor]:
    """Of x, and a sum for :func:`_gradient_of_scale`."""
    low, high, _, _, through_rounding, _ = numbers
    g = gradient
    if delta is not None:
        # g (1 + delta sign(g) (x_c - x_q)): where x is clipped the result is not used, so x stands for x_c.
        g = torch.sub(x, out).mul_(g.abs()).mul_(delta / ((high - low) * scale)).add_(g)
    g = _where_inside(g, x, scale, low, high)
    if not needs_scale:
        return g, torch.zeros_like(scale)
    # Codes are out / scale; inside, the rounding error is (out - x) / scale, outside it is the bound.
    inside = x if through_rounding else out
    if scale.numel() == 1:
        return g, (_dot(gradient, out) - _dot(g, inside)).reshape(scale.shape)
    return g, (gradient * out - g * inside).sum_to_size(scale.shape)


def _gradient_of_scale(total: Tensor, scale: Tensor, numbers: _Numbers) -> Tensor:
    _, high, _, gradient_scale, _, decay = numbers
    found = total / scale * gradient_scale
    return found + decay * high**2 * scale if decay else found


class _Changes:
    """Whether somebody has written to a tensor since; asking does not keep its memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.counter = tensor.detach()  # shares the version counter, and goes on sharing it without the memory
        self.counter.data = tensor.new_empty(0)
        self.version = self.counter._version

    def any(self) -> bool:
        return self.counter._version != self.version


def _quantized(x: Tensor, scale: Tensor, numbers: _Numbers) -> Tensor:
    low, high, shift = numbers[:3]
    if torch.compiler.is_compiling():  # fuses these anyway; torch 2.11 compiles operations in place to gradients of zero
        codes = torch.div(x, scale).clamp(low, high)
        return ((codes + shift).round() - shift if shift else codes.round()) * scale
    codes = torch.div(x, scale).clamp_(low, high)
    codes = codes.add_(shift).round_().sub_(shift) if shift else codes.round_()
    return codes.mul_(scale)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products. Images in channels_last are read as they lie in memory: flattening them otherwise makes copies."""
    if _is_channels_last(a) and _is_channels_last(b):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _where_inside(g: Tensor, x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """``g`` where x is not clipped, else 0."""
    reads = scale.numel() == 1 and scale.device.type == "cpu"  # elsewhere reading the scale would wait for the device
    if reads and not torch.compiler.is_compiling():  # to which a value that is read is the end of a graph
        step = float(scale)
        low, high = low * step, high * step
    else:
        x = x / scale
    inside: Tensor = _hardtanh_backward(g, x, low, high)
    return inside


def discretize(v: Tensor, low: float, high: float, *, shift: float = 0.0, delta: Tensor | None = None) -> Tensor:
    """Clipping and rounding alone, on codes: ``round(clamp(v, low, high) + shift) - shift``; see :func:`fake_quantize`."""
    return fake_quantize(v, torch.ones((), dtype=v.dtype, device=v.device), low, high, shift=shift, delta=delta)


def lsq_gradient_scale(elements: int, high: float) -> float:
    """``1 / sqrt(N Q_p)`` (Esser et al., ICLR 2020, arXiv 1902.08153)."""
    return 1.0 / math.sqrt(max(elements, 1) * high)


def _twice_differentiable(
    x: Tensor, scale: Tensor, low: float, high: float, shift: float, delta: Tensor, calls: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """The same by the straight-through estimator, for :func:`qakd_plugin.quantizers.curvature.record_calls`."""
    v = torch.clamp(x / scale, low, high)
    codes = v + (torch.round(v.detach() + shift) - shift - v.detach())
    normalized = codes / (high - low)
    calls.append((delta, normalized))
    return normalized * ((high - low) * scale)
