"""A quantizer for torchao's PT2E flow whose models deploy well: static, zero point 0.

Import this module only where torchao is installed; :mod:`qakd_plugin.toolkits.pt2e.adapter` does so on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torchao.quantization.pt2e.fake_quantize import FakeQuantize
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from ...errors import QakdError
from ...placement.exported_graph import layer_name
from ...placement.fx_graph import outermost
from ...placement.layer_names import within
from ...placement.placement import OutputQuantizer, Placement
from ..adapter import Precision
from .graph import ADDS, CONVOLUTIONS, RELUS, TRANSPOSED, WEIGHTED, from_inputs, is_tensor, readers
from .grids import Grids
from .sign_analysis import non_negative

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Layer:
    """What one convolution or linear layer takes."""

    weight_bits: int
    activation_bits: int
    non_negative: bool


class SymmetricQuantizer(Quantizer):  # type: ignore[misc]
    """For ``prepare_qat_pt2e``: weights symmetric per channel, activations per tensor, zero point 0 throughout.

    Without a placement every convolution and linear layer has its input and weight quantized, and both inputs of every residual
    add are, so that the convolutions before it run in integers; below 8 bits, what a ReLU made non-negative gets an unsigned
    grid.

    Integers in, integers out: an add whose operands are quantized to 8 bits wherever they are read is quantized as well, after
    its ReLU. So are all sums of a residual network, and none of a transformer, whose norms read them in floating point.

    Example::

        graph = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        prepared = prepare_qat_pt2e(graph, SymmetricQuantizer())

    Args:
        placement: from :func:`qakd_plugin.placement.placement.place_quantizers` of the float model, which also
            looks at what follows a convolution; None to go by the exported graph alone.
        weight_bits: 2 to 8, of all layers but the first and the last.
        activation_bits: 2 to 8, of their inputs; those of the first and the last layer take 8.
        edges: 2 to 8, of the weights of the first and the last layer.
        keep: names or patterns of modules that stay in floating point; for use without a placement, which has its own.
        unsigned_bytes: let 8-bit activations that cannot be negative take codes 0..255, which TensorRT cannot.
        share_grids: let tensors that are concatenated share one quantizer.

    Raises:
        QakdError: the bits are out of range, or (in ``annotate``) nothing is left to quantize.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        weight_bits: int = 8,
        activation_bits: int = 8,
        *,
        edges: int = 8,
        keep: Sequence[str] = (),
        unsigned_bytes: bool = False,
        share_grids: bool = True,
    ) -> None:
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits), ("edges", edges)):
            if not 2 <= bits <= 8:
                raise QakdError(f"{name}={bits} is out of range: it must be 2 to 8.")
        self.placement = placement
        self.precision = Precision(weight_bits, activation_bits, tuple(keep), unsigned_bytes, edges=edges)
        self.share_grids = share_grids

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        dynamic = from_inputs(model)
        positive = non_negative(model.graph)
        calls = [node for node in model.graph.nodes if node.target in WEIGHTED and node.args[1] not in dynamic]
        layers = self._placed(calls) if self.placement is not None else self._all(calls, model.graph, positive)
        if not layers:
            raise QakdError(
                "model: its exported graph holds no convolution or linear layer to quantize. Prepare one that does."
            )
        adds = {node for node in model.graph.nodes if node.target in ADDS and _adds_activations(node, dynamic)}
        if self.placement is None:
            ends, summed = _operands(adds, set(layers)), set()
        else:
            summed = self._ends(model.graph, self.placement.summed)
            ends = self._ends(model.graph, self.placement.outputs) | summed
        grids = Grids(model.graph, adds, set(layers), ends, share=self.share_grids)
        for node, layer in layers.items():
            self._annotate_layer(node, layer, grids)
        for node in adds if self.placement is None else ():
            inputs = {source: self._activation_spec(8, source in positive) for source in node.args[:2] if source not in grids}
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
        for node, unsigned in self._operands(model.graph):
            spec = self._activation_spec(8, unsigned)
            node.meta["quantization_annotation"] = QuantizationAnnotation(output_qspec=spec, _annotated=True)
        signed = {grids.first(node) for node in grids.outputs if node not in positive}
        for node in grids.outputs - summed:
            annotation = node.meta.setdefault("quantization_annotation", QuantizationAnnotation(_annotated=True))
            first = grids.first(node)
            annotation.output_qspec = (
                self._activation_spec(8, node not in signed) if first is node else SharedQuantizationSpec(first)
            )
        return model

    def _annotate_layer(self, node: fx.Node, layer: _Layer, grids: Grids) -> None:
        read = node.args[0]
        assert isinstance(read, fx.Node)
        source: QuantizationSpecBase | None = self._activation_spec(layer.activation_bits, layer.non_negative)
        if layer.activation_bits == 8 and read in grids:
            # What was split has no quantizer straight before the layer, where runtimes look for one: the same one again.
            source = SharedQuantizationSpec(grids.first(read)) if read in grids.divided else None
        # The order matters: torchao takes the first entry for the input and the second for the weight.
        inputs = {read: source, node.args[1]: weight_spec(layer.weight_bits, 1 if node.target in TRANSPOSED else 0)}
        node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)

    def _activation_spec(self, bits: int, non_negative: bool) -> QuantizationSpec:
        return activation_spec(bits, signed=not self.precision.is_unsigned(bits, non_negative))

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to do: whatever :meth:`annotate` writes is supported."""

    def _placed(self, calls: Iterable[fx.Node]) -> dict[fx.Node, _Layer]:
        placement = self.placement
        assert placement is not None
        layers = {}
        for node in calls:
            name = layer_name(node)
            if name not in placement.layers:
                continue
            edge = name in placement.edges
            bits = 8 if edge else self.precision.activation_bits
            layers[node] = _Layer(self.precision.bits_of_weight(edge), bits, name in placement.unsigned)
        return layers

    def _operands(self, graph: fx.Graph) -> list[tuple[fx.Node, bool]]:
        """The operands of attention's products, each with whether it cannot be negative."""
        wanted = {} if self.placement is None else {operand.name: operand.unsigned for operand in self.placement.operands}
        return [
            (node, wanted[layer_name(node)])
            for node in graph.nodes
            if node.target is _aten.alias.default and layer_name(node) in wanted
        ]

    def _all(self, calls: Sequence[fx.Node], graph: fx.Graph, positive: set[fx.Node]) -> dict[fx.Node, _Layer]:
        """Every layer but those kept in floating point, by the exported graph alone."""
        chosen = [node for node in calls if not any(within(layer_name(node), pattern) for pattern in self.precision.keep or ())]
        edges = outermost(list(graph.nodes), set(chosen))
        layers = {}
        for node in chosen:
            bits = 8 if node in edges else self.precision.activation_bits
            layers[node] = _Layer(self.precision.bits_of_weight(node in edges), bits, node.args[0] in positive)
        return layers

    @staticmethod
    def _ends(graph: fx.Graph, outputs: Iterable[OutputQuantizer]) -> set[fx.Node]:
        """The nodes that quantizers of outputs stand after: the ReLU, where one follows."""
        wanted = {output.name: output.clamp for output in outputs}
        ends = set()
        for node in graph.nodes:
            if node.target not in {*CONVOLUTIONS, *TRANSPOSED, _aten.batch_norm.default} or layer_name(node) not in wanted:
                continue
            end = node
            if wanted[layer_name(node)] is not None:
                (user,) = node.users
                end = user if user.target in RELUS else node
            ends.add(end)
        return ends


def weight_spec(bits: int, axis: int = 0) -> QuantizationSpec:
    """Symmetric per output channel, following the weight without delay.

    Args:
        bits: 2 to 8; eight use -127..127, so that any sign can be folded in.
        axis: of the output channels.
    """
    limit = 2 ** (bits - 1)
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, ch_axis=axis
        ),
        quant_min=-127 if bits == 8 else -limit,
        quant_max=limit - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
    )


def activation_spec(bits: int, *, signed: bool = True) -> QuantizationSpec:
    """Per tensor with zero point 0.

    Args:
        bits: 2 to 8.
        signed: False for a tensor that is never negative, where an affine observer always finds zero point 0.
    """
    limit = 2 ** (bits - 1)
    return QuantizationSpec(
        dtype=torch.int8 if signed else torch.uint8,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
        quant_min=-limit if signed else 0,
        quant_max=limit - 1 if signed else 2 * limit - 1,
        qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
    )


def _operands(adds: set[fx.Node], layers: set[fx.Node]) -> set[fx.Node]:
    """Operands of residual adds that are read by residual adds and quantized layers alone: one quantizer serves all of them."""
    operands = {operand for add in adds for operand in add.args[:2] if isinstance(operand, fx.Node)}
    return {node for node in operands if node.op == "call_function" and set(readers(node)) <= adds | layers}


def _adds_activations(node: fx.Node, dynamic: set[fx.Node]) -> bool:
    """Whether both operands are different feature maps of one shape: a residual add."""
    first, second = node.args[:2]
    return (
        isinstance(first, fx.Node)
        and isinstance(second, fx.Node)
        and first is not second
        and {first, second} <= dynamic
        and all(is_tensor(operand) and operand.meta["val"].is_floating_point() for operand in (first, second))
        and first.meta["val"].ndim == second.meta["val"].ndim >= 2
    )
