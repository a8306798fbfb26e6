"""One teacher or several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import QakdError
from ..tasks.outputs import logits_of


class MeanOfTeachers(nn.Module):
    """Several networks as one: the mean of their logits.

    Args:
        networks: with the same classes; they are not copied.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Logits (N, C)."""
        logits = [logits_of(network(*args, **kwargs), "teacher") for network in self.networks]
        shapes = sorted({tuple(found.shape) for found in logits})
        if len(shapes) > 1:
            raise QakdError(f"teacher: several teachers must know the same classes; their logits have shapes {shapes}.")
        return torch.stack(logits).mean(0)


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
