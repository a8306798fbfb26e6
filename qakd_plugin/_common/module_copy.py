"""Copies of networks that compute the same."""

from __future__ import annotations

import copy

from torch import fx, nn

_FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def copied(network: nn.Module) -> nn.Module:
    """A deep copy with all hooks of forward: copies of a ``GraphModule`` lack them, and would compute something else."""
    memo: dict[int, object] = {}
    made: nn.Module = copy.deepcopy(network, memo)
    for module in network.modules():
        if isinstance(module, fx.GraphModule):
            for name in _FORWARD_HOOKS:
                setattr(memo[id(module)], name, copy.deepcopy(getattr(module, name), memo))
    return made


def has_hooks(network: nn.Module) -> bool:
    """Whether a network has hooks of forward as a whole."""
    return bool(network._forward_pre_hooks or network._forward_hooks)


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let a network that was made of another one run the hooks of forward that the other has, as a whole, too."""
    for name in _FORWARD_HOOKS:
        getattr(target, name).update(getattr(source, name))
