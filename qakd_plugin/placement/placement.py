"""Where quantizers belong in a float model so that every target runs it in integers.

ONNX Runtime turns a convolution into an integer kernel only if its own output is quantized, which a toolkit that puts
quantizers on layer inputs does not see to where a convolution feeds a residual add, a concatenation or a pooling. TensorRT
takes signed codes only, so below 8 bits a tensor that a ReLU made non-negative should have an unsigned grid, or half of its
levels are lost. Both are questions about the graph; this module answers them once, for every toolkit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..tasks.inputs import Inputs
from .attention_products import AttentionProducts, Operand, operands
from .detection_heads import detection_heads
from .exported_graph import exported_layer_graph
from .folded_batch_norm import is_frozen_batch_norm
from .fx_graph import TRANSPARENT, called_module, is_smooth_activation, only_reader, outermost, readers, relu_bounds
from .layer_names import WEIGHTED, quantizable_layers
from .sign_analysis import non_negative
from .sums import RESULT_OF, Sum, grids, joined, made_by, returning

_log = logging.getLogger(__name__)
_LEAVES = (*WEIGHTED, AttentionProducts)
_LAYER_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass(frozen=True)
class OutputQuantizer:
    """A quantizer after module ``name``; its range covers what the clamp that follows (a ReLU) lets through.

    With ``in_front`` it stands on the module's input instead: where a BatchNorm is a function call, or part of a larger module,
    the module that reads its result is the only place. ``after_clamp`` is the module that returns what the clamp lets through,
    if there is one: on its output the quantizer can be unsigned.
    """

    name: str
    clamp: tuple[float, float] | None
    in_front: bool = False
    after_clamp: str | None = None


@dataclass(frozen=True)
class Placement:
    """Where quantizers go: dotted names of the float model's modules.

    Attributes:
        layers: convolutions and linear layers to quantize, in execution order.
        edges: those among them that read the model's input or make its output: they stay at 8 bits.
        unsigned: layers whose input cannot be negative.
        covered: layers whose input already lies on the 8-bit grid of an output quantizer.
        outputs: further quantizers, after a module.
        sums: quantizers of sums, on the output of the module that returns them.
        summed: what would be further quantizers, had the convolutions that they would stand after not a sum to compute which is
            quantized.
        joined: groups of quantizers that should have one grid: those of outputs and sums, and layers' names for their inputs'.
        floating_sums: sums that belong on a grid, and that no module returns: what they add, for messages.
        transposed: layers whose weight counts output channels along its second dimension.
        operands: what the products of attention multiply, where modules compute them for quantizers.
    """

    layers: tuple[str, ...]
    edges: frozenset[str] = frozenset()
    unsigned: frozenset[str] = frozenset()
    covered: frozenset[str] = frozenset()
    outputs: tuple[OutputQuantizer, ...] = field(default=())
    sums: tuple[Sum, ...] = ()
    summed: tuple[OutputQuantizer, ...] = ()
    joined: tuple[tuple[OutputQuantizer | Sum | str, ...], ...] = ()
    floating_sums: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    operands: tuple[Operand, ...] = ()


def place_quantizers(
    model: nn.Module,
    keep: Sequence[str] | None = None,
    inputs: Inputs | None = None,
    *,
    sums: bool = True,
    before_activations: bool = True,
    before_sums: bool = True,
) -> Placement:
    """Look at the graph of a float model and say where quantizers belong.

    Args:
        model: the float model; it is not changed.
        keep: names or patterns of modules that stay in floating point; None: the heads of a detector, see
            :func:`.detection_heads.detection_heads`.
        inputs: a batch of the model, with which ``torch.export`` reads what ``torch.fx`` cannot trace.
        sums: look for sums to quantize.
        before_activations: quantize what convolutions hand to a SiLU, GELU or the like.
        before_sums: quantize both operands of sums that are quantized, even what a convolution hands to the sum alone.

    Raises:
        QakdError: as :func:`.layer_names.quantizable_layers`.
    """
    layers = quantizable_layers(model, keep or ())
    graph = layer_graph(model, inputs)
    if heads := detection_heads(model, graph, keep):
        layers = quantizable_layers(model, heads)
    if graph is None:
        _log.warning(
            "Quantizers go in front of each layer only: %s. Those of them that feed an add, a concatenation or a pooling will "
            "stay in floating point in ONNX Runtime.",
            ", ".join(layers),
        )
        outer = frozenset({layers[0], layers[-1]})
        return Placement(
            tuple(layers), edges=outer, transposed=_transposed(model, layers), operands=operands(model, keep or ())
        )
    placement = _Analysis(model, graph, set(layers)).placement(sums, before_activations, before_sums)
    placement = replace(placement, transposed=_transposed(model, placement.layers), operands=operands(model, keep or ()))
    if constant := sorted(_constant(graph) & set(layers)):
        _log.warning(
            "%s: what they read does not depend on the input, so neither does what they return: they stay in floating point, "
            "and a file holds their results.",
            ", ".join(constant),
        )
        placement = replace(placement, layers=tuple(name for name in placement.layers if name not in constant))
    if left := sorted(set(layers) - set(placement.layers) - set(constant)):
        _log.warning(
            "%s: the forward pass does not call %s: they stay in floating point. Call the modules themselves, not functions on "
            "their weights.",
            type(model).__name__,
            ", ".join(left),
        )
    return placement


def _constant(graph: fx.Graph) -> set[str]:
    """Modules that are called on nothing but parameters, buffers and sizes."""
    dynamic: set[fx.Node] = set()
    for node in graph.nodes:
        is_size = node.target in {"size", "dim", torch.ops.aten.sym_size.int} or (
            node.target is getattr and "shape" in node.args
        )
        if node.op == "placeholder" or (not is_size and any(source in dynamic for source in node.all_input_nodes)):
            dynamic.add(node)
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return {str(node.target) for node in calls} - {str(node.target) for node in calls if node in dynamic}


def _transposed(model: nn.Module, layers: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in layers if isinstance(model.get_submodule(name), _ConvTransposeNd))


def layer_graph(model: nn.Module, inputs: Inputs | None) -> fx.Graph | None:
    """The graph of calls of a float model in eval mode: what it does in training only is not deployed.

    Args:
        model: the float model; it is not changed.
        inputs: see :func:`place_quantizers`.

    Returns:
        As ``torch.fx`` traces it, else as ``torch.export`` sees it; None, with a warning that says why, where neither can.
    """
    try:
        # A copy: a network may keep what it computes, and a tracer has no value of it.
        return _Tracer().trace(copy.deepcopy(model).eval())
    except Exception as error:  # user code runs under the tracer: whatever it raises means "cannot be traced"  # noqa: BLE001
        reason = f"by torch.fx ({_first_line(error)})"
    if inputs is None:
        reason += ", and torch.export, which may, needs example inputs: qakd_plugin.prepare has them"
    else:
        try:
            return exported_layer_graph(model, inputs)
        except Exception as error:  # likewise  # noqa: BLE001
            reason += f", nor by torch.export ({_first_line(error)})"
    _log.warning("%s cannot be traced %s.", type(model).__name__, reason)
    return None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a convolution, linear layer or embedding is of a class that computes in its own way, or may."""
    base = next(kind for kind in (*_LAYER_CLASSES, nn.Embedding) if isinstance(module, kind))
    return type(module).forward is not base.forward


class _Tracer(fx.Tracer):
    """Sees a layer or a frozen BatchNorm as one call also where its class is not PyTorch's own; notes what modules return."""

    def __init__(self) -> None:
        super().__init__()
        self._returned: dict[str, list[object]] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        graph = super().trace(root, concrete_args)
        for name, results in self._returned.items():
            if len(results) == 1 and isinstance(results[0], fx.Node):
                results[0].meta.setdefault(RESULT_OF, []).append(name)
        return graph

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        takes_tensor = bool(args) and isinstance(args[0], fx.Proxy)  # by position, where toolkits look for it
        node = result.node if takes_tensor and isinstance(result, fx.Proxy) else None
        self._returned.setdefault(self.path_of_module(m), []).append(node)
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or is_frozen_batch_norm(m) or super().is_leaf_module(m, module_qualified_name)


class _Analysis:
    """One walk over a traced graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph, layers: set[str]) -> None:
        self.modules = dict(model.named_modules())
        self.nodes = list(graph.nodes)
        self.layers = layers
        self.positive = non_negative(self.nodes, self.modules)

    def placement(self, sums: bool, before_activations: bool, before_sums: bool) -> Placement:
        calls = [node for node in self.nodes if node.op == "call_module" and node.target in self.layers]
        outputs = self._output_quantizers(calls, before_activations)
        found = grids(self.nodes, self.modules, self.layers, {node for node, _ in outputs}, self.positive, sums=sums)
        quantizers: dict[fx.Node, OutputQuantizer | Sum] = {**dict(outputs), **found.sums}
        summed = {} if before_sums else self._summed(dict(outputs), [*found.sums, *found.by_layers])
        groups = joined(self.nodes, self.modules, self.layers, set(quantizers))
        return Placement(
            layers=tuple(dict.fromkeys(name for node in self.nodes for name in self._layers_of(node))),
            edges=frozenset(str(node.target) for node in outermost(self.nodes, set(calls))),
            unsigned=frozenset(self._for_all_calls(calls, self.positive)),
            covered=frozenset(self._for_all_calls(calls, found.on_grid)),
            outputs=tuple(dict.fromkeys(quantizer for node, quantizer in outputs if node not in summed)),
            sums=tuple(found.sums.values()),
            summed=tuple(dict.fromkeys(summed.values())),
            joined=tuple((*(quantizers[node] for node in nodes), *names) for nodes, names in groups),
            floating_sums=tuple(" + ".join(map(made_by, node.all_input_nodes)) for node in found.floating),
        )

    def _layers_of(self, node: fx.Node) -> list[str]:
        """The layer that a node calls; all layers of a module that is seen as one call, such as nn.TransformerEncoderLayer."""
        if node.op != "call_module" or node.target in self.layers:
            return [str(node.target)] if node.op == "call_module" else []
        return [name for name in self.modules if name in self.layers and name.startswith(f"{node.target}.")]

    def _output_quantizers(self, calls: Iterable[fx.Node], before_activations: bool) -> list[tuple[fx.Node, OutputQuantizer]]:
        """After convolutions whose output, after BatchNorm and ReLU, something else than a quantized layer reads."""
        found = []
        for call in calls:
            if not isinstance(called_module(call, self.modules), _ConvNd):
                continue
            chain = _Chain.of(call, self.modules)
            read_by_layers = all(user.target in self.layers or user.op == "output" for user in readers(chain.end))
            for_activations = all(is_smooth_activation(user, called_module(user, self.modules)) for user in readers(chain.end))
            needs_none = read_by_layers or (for_activations and not before_activations)
            quantizer = None if needs_none else chain.quantizer(self.modules)
            if quantizer is not None:
                found.append((chain.end, quantizer))
        return found

    def _summed(self, outputs: Mapping[fx.Node, OutputQuantizer], sums: Iterable[fx.Node]) -> dict[fx.Node, OutputQuantizer]:
        """Of each sum the first operand that a convolution makes for it alone, without a clamp in between."""
        found = {}
        for end in sums:
            add = end if len(end.all_input_nodes) > 1 else end.all_input_nodes[0]  # the end may be its ReLU
            for operand in add.all_input_nodes:
                if operand in outputs and outputs[operand].clamp is None and only_reader(operand) is add:
                    found[operand] = outputs[operand]
                    break
        return found

    @staticmethod
    def _for_all_calls(calls: Iterable[fx.Node], nodes: set[fx.Node]) -> set[str]:
        """Names of layers whose input is in ``nodes`` at every call."""
        verdict: dict[str, bool] = {}
        for call in calls:
            name = str(call.target)
            verdict[name] = verdict.get(name, True) and next(iter(call.all_input_nodes), None) in nodes
        return {name for name, holds in verdict.items() if holds}


@dataclass
class _Chain:
    """A convolution and what follows it alone: BatchNorms, one ReLU, and modules that change nothing in eval mode.

    Attributes:
        last: the convolution, or its last BatchNorm: what is quantized.
        end: the end of the chain, which everything else reads.
        clamp: what the ReLU lets through, if there is one.
        clamped: that ReLU.
    """

    last: fx.Node
    end: fx.Node
    clamp: tuple[float, float] | None = None
    clamped: fx.Node | None = None

    @classmethod
    def of(cls, convolution: fx.Node, modules: Mapping[str, nn.Module]) -> _Chain:
        chain = cls(convolution, convolution)
        while (reader := only_reader(chain.end)) is not None and chain._takes(reader, called_module(reader, modules)):
            chain.end = reader
        return chain

    def _takes(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether ``node``, which calls ``module``, goes on with the chain; its role in it is noted."""
        if self.clamp is None and (isinstance(module, _BatchNorm) or node.target is F.batch_norm):
            self.last = node
            return True
        if self.clamp is None and (bounds := relu_bounds(node, module)) is not None:
            self.clamp, self.clamped = bounds, node
            return True
        return isinstance(module, TRANSPARENT)

    def quantizer(self, modules: Mapping[str, nn.Module]) -> OutputQuantizer | None:
        """The quantizer of ``last``; None where neither it nor what reads it is a module."""
        after_clamp = None if self.clamped is None else returning(self.clamped, modules)
        if self.last.op == "call_module":
            return OutputQuantizer(str(self.last.target), self.clamp, after_clamp=after_clamp)
        reader = only_reader(self.last)
        if reader is None or reader.op != "call_module":
            return None
        return OutputQuantizer(str(reader.target), self.clamp, in_front=True, after_clamp=after_clamp)
