"""One pass over memory in each direction: what ``fake_quantize`` computes, in kernels that torch.compile writes.

Outputs and gradients of inputs are the bits of the eager functions; gradients of scales are sums in another order. One kernel
serves all shapes: tensors are seen as rows. It is compiled once in a process, and inductor keeps it on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QakdError

_SMALLEST = 65536
"""Elements: for fewer, asking which kernel fits costs more than the passes that are saved."""

_COLUMNS = 4096
"""Of a tensor with one scale: what one core sums up at a time."""

_FEWEST_COLUMNS = 64

_NUMERICS = ("emulate_precision_casts", "eager_numerics.division_rounding")
"""Options of inductor, by which Triton divides as eager does and fuses no multiplication with an addition. Of versions of torch
that have them; on CPUs it does so anyway."""

_uses = 0


@contextmanager
def compiled_kernels(device: torch.device) -> Iterator[None]:
    """Within the block, all threads' ``fake_quantize`` runs compiled kernels where they pay and gradients are wanted.

    Args:
        device: on which a kernel is compiled for a trial, before anything depends on it.

    Raises:
        QakdError: nothing can be compiled on this machine.
    """
    global _uses
    try:
        _run_once(device)
    except Exception as problem:  # of inductor, of the compiler, of Triton: each has its own
        reason = (str(problem).strip() or "no message").splitlines()[0]
        raise QakdError(
            f"compile_quantizers=True: torch.compile fails on {device}: {type(problem).__name__}, {reason}. It needs a C++ "
            "compiler for a CPU (apt-get install g++), Triton and a C compiler for a GPU. Install them, or leave "
            "compile_quantizers out."
        ) from problem
    _uses += 1
    try:
        yield
    finally:
        _uses -= 1


@cache
def _run_once(device: torch.device) -> None:
    x, scale = torch.ones(32, _COLUMNS, device=device), torch.ones((), device=device)
    shape = rows_of(x, scale)
    assert shape is not None
    with torch.no_grad():
        forward(x, scale, (-8.0, 7.0, 0.0), shape)
        backward(x, x, scale, None, (-8.0, 7.0, 0.0), shape, through_rounding=True, needs_scale=True)


def are_on() -> bool:
    """Whether a :func:`compiled_kernels` block is open, and this call is not itself being compiled."""
    return _uses > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rows_of(x: Tensor, scale: Tensor) -> tuple[int, int] | None:
    """Rows and columns as which ``x`` lies in memory, each row under one scale; None where kernels do not fit or do not pay."""
    if type(x) not in (Tensor, nn.Parameter) or x.device.type not in ("cpu", "cuda") or x.numel() < _SMALLEST:
        return None
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _is_dense(x):
        return None
    if scale.numel() == 1:
        columns = math.gcd(x.numel(), _COLUMNS)
    elif scale.ndim == x.ndim and scale.shape[0] == scale.numel() == x.shape[0]:
        columns = x.numel() // x.shape[0]  # the first dimension is the outermost in both layouts
    else:
        return None
    rows = x.numel() // columns
    return (rows, columns) if rows > 1 and columns >= _FEWEST_COLUMNS else None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def forward(x: Tensor, scale: Tensor, levels: tuple[float, float, float], shape: tuple[int, int]) -> Tensor:
    """``fake_quantize`` of ``x``, without a gradient.

    Args:
        x: for which :func:`rows_of` returned ``shape``.
        scale: float32.
        levels: lowest code, highest code, shift.
        shape: rows and columns.
    """
    out = _kernel(_forward)(_rows(x, x, shape), _column(scale), *_on_device(*levels, x.device))
    # Not a view to autograd, which lets nobody write over a view that a function of ours returns.
    return out.as_strided(x.shape, x.stride()).data  # type: ignore[no-any-return]


def backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    delta: Tensor | None,
    levels: tuple[float, float, float],
    shape: tuple[int, int],
    *,
    through_rounding: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``x``, and the sum from which that of the scale follows, in its shape; arguments are ``fake_quantize``'s."""
    low, high, _ = levels
    slope = None if delta is None else _column(delta / ((high - low) * scale))
    # Eager compares with bounds in the unit of x where it may read the scale, with codes elsewhere.
    in_units = scale.numel() == 1 and scale.device.type == "cpu"
    found, sums = _kernel(_backward)(
        _rows(gradient, x, shape),
        _rows(x, x, shape),
        _column(scale),
        slope,
        *_on_device(*levels, x.device),
        in_units=in_units,
        through_rounding=through_rounding,
        needs_scale=needs_scale,
    )
    total = torch.zeros_like(scale) if sums is None else (sums.sum() if scale.numel() == 1 else sums).reshape(scale.shape)
    return found.as_strided(x.shape, x.stride()), total


def _rows(tensor: Tensor, like: Tensor, shape: tuple[int, int]) -> Tensor:
    """A view, unless ``tensor`` lies in memory otherwise than ``like``: then of a copy."""
    tensor = tensor.detach()
    if tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided(shape, (shape[1], 1))


def _column(scale: Tensor) -> Tensor:
    return scale.detach().reshape(-1, 1)


@cache
def _on_device(low: float, high: float, shift: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels as tensors: as numbers, each grid would be compiled anew."""

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=device)

    return number(low), number(high), number(shift) if shift else None


@cache
def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._inductor.config as inductor  # seconds, for those who compile

    known = inductor.get_config_copy()
    options: dict[str, Any] = {name: True for name in _NUMERICS if name in known}
    return torch.compile(function, dynamic=True, options=options)


def _quantized(q: Tensor, scale: Tensor, low: Tensor, high: Tensor, shift: Tensor | None) -> Tensor:
    codes = torch.minimum(torch.maximum(q, low), high)
    return (codes.round() if shift is None else (codes + shift).round() - shift) * scale


def _forward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, shift: Tensor | None) -> Tensor:
    return _quantized(x.float() / scale, scale, low, high, shift).to(x.dtype)


def _backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    slope: Tensor | None,
    low: Tensor,
    high: Tensor,
    shift: Tensor | None,
    *,
    in_units: bool,
    through_rounding: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    upstream, wide = gradient.float(), x.float()
    q = wide / scale
    out = _quantized(q, scale, low, high, shift)
    g = upstream if slope is None else (wide - out) * upstream.abs() * slope + upstream
    clipped = (wide <= low * scale) | (wide >= high * scale) if in_units else (q <= low) | (q >= high)
    g = torch.where(clipped, 0.0, g)
    sums = (upstream * out - g * (wide if through_rounding else out)).sum(1) if needs_scale else None
    return g.to(x.dtype), sums
