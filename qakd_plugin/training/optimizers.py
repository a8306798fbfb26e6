"""Optimizers and their schedule: AdamW or another, linear warm-up, half a cosine."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QakdError, UnsupportedQuantizerError
from ..toolkits import Adapter
from ..toolkits.adapter import Role
from .config import MakeOptimizer, Settings, Trainable
from .distributed.sharding import whole

_log = logging.getLogger(__name__)
_RATE, _RATE_OF_MANY_BITS, _MANY_BITS = 1e-3, 1e-5, 7
"""Of the weights: below 7 bits, from there on."""


def quantizer_parameters(adapter: Adapter, model: nn.Module, role: Role | None = None) -> dict[int, nn.Parameter]:
    """Trained parameters that belong to quantizers (of one role), by id."""
    quantizers = [quantizer for quantizer in adapter.quantizers(model) if role in (None, quantizer.role)]
    return {id(p): p for quantizer in quantizers for p in quantizer.module.parameters() if p.requires_grad}


def require_scales(adapter: Adapter, model: nn.Module) -> None:
    """Raise QakdError where no quantizer learns anything, so that nothing would be left to train without weights."""
    if not quantizer_parameters(adapter, model):
        raise QakdError(
            'trainable="scales": none of the quantizers of prepared_model learns a scale. Install some that do first: '
            "qakd.use_quantizers(prepared_model, qakd.LSQ()), or PACT() or EWGS(); DoReFa learns none."
        )


@contextmanager
def scales_alone(adapter: Adapter, model: nn.Module, trainable: Trainable) -> Iterator[None]:
    """Within the block nothing but parameters of quantizers needs a gradient, if ``trainable`` is "scales".

    BatchNorms whose gamma and beta need none keep their statistics, too.
    """
    learned = quantizer_parameters(adapter, model)
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in learned] if trainable == "scales" else []
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def with_rate(settings: Settings, adapter: Adapter, model: nn.Module) -> Settings:
    """The same settings with a rate for the weights; logs the one that it chooses, and why.

    Codes of few bits change only when weights move far; at 8 bits a prepared model is near its teacher, and a rate for training
    from scratch can take it away from there. benchmarks/default_rate.py measures that.
    """
    if settings.lr is not None or settings.trainable == "scales":
        return settings
    bits = _fewest_bits(adapter, model)
    # What other optimizers make of a rate is not known: plain steps follow the size of the gradient.
    rate = _RATE if bits is None or bits < _MANY_BITS or not _adapts(settings.optimizer) else _RATE_OF_MANY_BITS
    _log.info(
        "lr=%g: the default for %s and %s. Pass lr= for another.",
        rate,
        "quantizers of unknown grids" if bits is None else f"{bits} bits",
        optimizer_name(settings.optimizer),
    )
    return replace(settings, lr=rate)


def _fewest_bits(adapter: Adapter, model: nn.Module) -> int | None:
    found = []
    for quantizer in adapter.quantizers(model):
        with suppress(UnsupportedQuantizerError):  # a grid that can be trained with, if not exported
            qparams = adapter.qparams(quantizer)
            found.append((qparams.quant_max - qparams.quant_min).bit_length())
    return min(found, default=None)


def _adapts(make: MakeOptimizer) -> bool:
    """Whether it is of Adam's family, whose steps have the size of the rate."""
    return "adam" in optimizer_name(make).lower()


def student_optimizer(adapter: Adapter, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Groups: weights, biases and norms without decay, and parameters of quantizers with rates of their own and no decay.

    The rate is chosen as :func:`with_rate` does where ``settings`` holds none. Of parameters that need a gradient; see
    :func:`scales_alone`.

    With Adam's step the rate of quantizers is a relative change per step. Ours are logarithms or ratios already; a scale that a
    toolkit learns as it is gets the rate times its size.
    """
    settings = with_rate(settings, adapter, model)
    of_weights = quantizer_parameters(adapter, model, "weight")
    of_activations = {key: p for key, p in quantizer_parameters(adapter, model, "activation").items() if key not in of_weights}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in of_weights | of_activations]
    groups = _weight_groups(weights, settings.weight_decay)
    rate = settings.quantizer_lr
    rules = ((adapter.learned(quantizer), quantizer.module) for quantizer in adapter.quantizers(model))
    relative = {id(p) for rule, holder in rules if rule is not None for p in rule.parameters(holder)}
    groups += _quantizer_groups(of_weights, relative, rate)
    groups += _quantizer_groups(
        of_activations, relative, rate if settings.activation_quantizer_lr is None else settings.activation_quantizer_lr
    )
    return settings.optimizer([group for group in groups if group["params"]], lr=rate if settings.lr is None else settings.lr)


def _quantizer_groups(parameters: dict[int, nn.Parameter], relative: set[int], rate: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"params": [p for key, p in parameters.items() if key in relative], "lr": rate}]
    for key, parameter in parameters.items():
        if key not in relative:
            size = float(whole(parameter.detach()).abs().mean()) or 1.0
            groups.append({"params": [parameter], "lr": rate * size})
    return [{**group, "weight_decay": 0.0} for group in groups]


def teacher_optimizer(teacher: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The same kind for a teacher that learns too: weights, and biases and norms without decay."""
    groups = _weight_groups(teacher.parameters(), settings.weight_decay)
    return settings.optimizer([group for group in groups if group["params"]], lr=settings.teacher_lr)


def _weight_groups(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    weights = list(parameters)
    return [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]


def optimizer_name(make: MakeOptimizer) -> str:
    """The same text in every process, for checkpoints and trackers: "AdamW", "SGD(momentum=0.9)"."""
    if isinstance(make, partial):
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(make.keywords.items()))
        return f"{optimizer_name(make.func)}({options})"
    return getattr(make, "__qualname__", type(make).__qualname__)


def clip_gradients(parameters: Iterable[nn.Parameter], of_quantizers: Container[int], limit: float | None) -> Tensor:
    """Clip the gradients of weights, and apart from them those of quantizers, to a norm each.

    Apart, because the gradient of a clipping range is a sum over all activations, and would drown those of weights.

    Args:
        parameters: with or without gradients.
        of_quantizers: ids of those that belong to quantizers.
        limit: largest norm; None only measures.

    Returns:
        () the norm of all gradients before clipping.
    """
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        if parameter.requires_grad:
            parts[id(parameter) in of_quantizers].append(parameter)
    largest = math.inf if limit is None else limit
    norms = [whole(nn.utils.clip_grad_norm_(part, largest)) for part in parts if part]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a share of all steps, then half a cosine down to 0.

    Args:
        optimizer: whose learning rates are the peaks.
        steps: of the whole run.
        warmup: share of them with a rising rate.
    """
    rising = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
