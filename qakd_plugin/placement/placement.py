"""Where quantizers belong in a float model so that every target runs it in integers.

ONNX Runtime turns a convolution into an integer kernel only if its own output is quantized, which a toolkit that puts
quantizers on layer inputs does not see to where a convolution feeds a residual add, a concatenation or a pooling. TensorRT
takes signed codes only, so below 8 bits a tensor that a ReLU made non-negative should have an unsigned grid, or half of its
levels are lost. Both are questions about the graph; this module answers them once, for every toolkit.
"""

from __future__ import annotations

import fnmatch
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .._common.module_mode import eval_mode
from ..errors import QakdError

_log = logging.getLogger(__name__)

WEIGHTED = (_ConvNd, nn.Linear)
_LAYER_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus)
_NON_NEGATIVE_FUNCTIONS = {
    F.relu,
    F.relu6,
    torch.relu,
    torch.sigmoid,
    F.hardsigmoid,
    F.softmax,
    torch.softmax,
    "relu",
    "relu_",
}
_SIGN_KEEPING = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
                 nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d,
                 nn.ChannelShuffle, nn.Upsample)  # fmt: skip
_SIGN_KEEPING_FUNCTIONS = {torch.flatten, torch.cat, torch.reshape, torch.transpose, torch.permute, torch.chunk, torch.split,
                           torch.add, torch.mul, torch.mean, torch.squeeze, operator.add, operator.iadd, operator.mul,
                           operator.getitem, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, F.interpolate,
                           "view", "reshape", "transpose", "permute", "flatten", "chunk", "split", "contiguous", "mean", "add",
                           "add_", "mul", "squeeze", "unsqueeze"}  # fmt: skip
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_VIEWS = {torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.chunk, torch.split, torch.squeeze,
          operator.getitem, "view", "reshape", "transpose", "permute", "flatten", "chunk", "split", "contiguous", "squeeze",
          "unsqueeze"}  # fmt: skip
_VIEWING = (nn.Flatten, nn.Unflatten, *_TRANSPARENT)
"""What may put out its input's memory."""

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem}
GRID_KEEPING = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ReLU)


@dataclass(frozen=True)
class OutputQuantizer:
    """A quantizer behind module ``name``; its range covers what the clamp that follows (a ReLU) lets through.

    With ``in_front`` it stands on the module's input instead: where a BatchNorm is a function call, or part of a larger module,
    the module that reads its result is the only place.
    """

    name: str
    clamp: tuple[float, float] | None
    in_front: bool = False


@dataclass(frozen=True)
class Placement:
    """Where quantizers go: dotted names of the float model's modules.

    Attributes:
        layers: convolutions and linear layers to quantize, in execution order.
        edges: those among them that read the model's input or make its output: they stay at 8 bits.
        unsigned: layers whose input cannot be negative.
        covered: layers whose input already lies on the 8-bit grid of an output quantizer.
        outputs: further quantizers, behind a module.
    """

    layers: tuple[str, ...]
    edges: frozenset[str] = frozenset()
    unsigned: frozenset[str] = frozenset()
    covered: frozenset[str] = frozenset()
    outputs: tuple[OutputQuantizer, ...] = field(default=())


def quantizable_layers(model: nn.Module, keep: Sequence[str]) -> list[str]:
    """Convolutions and linear layers whose dotted name no pattern of ``keep`` matches.

    Raises:
        QakdError: a pattern matches nothing, or nothing is left to quantize.
    """
    uncalled = never_called(model)
    names = [name for name, module in model.named_modules() if isinstance(module, WEIGHTED) and name not in uncalled]
    for pattern in keep:
        if not fnmatch.filter([name for name, _ in model.named_modules()], pattern):
            raise QakdError(
                f"keep: {pattern!r} matches no module of {type(model).__name__}; layers are called, e.g., {names[:4]}."
            )
    left = [name for name in names if not any(within(name, pattern) for pattern in keep)]
    if not left:
        raise QakdError(
            f"{type(model).__name__} holds no convolution or linear layer to quantize"
            + (f" beside those kept in floating point by keep={list(keep)}." if names else ".")
        )
    return left


def place_quantizers(model: nn.Module, keep: Sequence[str] = ()) -> Placement:
    """Look at the graph of a float model and say where quantizers belong.

    Args:
        model: the float model; it is not changed.
        keep: names or patterns of modules that stay in floating point.

    Raises:
        QakdError: as :func:`quantizable_layers`.
    """
    layers = quantizable_layers(model, keep)
    try:
        with eval_mode(model):  # what a network does in training only is not deployed
            graph = _Tracer().trace(model)
    except Exception as error:  # user code runs under the tracer: whatever it raises means "cannot be traced"
        _log.warning(
            "%s cannot be traced by torch.fx (%s): quantizers go in front of each layer only. Convolutions that feed an add "
            "or a concatenation will stay in floating point in ONNX Runtime.",
            type(model).__name__,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        return Placement(tuple(layers), edges=frozenset({layers[0], layers[-1]}))
    placement = _Analysis(model, graph, set(layers)).placement()
    if left := sorted(set(layers) - set(placement.layers)):
        _log.warning(
            "%s: the forward pass does not call %s: they stay in floating point. Call the modules themselves, not functions on "
            "their weights.",
            type(model).__name__,
            ", ".join(left),
        )
    return placement


def has_own_forward(module: nn.Module) -> bool:
    """Whether a convolution or linear layer is of a class that computes in its own way, or may."""
    base = next(kind for kind in _LAYER_CLASSES if isinstance(module, kind))
    return type(module).forward is not base.forward


class _Tracer(fx.Tracer):
    """Sees a layer as one call also where its class is not PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WEIGHTED) or super().is_leaf_module(m, module_qualified_name)


class _Analysis:
    """One walk over a traced graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph, layers: set[str]) -> None:
        self.modules = dict(model.named_modules())
        self.nodes = list(graph.nodes)
        self.layers = layers
        self.positive = non_negative(self.nodes, self.modules)

    def placement(self) -> Placement:
        calls = [node for node in self.nodes if node.op == "call_module" and node.target in self.layers]
        outputs = self._output_quantizers(calls)
        on_grid = self._on_grid({node for node, _ in outputs})
        return Placement(
            layers=tuple(dict.fromkeys(name for node in self.nodes for name in self._layers_of(node))),
            edges=frozenset(str(node.target) for node in outermost(self.nodes, set(calls))),
            unsigned=frozenset(self._for_all_calls(calls, self.positive)),
            covered=frozenset(self._for_all_calls(calls, on_grid)),
            outputs=tuple(dict.fromkeys(quantizer for _, quantizer in outputs)),
        )

    def _layers_of(self, node: fx.Node) -> list[str]:
        """The layer that a node calls; all layers of a module that is seen as one call, such as nn.TransformerEncoderLayer."""
        if node.op != "call_module" or node.target in self.layers:
            return [str(node.target)] if node.op == "call_module" else []
        return [name for name in self.modules if name in self.layers and name.startswith(f"{node.target}.")]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _output_quantizers(self, calls: Iterable[fx.Node]) -> list[tuple[fx.Node, OutputQuantizer]]:
        """Behind convolutions whose output, after BatchNorm and ReLU, something else than a quantized layer reads."""
        found = []
        for call in calls:
            if not isinstance(self._module(call), _ConvNd):
                continue
            last, end = call, call
            clamp: tuple[float, float] | None = None
            while (user := _only_reader(end)) is not None:
                module = self._module(user)
                if clamp is None and (isinstance(module, _BatchNorm) or user.target is F.batch_norm):
                    last = end = user
                elif clamp is None and (bounds := relu_bounds(user, module)) is not None:
                    end, clamp = user, bounds
                elif isinstance(module, _TRANSPARENT):
                    end = user
                else:
                    break
            if all(user.target in self.layers or user.op == "output" for user in _readers(end)):
                continue
            reader = _only_reader(last)
            if last.op == "call_module":
                found.append((end, OutputQuantizer(str(last.target), clamp)))
            elif reader is not None and reader.op == "call_module":
                found.append((end, OutputQuantizer(str(reader.target), clamp, in_front=True)))
        return found

    def _on_grid(self, quantized: set[fx.Node]) -> set[fx.Node]:
        on_grid = set(quantized)
        for node in self.nodes:
            if isinstance(self._module(node), GRID_KEEPING) and all(source in on_grid for source in node.all_input_nodes):
                on_grid.add(node)
        return on_grid

    @staticmethod
    def _for_all_calls(calls: Iterable[fx.Node], nodes: set[fx.Node]) -> set[str]:
        """Names of layers whose input is in ``nodes`` at every call."""
        verdict: dict[str, bool] = {}
        for call in calls:
            name = str(call.target)
            verdict[name] = verdict.get(name, True) and call.all_input_nodes[0] in nodes
        return {name for name, holds in verdict.items() if holds}


def relu_bounds(node: fx.Node, module: nn.Module | None) -> tuple[float, float] | None:
    """What a node lets through if it is some kind of ReLU; ``module`` is the one that it calls, if it calls one."""
    function = _function(node)
    if isinstance(module, nn.ReLU) or function in {F.relu, torch.relu, "relu", "relu_"}:
        return 0.0, float("inf")
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:
        return 0.0, float(module.max_val)
    return (0.0, 6.0) if function is F.relu6 else None


def non_negative(nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """Nodes of a graph that cannot be negative, whatever its inputs.

    Args:
        nodes: in order.
        modules: that they call, by name.
    """
    nodes = list(nodes)
    changed: set[fx.Node] = set()  # in place, into what may be negative
    while True:
        positive: set[fx.Node] = set()
        for node in nodes:
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            function = _function(node)
            makes = isinstance(module, _NON_NEGATIVE) or function in _NON_NEGATIVE_FUNCTIONS
            clamps = isinstance(module, nn.Hardtanh) and module.min_val >= 0
            keeps = isinstance(module, _SIGN_KEEPING) or function in _SIGN_KEEPING_FUNCTIONS
            overshoots = "bicubic" in {getattr(module, "mode", None), node.kwargs.get("mode")}
            holds = makes or clamps or (keeps and not overshoots and all(_at_least_zero(x, positive) for x in _operands(node)))
            if holds and node not in changed:
                positive.add(node)
        written = {
            source
            for node in nodes
            if node not in positive and _works_in_place(node, modules)
            for source in _with_views(node.all_input_nodes[:1], modules)
        }
        if written <= changed:
            return positive
        changed |= written


def _function(node: fx.Node) -> object:
    """What a node calls, unless that is a module; the target of anything else is but a name."""
    return node.target if node.op in {"call_function", "call_method"} else None


def _works_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node writes over its first input."""
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    by_name = name.endswith("_") and not name.endswith("__")  # as PyTorch names them
    function = _function(node)
    return function is not None and (by_name or function in _IN_PLACE or node.kwargs.get("inplace") is True)


def _with_views(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Nodes, and what they may be views of."""
    found, pending = [], list(nodes)
    while pending:
        node = pending.pop()
        found.append(node)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if _function(node) in _VIEWS or isinstance(module, _VIEWING):
            pending += node.all_input_nodes[:1]
    return found


def outermost(nodes: Sequence[fx.Node], layers: set[fx.Node]) -> set[fx.Node]:
    """Layers of a graph that no other layer stands before, or after.

    Args:
        nodes: of the whole graph, in its order.
        layers: some of them.
    """
    behind: set[fx.Node] = set()
    for node in nodes:
        if any(source in behind or source in layers for source in node.all_input_nodes):
            behind.add(node)
    ahead: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(user in ahead or user in layers for user in node.users):
            ahead.add(node)
    return {node for node in layers if node not in behind or node not in ahead}


def _operands(node: fx.Node) -> list[object]:
    """What an operator works on: all arguments of an add or a product, all of a concatenation, the first of anything else."""
    merging = {torch.add, torch.mul, operator.add, operator.iadd, operator.mul, "add", "add_", "mul"}
    if node.target in merging:
        return [*node.args, *node.kwargs.values()]
    first = node.args[0] if node.args else None
    return list(first) if isinstance(first, list | tuple) else [first]


def _at_least_zero(operand: object, positive: set[fx.Node]) -> bool:
    """Whether an operand cannot be negative. A parameter can be: training may change its sign."""
    return operand in positive if isinstance(operand, fx.Node) else isinstance(operand, int | float) and operand >= 0


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads the numbers of a tensor: asking for its shape is not reading."""
    return [
        user
        for user in node.users
        if not (user.target is getattr and user.args[1] in {"ndim", "shape", "dtype", "device"})
        and not (user.op == "call_method" and user.target in {"size", "dim", "numel"})
    ]


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = _readers(node)
    return readers[0] if len(readers) == 1 else None


def never_called(model: nn.Module) -> set[str]:
    """Layers whose weight is read by the module around them, which does not call them: a quantizer there would never act."""
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }


def within(name: str, pattern: str) -> bool:
    """Whether ``pattern`` matches the module or one that contains it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: index + 1]), pattern) for index in range(len(parts)))
