"""Checks before the first training step, and the search for what went wrong after a bad one. Each message says what to do."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Adapter
from .errors import NotPreparedError, QakdError, TrainingError, UnsupportedQuantizerError

_log = logging.getLogger(__name__)


def check_quantizers(adapter: Adapter, model: nn.Module) -> None:
    """At least one weight quantizer; ranges calibrated, finite and positive.

    Raises:
        NotPreparedError: names the quantizer.
    """
    quantizers = adapter.quantizers(model)
    roles = [quantizer.role for quantizer in quantizers]
    if "weight" not in roles:
        raise NotPreparedError(
            f"prepared_model ({type(model).__name__}, {adapter.name}) has no enabled weight quantizer: there is nothing to "
            "train for. "
            "Enable weight quantization in the toolkit's configuration, or use qakd_plugin.prepare."
        )
    if "activation" not in roles:
        _log.warning(
            "prepared_model quantizes weights only (%d quantizers, none for activations): layers will compute in floating "
            "point.",
            len(quantizers),
        )
    for quantizer in quantizers:
        try:
            scale = adapter.qparams(quantizer).scale
        except UnsupportedQuantizerError as problem:
            if quantizer.role == "weight":
                raise
            _log.warning("%s It can be trained with, but not exported.", problem)
            continue
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise NotPreparedError(
                f"{quantizer.fqn}: its scale must be finite and positive, got "
                f"{float(scale.min()):.3g}..{float(scale.max()):.3g}. "
                "Calibrate again on real batches."
            )


def check_trainable(adapter: Adapter, model: nn.Module) -> None:
    """Some weight must require a gradient, not only parameters of quantizers.

    Raises:
        TrainingError: otherwise.
    """
    of_quantizers = {id(p) for quantizer in adapter.quantizers(model) for p in quantizer.module.parameters()}
    if not any(p.requires_grad for p in model.parameters() if id(p) not in of_quantizers):
        raise TrainingError(
            f"none of prepared_model's weights requires a gradient ({type(model).__name__}): it looks like a copy of a frozen "
            "teacher. "
            "Call prepared_model.requires_grad_(True) before distill."
        )


def check_first_batch(student: nn.Module, student_logits: Tensor, teacher_logits: Tensor | None, x: Tensor) -> None:
    """Input and output of the student are finite, and both networks know the same classes.

    Raises:
        TrainingError: names the input or the first layer with a NaN.
        QakdError: the numbers of classes differ.
    """
    require_finite_input(x, 0)
    if not bool(torch.isfinite(student_logits).all()):
        raise TrainingError(f"prepared_model puts out NaN or infinite logits on the first batch. {blame(student, x)}")
    if student_logits.ndim != 2:
        raise QakdError(f"prepared_model must put out logits (N, C), got shape {tuple(student_logits.shape)}.")
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise QakdError(
            f"teacher and prepared_model must know the same classes: the teacher puts out {tuple(teacher_logits.shape)}, the "
            "student "
            f"{tuple(student_logits.shape)} for the same batch."
        )


def require_finite_input(x: Tensor, batch: int) -> None:
    """Raise TrainingError, with the batch's number, for NaN or infinite images."""
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise TrainingError(f"loader: batch {batch} holds NaN or infinite values in samples {bad[:8]}. Clean the data.")


@torch.no_grad()
def blame(model: nn.Module, x: Tensor) -> str:
    """One sentence: the first module whose output is not finite for ``x`` although its input is."""
    found: list[tuple[str, nn.Module]] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            inputs = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            clean = all(bool(torch.isfinite(a).all()) for a in inputs)
            if not found and clean and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append((name, module))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        model(x)
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
