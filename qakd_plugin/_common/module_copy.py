"""Copies of networks that compute the same."""

from __future__ import annotations

import copy
from collections.abc import Collection

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
    """Let a network that was made of another one run the hooks of forward that the other has as a whole, too."""
    for name in _FORWARD_HOOKS:
        getattr(target, name).update(getattr(source, name))


def move_hooks(source: nn.Module, target: nn.Module, *, but_not: Collection[object] = ()) -> None:
    """The same for a module in whose place another one stands, which may call it: there they would run once more.

    Args:
        source: has none afterwards.
        target: gets them.
        but_not: functions that are hooks of a toolkit, whose work ``target`` does itself.
    """
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(source, name)
        for key in [key for key, hook in hooks.items() if any(hook is own for own in but_not)]:
            del hooks[key]
    carry_hooks(source, target)
    for name in _FORWARD_HOOKS:
        getattr(source, name).clear()
