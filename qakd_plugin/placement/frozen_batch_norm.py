"""BatchNorms whose numbers never change, folded into the convolutions before them.

``FrozenBatchNorm2d`` of torchvision, detectron2 and Hugging Face's DETR is no BatchNorm to any toolkit: it multiplies and adds,
and both stay in floating point between integer convolutions. Being constant, it can become part of the convolution at once.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Container, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from .fx_graph import called_module, readers

_log = logging.getLogger(__name__)
_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


class FoldedBatchNorm(nn.Module):
    """Where a BatchNorm was that is part of the convolution before it now. Tracers look into it and see nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a ``FrozenBatchNorm2d``, of whichever library: all keep weight and bias as buffers."""
    return type(module).__name__.endswith("FrozenBatchNorm2d") and dict(module.named_buffers(recurse=False)).keys() >= _BUFFERS


def frozen_batch_norms(model: nn.Module) -> list[str]:
    """Names of a model's frozen BatchNorms."""
    return [name for name, module in model.named_modules() if is_frozen_batch_norm(module)]


@torch.no_grad()
def fold_frozen_batch_norms(model: nn.Module, graph: fx.Graph | None) -> nn.Module:
    """A copy of ``model`` with frozen BatchNorms folded into the convolutions before them; those that cannot be are named.

    The shift becomes a bias of the convolution, which learns as its weight does.

    Args:
        model: it is not changed.
        graph: of calls of its modules; None where there is none.
    """
    model = copy.deepcopy(model)
    frozen = frozen_batch_norms(model)
    pairs = {} if graph is None else _pairs(graph, dict(model.named_modules()))
    for norm, convolution in pairs.items():
        _fold(model.get_submodule(convolution), model.get_submodule(norm))
    _replace(model, pairs)
    if pairs:
        _log.info("%d frozen BatchNorms were folded into the convolutions before them.", len(pairs))
    if left := [name for name in frozen if name not in pairs]:
        _log.warning(
            "%s: frozen BatchNorms that are not the only reader of one call of a plain convolution stay in floating point.",
            ", ".join(left),
        )
    return model


def fold_as_saved(model: nn.Module, saved: Container[str]) -> None:
    """Give a float model the structure that :func:`fold_frozen_batch_norms` gave the one whose tensors were saved.

    Args:
        model: changed in place.
        saved: names of those tensors.
    """
    folded = [name for name in frozen_batch_norms(model) if f"{name}.running_mean" not in saved]
    if not folded:
        return
    _replace(model, folded)
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and module.bias is None and f"{name}.bias" in saved:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))


def _pairs(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Frozen BatchNorms that can be folded, and the convolution before each; both are called once, and one after the other."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        module = called_module(node, modules)
        if module is None or not is_frozen_batch_norm(module):
            continue
        source = node.all_input_nodes[0]
        convolution = called_module(source, modules)
        once = calls[str(node.target)] == 1 and calls[str(source.target)] == 1 and readers(source) == [node]
        if once and convolution is not None and _is_plain(convolution):
            found[str(node.target)] = str(source.target)
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether scaling a module's weight scales what it computes."""
    plain = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and not is_parametrized(module)
    return plain and type(module).__module__ == "torch.nn.modules.conv"


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    assert isinstance(convolution, _ConvNd)
    exact = copy.deepcopy(norm).double()  # what it computes is read off it: not all of them tell their eps
    zeros = convolution.weight.new_zeros((1, convolution.out_channels, 1, 1), dtype=torch.float64)
    shift: Tensor = exact(zeros).flatten()
    scale: Tensor = exact(zeros + 1).flatten() - shift
    weight, bias = convolution.weight, convolution.bias
    if bias is not None:
        shift = shift + scale * bias.double()
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    convolution.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=weight.requires_grad)
    convolution.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _replace(model: nn.Module, names: Container[str]) -> None:
    wanted = {module for name, module in model.named_modules() if name in names}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in wanted:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FoldedBatchNorm())
