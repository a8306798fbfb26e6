"""BatchNorms that a toolkit cannot have in training, folded into the layers before them.

``FrozenBatchNorm2d`` of torchvision, detectron2 and Hugging Face's DETR is no BatchNorm to any toolkit: it multiplies and adds,
and both stay in floating point between integer convolutions. Being constant, it can become part of the convolution at once.
torch.ao cannot train, or export, a BatchNorm after a linear layer: there it becomes part of that.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from .fx_graph import called_module, readers

_log = logging.getLogger(__name__)
_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


class FoldedBatchNorm(nn.Module):
    """Where a BatchNorm was that is part of the layer before it now. Tracers look into it and see nothing."""

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
    pairs = {} if graph is None else _pairs(graph, dict(model.named_modules()), is_frozen_batch_norm, _is_plain_convolution)
    _fold_pairs(model, pairs)
    if pairs:
        _log.info("%d frozen BatchNorms were folded into the convolutions before them.", len(pairs))
    if left := [name for name in frozen if name not in pairs]:
        _log.warning(
            "%s: frozen BatchNorms that are not the only reader of one call of a plain convolution stay in floating point.",
            ", ".join(left),
        )
    return model


@torch.no_grad()
def fold_linear_batch_norms(model: nn.Module, trace: Callable[[], fx.Graph | None]) -> nn.Module:
    """A copy of ``model`` with BatchNorms folded into the linear layers before them; the model itself where there is none.

    Args:
        model: it is not changed.
        trace: returns the graph of calls of its modules, or None.
    """
    modules = dict(model.named_modules())
    graph = trace() if any(map(_has_statistics, modules.values())) else None
    pairs = {} if graph is None else _pairs(graph, modules, _has_statistics, _is_plain_linear)
    if not pairs:
        return model
    model = copy.deepcopy(model)
    _fold_pairs(model, pairs)
    _log.warning(
        "%s: folded into the linear layers before them, since torch.ao does not export a BatchNorm that is trained after one. "
        "Other toolkits train it.",
        ", ".join(pairs),
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


def _pairs(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    is_norm: Callable[[nn.Module], bool],
    is_layer: Callable[[nn.Module], bool],
) -> dict[str, str]:
    """BatchNorms that can be folded, and the layer before each; both are called once, and one after the other."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        module = called_module(node, modules)
        if module is None or not is_norm(module):
            continue
        source = node.all_input_nodes[0]
        layer = called_module(source, modules)
        once = calls[str(node.target)] == 1 and calls[str(source.target)] == 1 and readers(source) == [node]
        if once and layer is not None and is_layer(layer):
            found[str(node.target)] = str(source.target)
    return found


def _is_plain_convolution(module: nn.Module) -> bool:
    """Whether scaling a module's weight scales what it computes."""
    plain = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and not is_parametrized(module)
    return plain and type(module).__module__ == "torch.nn.modules.conv"


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _has_statistics(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm1d and module.running_var is not None


def _fold_pairs(model: nn.Module, pairs: Mapping[str, str]) -> None:
    for norm, layer in pairs.items():
        _fold(model.get_submodule(layer), model.get_submodule(norm))
    _replace(model, pairs)


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    assert isinstance(layer, _ConvNd | nn.Linear)
    exact = copy.deepcopy(norm).double().eval()  # what it computes is read off it: not all of them tell their eps
    weight, bias = layer.weight, layer.bias
    outputs = len(weight)
    zeros = weight.new_zeros((1, outputs, *(1 for _ in range(weight.ndim - 2))), dtype=torch.float64)
    shift: Tensor = exact(zeros).flatten()
    scale: Tensor = exact(zeros + 1).flatten() - shift
    if bias is not None:
        shift = shift + scale * bias.double()
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _replace(model: nn.Module, names: Container[str]) -> None:
    wanted = {module for name, module in model.named_modules() if name in names}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in wanted:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FoldedBatchNorm())
