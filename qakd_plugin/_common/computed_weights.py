"""Layers whose weight is computed from other tensors whenever it is read or called: weight norm, spectral norm, pruning."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

HOOKS: tuple[tuple[type, str, str], ...] = (
    (WeightNorm, "weight_norm", "torch.nn.utils.remove_weight_norm(model.get_submodule({0!r}))"),
    (SpectralNorm, "spectral_norm", "torch.nn.utils.remove_spectral_norm(model.get_submodule({0!r}))"),
    (BasePruningMethod, "a pruning mask", 'torch.nn.utils.prune.remove(model.get_submodule({0!r}), "weight")'),
)
"""Forward pre-hooks that compute a weight: their class, what they do, and the line that ends it (``{0!r}``: the name)."""


def reparametrized(module: nn.Module) -> tuple[str, str] | None:
    """By what a module computes its weight, and the line that makes it a parameter again, with ``{0!r}`` for its name."""
    if is_parametrized(module):
        tensor, kinds = next(iter(module.parametrizations.items()))  # type: ignore[operator, union-attr]
        line = f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule({{0!r}}), {tensor!r})"
        return f"a parametrization ({', '.join(type(kind).__name__.lstrip('_') for kind in kinds)})", line
    for hook in module._forward_pre_hooks.values():
        for kind, what, line in HOOKS:
            if isinstance(hook, kind):
                return what, line
    return None
