"""Numbers that are not finite: which batch, which step, which layer. Each message says what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._common.module_mode import buffers_kept
from ..errors import TrainingError, UnsupportedQuantizerError
from ..tasks.inputs import Inputs, call, named_tensors
from ..toolkits import Adapter, Quantizer
from .distributed.sharding import is_divided

_MISFIT = 10.0
"""How many times its range the values of a quantizer may be, as their root mean square; where statistics fit, it is below 2."""

_BEFORE_ANY_STEP = (
    "No step was taken yet, so it is not the rate: look for a layer that divides by nearly zero, such as a normalization of "
    "channels that hardly vary."
)


@dataclass(frozen=True)
class Moment:
    """Where a run is, for messages.

    Attributes:
        phase: its name.
        epoch: from 0.
        batch: of the epoch, from 0.
        step: of the optimizer, from 0.
        lr: the peak rate.
        gradient_norm: of the step before; NaN before the first.
        way_back: a sentence on the last good checkpoint, if there is one.
        rate: the name of that rate.
    """

    phase: str
    epoch: int
    batch: int
    step: int
    lr: float
    gradient_norm: float
    way_back: str
    rate: str = "lr"


def require_finite_losses(values: dict[str, float], inputs: Inputs, model: nn.Module, moment: Moment) -> None:
    """Raise TrainingError for a loss of a batch that is not finite.

    Args:
        values: of the batch, by name.
        inputs: of the batch.
        model: the student, before the step.
        moment: for the message.
    """
    bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    require_finite_input(inputs, moment.batch)
    raise TrainingError(
        f"{bad} is {values[bad]} at step {moment.step} (batch {moment.batch} of epoch {moment.epoch}), phase "
        f"{moment.phase!r}; the last gradient norm was {moment.gradient_norm:.3g}. {blame(model, inputs)} "
        f"Lower {moment.rate}={moment.lr:g} or clip gradients harder (grad_clip).{moment.way_back}"
    )


def require_finite_gradient(
    norm: float, loss: float, moment: Moment, adapter: Adapter, model: nn.Module, inputs: Inputs
) -> None:
    """Raise TrainingError for a gradient that is not finite, by its norm.

    Args:
        norm: of the gradient.
        loss: of the batch.
        moment: for the message.
        adapter: of the student's toolkit.
        model: the student, before the step.
        inputs: of the batch.
    """
    if not math.isfinite(norm):
        advice = misfit(adapter, model, inputs) or (f"Lower {moment.rate}={moment.lr:g}." if moment.step else _BEFORE_ANY_STEP)
        raise TrainingError(
            f"the gradient is not finite at step {moment.step} of phase {moment.phase!r} (its norm is {norm}, the loss "
            f"{loss:.4g}). {advice}{moment.way_back}"
        )


@torch.no_grad()
def misfit(adapter: Adapter, model: nn.Module, inputs: Inputs) -> str | None:
    """Two sentences on the quantizer that gets most beyond its range in training, where BatchNorm normalizes with the batch.

    Ranges are calibrated in eval mode. Where running statistics do not fit the data, what is quantized in training is larger by
    orders of magnitude: it is clipped, and gradients of ranges are sums of all that is.

    Args:
        adapter: of the student's toolkit.
        model: the student in training mode; its buffers are put back, and no random number is drawn.
        inputs: of a batch.

    Returns:
        None without BatchNorms that have statistics, of a network that is divided among processes, or where ranges fit.
    """
    if is_divided(model) or not any(name.endswith("running_var") for name, _ in model.named_buffers()):
        return None
    found: dict[str, float] = {}

    def watch(name: str, largest: float) -> Any:
        def look(module: nn.Module, args: Any) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].float().square().mean().sqrt()) / largest)

        return look

    handles = []
    for quantizer in adapter.quantizers(model):
        if quantizer.role == "activation" and (largest := _largest(adapter, quantizer)):
            handles.append(quantizer.module.register_forward_pre_hook(watch(quantizer.fqn, largest)))
    device = next(iter(named_tensors(inputs).values())).device
    try:
        with buffers_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    worst = max(found, key=lambda name: found[name], default=None)
    if worst is None or not found[worst] > _MISFIT:
        return None
    return (
        f"{worst}: in training what it quantizes is {found[worst]:.0f} times its calibrated range, because the running "
        "statistics of BatchNorms do not fit the data. Let the float model see some batches in training mode, then prepare it "
        "again."
    )


def _largest(adapter: Adapter, quantizer: Quantizer) -> float:
    """The largest value that a quantizer represents; 0 where it has no range of its own."""
    try:
        qparams = adapter.qparams(quantizer)
    except UnsupportedQuantizerError:
        return 0.0
    return float(qparams.scale.max()) * max(abs(qparams.quant_min), abs(qparams.quant_max))


def require_finite_input(inputs: Inputs, batch: int) -> None:
    """Raise TrainingError, with the batch's number, for NaN or infinite inputs."""
    for name, x in named_tensors(inputs).items():
        if x.is_floating_point() and x.ndim and not bool(torch.isfinite(x).all()):
            bad = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
            where = "" if isinstance(inputs, Tensor) else f" of {name!r}"
            raise TrainingError(
                f"loader: batch {batch} holds NaN or infinite values in samples {bad[:8]}{where}. Clean the data."
            )


@torch.no_grad()
def blame(model: nn.Module, inputs: Inputs) -> str:
    """One sentence: the first module whose output is not finite for ``inputs`` although its own input is."""
    if is_divided(model):  # a process that calls it alone would wait for the others
        return "The network is divided among processes: train it in one, for the name of the layer where it begins."
    found: list[tuple[str, nn.Module]] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            read = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            clean = all(bool(torch.isfinite(a).all()) for a in read)
            if not found and clean and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append((name, module))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "No single layer turns finite numbers into NaN on this batch."
    name, module = found[0]
    gamma = getattr(getattr(module, "bn", None), "weight", None)
    if isinstance(gamma, Tensor) and bool((gamma == 0).any()):
        channel = int((gamma == 0).nonzero()[0])
        return (
            f"{name} ({type(module).__name__}) is where it begins: its BatchNorm has gamma = 0 in channel {channel} "
            "(zero_init_residual?), and the fused layer divides by it. Set such gammas to a small number, 1e-3, before "
            "preparing."
        )
    return f"{name} ({type(module).__name__}) is where it begins."
