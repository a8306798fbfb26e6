"""Ranges from observed tensors: a streaming histogram, and the clipping range with the least squared error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import NotPreparedError
from ..tasks.inputs import Inputs, call

_BINS = 2048
_CANDIDATES = 200
_PIECE = 1 << 17
"""Numbers that are quantized at a time: they fit a processor's second cache, which is several times faster."""


class RangeObserver:
    """Histogram of absolute values over any number of batches, in memory that does not grow with them.

    Args:
        name: of what is observed, for messages.
    """

    def __init__(self, name: str = "the observed tensor") -> None:
        self.name = name
        self.maximum = 0.0
        self.minimum = float("inf")
        self._limit = 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    @torch.no_grad()
    def observe(self, x: Tensor, *, clamp: tuple[float, float] | None = None) -> None:
        """Add one tensor of any shape.

        Args:
            x: what is quantized.
            clamp: (0, upper bound) of a ReLU after the quantizer: only what it lets through counts.

        Raises:
            NotPreparedError: it holds NaN or infinite values.
        """
        values = (x.abs() if clamp is None else x.clamp(*clamp)).detach().float().flatten()
        if values.numel() == 0:
            return
        top = float(values.max())
        if not top < float("inf"):
            raise NotPreparedError(
                f"{self.name}: what is quantized there is not finite (NaN or infinite) on a calibration batch. Look for an "
                "operation before it that overflows or divides by zero, or exclude this layer from quantization (keep=...)."
            )
        self.maximum = max(self.maximum, top)
        self.minimum = min(self.minimum, float(x.min()))
        if top > self._limit:
            self._grow(top)
        if self._limit > 0:
            self._counts += _histogram(values, self._limit)

    def _grow(self, top: float) -> None:
        """Double the covered range until it holds ``top``; counts are merged pairwise, so nothing is lost but resolution."""
        if self._limit == 0:
            self._limit = top
            return
        while self._limit < top:
            self._counts = torch.cat([self._counts.reshape(-1, 2).sum(1), torch.zeros(_BINS // 2, dtype=torch.float64)])
            self._limit *= 2

    def best_clip(self, levels: int) -> float:
        """The clipping range with the least squared quantization error.

        Args:
            levels: highest integer code; the step is ``clip / levels``.
        """
        if self.maximum == 0:
            return 0.0
        centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self._limit / _BINS)
        clips = self.maximum * torch.linspace(1.0 / _CANDIDATES, 1.0, _CANDIDATES, dtype=torch.float64)
        steps = (clips / levels)[:, None]
        quantized = torch.clamp(torch.round(centers / steps), max=levels) * steps
        errors = ((quantized - centers) ** 2 * self._counts).sum(1)
        return float(clips[int(errors.argmin())])


def _histogram(values: Tensor, limit: float) -> Tensor:
    """float64 (_BINS,) on the CPU: how many of (N,) ``values`` lie in each of the bins from 0 to ``limit``.

    torch.histc adds floats on a GPU, one by one: it stops counting at 2^24, and refuses to be deterministic.
    """
    if values.device.type == "cpu":
        return torch.histc(values, bins=_BINS, min=0.0, max=limit).double()
    return _counted(values, limit).double().cpu()


def _counted(values: Tensor, limit: float) -> Tensor:
    return torch.bincount((values / limit * _BINS).long().clamp_(max=_BINS - 1), minlength=_BINS)


@torch.no_grad()
def observe_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Inputs],
    clamps: Mapping[str, tuple[float, float] | None],
    groups: Mapping[str, str] | None = None,
) -> dict[str, RangeObserver]:
    """Run batches through a model and watch what reaches some of its modules: their first argument.

    Args:
        model: that holds them.
        modules: by name.
        batches: inputs of the model.
        clamps: of those that stand in front of a ReLU, by name.
        groups: of those that are to have one range, by name; members of a group are observed as one, each with its own clamp.

    Raises:
        NotPreparedError: names a module that something infinite or NaN reaches.
    """
    firsts: dict[str, RangeObserver] = {}
    observers = {name: firsts.setdefault((groups or {}).get(name, name), RangeObserver(name)) for name in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: observers[name].observe(args[0], clamp=clamps.get(name)),
        )
        for name, module in modules.items()
    ]
    try:
        for batch in batches:
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return observers


@torch.no_grad()
def best_weight_clip(weight: Tensor, quant_min: float, quant_max: float, axis: int | None, shift: float = 0.0) -> Tensor:
    """Clipping range of a weight with the least squared error, per channel or per tensor.

    Args:
        weight: float, any shape.
        quant_min: lowest integer code (negative or 0).
        quant_max: highest integer code; the step is ``clip / quant_max``.
        axis: channel dimension, or None for one range.
        shift: as in :func:`qakd_plugin.quantizers.fake_quantize.fake_quantize`: half the number of steps of a grid
            without a zero.

    Returns:
        Clips: (C,) per channel, 0-d per tensor; 0 where all weights are 0.
    """
    rows = weight.detach().float().movedim(axis, 0).flatten(1) if axis is not None else weight.detach().float().reshape(1, -1)
    largest = rows.abs().amax(1)
    fractions = torch.linspace(0.2, 1.0, 81, device=rows.device)
    clips = fractions[:, None] * largest
    steps = (clips / quant_max).clamp(min=torch.finfo(torch.float32).tiny)
    errors = torch.zeros_like(clips)
    height = max(1, _PIECE // rows.shape[1])
    for band in (slice(start, start + height) for start in range(0, len(rows), height)):
        for piece in torch.split(rows[band], _PIECE, dim=1):
            found = torch.empty_like(piece)
            for step, error in zip(steps[:, band, None], errors[:, band], strict=True):
                torch.div(piece, step, out=found).clamp_(quant_min, quant_max)
                error += found.add_(shift).round_().sub_(shift).mul_(step).sub_(piece).square_().sum(1)
    best = len(fractions) - 1 - errors.flip(0).argmin(0)  # of equals the largest
    best_clips = clips.gather(0, best[None])[0]
    return best_clips if axis is not None else best_clips.reshape(())
