"""Copies of networks that compute the same."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import fx, nn

from .computed_weights import HOOKS

_FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_OF_WEIGHTS = tuple(kind for kind, _, _ in HOOKS)


def copied(network: nn.Module) -> nn.Module:
    """A deep copy with all hooks of forward: copies of a ``GraphModule`` lack them, and would compute something else."""
    memo: dict[int, object] = {}
    made: nn.Module = copy.deepcopy(network, memo)
    for module in network.modules():
        if isinstance(module, fx.GraphModule):
            for name in _FORWARD_HOOKS:
                setattr(memo[id(module)], name, copy.deepcopy(getattr(module, name), memo))
    return made


def uncompiled(network: nn.Module) -> nn.Module:
    """The network itself, where it is what ``torch.compile`` made of one; both hold the same weights."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network


def has_hooks(network: nn.Module) -> bool:
    """Whether a network has hooks of forward as a whole."""
    return bool(network._forward_pre_hooks or network._forward_hooks)


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let a network that was made of another one run the hooks of forward that the other has as a whole, too."""
    for name in _FORWARD_HOOKS:
        getattr(target, name).update(getattr(source, name))


def move_hooks(source: nn.Module, target: nn.Module, *, but_not: Collection[object] = ()) -> None:
    """The same for a module in whose place another one stands, which may call it: there they would run once more.

    Hooks that compute a weight (pruning, weight and spectral normalization) stay where the weight is.

    Args:
        source: loses them.
        target: gets them.
        but_not: functions that are hooks of a toolkit, whose work ``target`` does itself; nobody has them afterwards.
    """
    for kind, flags in (("_forward_pre_hooks", _FORWARD_HOOKS[1:2]), ("_forward_hooks", _FORWARD_HOOKS[3:])):
        hooks = getattr(source, kind)
        for key, hook in list(hooks.items()):
            if isinstance(hook, _OF_WEIGHTS):
                continue
            del hooks[key]
            if any(hook is own for own in but_not):
                continue
            getattr(target, kind)[key] = hook
            for flag in flags:
                if key in getattr(source, flag):
                    getattr(target, flag)[key] = True
