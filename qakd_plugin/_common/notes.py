"""What is remembered on a model itself, and by its copies. Needs no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def notes_of(model: nn.Module) -> dict[str, Any]:
    """Where to read and write them: of a GraphModule copies keep ``meta`` alone, of others all attributes."""
    fx = sys.modules.get("torch.fx")
    is_graph = fx is not None and isinstance(model, fx.GraphModule)
    return model.meta if is_graph else model.__dict__  # type: ignore[return-value]
