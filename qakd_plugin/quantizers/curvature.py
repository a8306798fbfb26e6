"""Curvature of the loss at the outputs of EWGS quantizers, from which their delta follows (Hutchinson's estimator).

Source: Lee, Kim and Ham, CVPR 2021, arXiv 2104.00903.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Recording(threading.local):
    """Of this thread alone: another may train a network meanwhile."""

    calls: list[tuple[Tensor, Tensor]] | None = None


_recording = _Recording()


def recorded_calls() -> list[tuple[Tensor, Tensor]] | None:
    """Where this thread's quantizers list their calls now, or None outside of :func:`record_calls`."""
    return _recording.calls


@contextmanager
def record_calls() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the block, this thread's EWGS quantizers can be differentiated twice, and list their discretized values.

    Yields:
        (delta, x_q) of every call, in order: the buffer itself, and codes scaled to an interval of length 1.
    """
    assert _recording.calls is None, "record_calls() blocks cannot be nested"
    _recording.calls = []
    try:
        yield _recording.calls
    finally:
        _recording.calls = None


def refresh_delta(loss: Callable[[], Tensor], probes: int = 2) -> dict[int, float]:
    """Set every EWGS quantizer's delta from the curvature of a loss, by Hutchinson's estimator.

    ``delta = max(0, Tr(H) / N) / (3 std(g))`` with gradient g and Hessian H of the loss with respect to the quantizer's N
    discretized values; ``Tr(H) = E[v^T H v]`` over random signs v, drawn for all quantizers at once.

    Args:
        loss: runs the network on one batch and returns a scalar.
        probes: random vectors to average over.

    Returns:
        The new delta of every quantizer, by the ``id`` of its buffer; empty where the network has no EWGS quantizer.
    """
    with record_calls() as recorded, torch.enable_grad():
        value = loss()
    if not recorded:
        return {}
    points = [x for _, x in recorded]
    gradients = torch.autograd.grad(value, points, create_graph=True, allow_unused=True)
    used = [index for index, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    curvature = [0.0] * len(points)
    for _ in range(probes):
        signs = [torch.randint_like(points[index], 2) * 2 - 1 for index in used]
        products = torch.autograd.grad(
            [gradients[index] for index in used],
            [points[index] for index in used],
            grad_outputs=signs,
            retain_graph=True,
            allow_unused=True,
        )
        for index, sign, product in zip(used, signs, products, strict=True):
            if product is not None:
                curvature[index] += float((sign * product).mean()) / probes
    found: dict[int, list[float]] = {}
    buffers: dict[int, Tensor] = {}
    for (buffer, _), gradient, trace in zip(recorded, gradients, curvature, strict=True):
        buffers[id(buffer)] = buffer
        spread = 0.0 if gradient is None or gradient.numel() < 2 else float(gradient.detach().std())
        # A quantizer that is called several times takes the mean.
        found.setdefault(id(buffer), []).append(max(0.0, trace) / (3 * spread) if spread > 0 else 0.0)
    deltas = {key: sum(values) / len(values) for key, values in found.items()}
    with torch.no_grad():
        for key, delta in deltas.items():
            buffers[key].fill_(delta)
    return deltas
