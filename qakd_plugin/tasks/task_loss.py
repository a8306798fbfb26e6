"""What a network learns from labels: cross-entropy where that is the one reading, the user's loss, or the network's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ..errors import QakdError
from ..losses import cross_entropy
from .inputs import Inputs, forward_names
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
            "Pass task_loss=lambda outputs, targets: torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), "
            "targets.float()), or a loss for regression."
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
    """Inputs with which ``network`` computes its own loss: targets under the name that its forward has for them.

    That is "labels" or "targets", or, where forward has neither, the next argument, of a network that takes no others
    by keyword.

    Raises:
        QakdError: ``network`` takes no targets, as the graph that a toolkit captured of it does not.
    """
    names, takes_any = forward_names(network)
    name = next((name for name in ("labels", "targets") if name in names), None)
    if isinstance(inputs, Mapping):
        if isinstance(targets, Mapping):
            return {**inputs, **targets}
        if name is not None or takes_any:
            return {**inputs, name or "labels": targets}
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        if name is not None and len(args) <= names.index(name):
            return {**dict(zip(names, args, strict=False)), name: targets}
        if len(names) > len(args) or takes_any:
            return (*args, targets)
    raise QakdError(
        f'task_loss="model": {type(network).__name__}.forward takes {", ".join(names) or "nothing"} and no targets, so it '
        "computes no loss of its own. Pass task_loss=lambda outputs, targets: ..., or prepare with toolkit='modelopt', "
        "which leaves the network's own forward in its place."
    )
