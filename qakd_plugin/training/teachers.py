"""The network that teaches: one or several, frozen or learning too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QakdError
from ..tasks.inputs import call_in_own_precision
from ..tasks.outputs import SINGLE, Outputs, frozen_output, named_outputs
from .methods import Method, Phase


class MeanOfTeachers(nn.Module):
    """Several networks as one: the mean of their logits.

    Args:
        networks: with the same classes; they are not copied.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *args: object, **kwargs: object) -> Tensor | dict[str, Tensor]:
        """Mean logits (N, C), or the mean of every output by path."""
        found = [named_outputs(call_in_own_precision(network, *args, **kwargs)) for network in self.networks]
        shapes = sorted({f"{name} {tuple(tensor.shape)}" for outputs in found for name, tensor in outputs.items()})
        if len(shapes) > len(found[0]) or any(outputs.keys() != found[0].keys() for outputs in found):
            raise QakdError(
                f"teacher: several teachers must know the same classes; they output {', '.join(shapes)} for the same batch."
            )
        means = {
            name: torch.stack([outputs[name] for outputs in found]).mean(0)
            for name, tensor in found[0].items()
            if tensor.is_floating_point()
        }
        return means[SINGLE] if means.keys() == {SINGLE} else means


def one_teacher(teacher: nn.Module | Sequence[nn.Module] | None) -> nn.Module | None:
    """The teacher to call, whatever the user passed.

    Raises:
        QakdError: it is neither a network nor a sequence of networks.
    """
    if teacher is None or isinstance(teacher, nn.Module):
        return teacher
    networks = list(teacher) if isinstance(teacher, Sequence) else []
    if not networks or not all(isinstance(network, nn.Module) for network in networks):
        raise QakdError(f"teacher must be a network, a sequence of networks or None, got {teacher!r}.")
    return networks[0] if len(networks) == 1 else MeanOfTeachers(networks)


def require_teacher(method: Method, phases: Sequence[Phase], teacher: nn.Module | None) -> None:
    """Raise QakdError where a phase needs a teacher and there is none."""
    if teacher is None and any(phase.needs_teacher for phase in phases):
        raise QakdError(
            f"teacher=None, but {type(method).__name__} learns from a teacher. Pass a full-precision network, or use QAT()."
        )


def taught_outputs(teacher: nn.Module | None, phase: Phase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs | None:
    """What the teacher outputs for a call in this phase, by path; None in a phase that needs no teacher.

    With gradients where it learns in this phase, in eval mode and without them otherwise.
    """
    if teacher is None or not phase.needs_teacher:
        return None
    return named_outputs(teacher(*args, **kwargs) if phase.teacher else frozen_output(teacher, *args, **kwargs))


def checksum(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, their names, types and shapes."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
