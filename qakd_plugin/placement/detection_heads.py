"""The heads of a detector: they lose most in integers, and stay in floating point unless somebody asks for more."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from .fx_graph import called_module
from .layer_names import quantizable_layers, within

_log = logging.getLogger(__name__)
_HEADS = (
    ("torchvision.models.detection.", ("SSDHead", "SSDLiteHead", "RetinaNetHead", "FCOSHead")),
    ("ultralytics.nn.modules.head", ("Detect",)),
)
"""Classes that are the heads of one-stage detectors: where they are defined, and their names or those of a base."""


def detection_heads(model: nn.Module, graph: fx.Graph | None, keep: Sequence[str] | None = None) -> tuple[str, ...]:
    """Layers that make the outputs of a detector, and what turns distributions into distances (DFL); none of other networks.

    A network is a detector where it holds the head of a one-stage detector of torchvision or Ultralytics, or a convolution of
    weights 0, 1, 2, ... as distribution focal loss has it. Nothing is concluded from how many outputs a network has. Its heads
    are the layers that no other layer follows.

    Args:
        model: the float model; it is not changed.
        graph: of calls of its modules; None where there is none.
        keep: what the user asked to keep: heads that are not among it are named in the log, and no others are added.
    """
    integrals = {name for name, module in model.named_modules() if _is_integral(module)}
    if not integrals and not any(_is_head(module) for module in model.modules()):
        return ()
    if graph is None and keep is not None:
        return ()
    if graph is None:
        _log.warning(
            "%s is a detector, but which layers are its heads cannot be told without its graph: name them (keep=[...]), or "
            "prepare the part without post-processing alone.",
            type(model).__name__,
        )
        return ()
    heads = (*_last_layers(model, graph, integrals), *sorted(integrals))
    if keep is not None:
        if left := [name for name in heads if not any(within(name, pattern) for pattern in keep)]:
            _log.warning(
                "%s is a detector, and its heads are quantized: %s. keep=None keeps them.",
                type(model).__name__,
                ", ".join(left),
            )
        return ()
    _log.warning(
        "%s is a detector: its heads stay in floating point: %s. keep=() quantizes them as well.",
        type(model).__name__,
        ", ".join(heads),
    )
    return heads


def _is_head(module: nn.Module) -> bool:
    return any(
        base.__module__.startswith(home) and base.__name__ in names for base in type(module).__mro__ for home, names in _HEADS
    )


def _is_integral(module: nn.Module) -> bool:
    """Whether a module is the fixed 1x1 convolution that takes the mean of a distribution over 0, 1, 2, ..."""
    if not isinstance(module, _ConvNd) or module.out_channels != 1 or module.weight.numel() != module.in_channels > 1:
        return False
    weight = module.weight.detach().flatten()
    return torch.equal(weight, torch.arange(len(weight), dtype=weight.dtype, device=weight.device))


def _last_layers(model: nn.Module, graph: fx.Graph, without: set[str]) -> list[str]:
    """Layers, in order, that no other one follows."""
    modules, layers = dict(model.named_modules()), set(quantizable_layers(model, ())) - without
    followed: set[fx.Node] = set()
    last = []
    for node in reversed(graph.nodes):
        is_layer = called_module(node, modules) is not None and node.target in layers
        if is_layer and node not in followed:
            last.append(str(node.target))
        if is_layer or node in followed:
            followed.update(node.all_input_nodes)
    return list(dict.fromkeys(reversed(last)))
