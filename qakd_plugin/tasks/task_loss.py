"""What a network learns from labels: cross-entropy where that is the one reading, the user's loss, or the network's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ..errors import QakdError
from ..losses import cross_entropy
from .inputs import Inputs, arguments, forward_names
from .matchers import KL
from .matching import default_match
from .outputs import Outputs, listed

TaskLoss: TypeAlias = Callable[[Any, Any], Tensor] | Literal["model"]
"""Outputs (a tensor where there is one, else a dict by path) and targets -> a scalar or (N,); or "model": the network is called
with its targets and computes its loss itself."""


def check_task_loss(task_loss: object) -> None:
    """Raise QakdError where it is neither."""
    if task_loss is not None and task_loss != "model" and not callable(task_loss):
        raise QakdError(f'task_loss={task_loss!r} must be a callable(outputs, targets), "model", or None for cross-entropy.')


def default_task_loss(outputs: Outputs, inputs: Inputs, targets: Any) -> Tensor:
    """Cross-entropy over the class dimension of the one output that has one, (N,).

    Raises:
        QakdError: labels can be read in more than one way; shows the line to write.
    """
    try:
        match = default_match(outputs, inputs)
    except QakdError as error:
        raise QakdError(
            f"labels: the network outputs {listed(outputs)}, and what is to be learned from labels is not to be guessed. Pass "
            'task_loss=lambda outputs, targets: ..., or task_loss="model" where the network computes its own.'
        ) from error
    ((name, matcher),) = match.items()
    if not isinstance(matcher, KL):
        raise QakdError(
            f"labels: {name!r} {tuple(outputs[name].shape)} is one logit, over which a cross-entropy of classes is always 0. "
            "Pass task_loss=lambda outputs, targets: torch.nn.functional.binary_cross_entropy_with_logits(outputs.flatten(), "
            "targets.flatten().float()), or a loss for regression."
        )
    if not isinstance(targets, Tensor):
        raise QakdError(f"labels: cross-entropy needs a tensor, got {type(targets).__name__}. Pass task_loss= or a batch_fn.")
    return cross_entropy(outputs[name], targets, dim=matcher.dim)


def model_loss(outputs: Outputs) -> Tensor:
    """The loss that a network computed itself: its ``loss``, or the sum of what it returned where all of that are scalars.

    Raises:
        QakdError: there is none.
    """
    if "loss" in outputs:
        return outputs["loss"]
    scalars = [tensor for tensor in outputs.values() if tensor.ndim == 0]
    if not scalars or len(scalars) < len(outputs):
        raise QakdError(
            f'task_loss="model": called with its targets, the network outputs {listed(outputs)} and no loss. Pass '
            "task_loss=lambda outputs, targets: ..."
        )
    total = scalars[0]
    for scalar in scalars[1:]:
        total = total + scalar
    return total


def with_targets(network: nn.Module, inputs: Inputs, targets: Any) -> Inputs:
    """Inputs with which ``network`` computes its own loss.

    Targets go in under "labels" or "targets", whichever forward takes; a mapping of targets under its own names; else as the
    next argument.

    Raises:
        QakdError: forward takes no targets.
    """
    names, takes_any = forward_names(network)
    args, kwargs = arguments(inputs)
    known = dict(zip(names, args, strict=False)) | kwargs
    if isinstance(targets, Mapping) and (takes_any or targets.keys() <= set(names)):
        return {**known, **targets}
    if (name := next((name for name in ("labels", "targets") if name in names), None)) is not None:
        return {**known, name: targets}
    if kwargs and takes_any:
        return {**known, "labels": targets}
    if kwargs or (len(args) == len(names) and not takes_any):
        raise QakdError(
            f'task_loss="model": {type(network).__name__} takes no labels, its forward takes {", ".join(names)}. A graph of '
            "PT2E was captured without them. Pass task_loss=lambda outputs, targets: ..."
        )
    return (*args, targets)
