"""Which tensors of an exported graph lie on the 8-bit grid of a quantizer, and whose: after sums, concats and splits, too."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from ...placement.fx_graph import leads_to
from .graph import RELUS, readers

_aten = torch.ops.aten
_GRID_KEEPING = {
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.max_pool3d.default,
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.dropout.default,
    _aten.dropout_.default,
    _aten.relu.default,
    _aten.relu_.default,
}
_SPLITS = {_aten.contiguous.default, _aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default, operator.getitem}
_CONCATS = {_aten.cat.default, _aten.concat.default}


def _moves(node: fx.Node) -> bool:
    return node.target in _GRID_KEEPING | _SPLITS | _CONCATS


class Grids:
    """One walk over the graph of a float model.

    The sum of two quantized tensors is quantized as well, after its ReLU, where one follows; not where a layer alone reads it,
    and not what the model returns. Tensors that are concatenated for a layer share one quantizer: moving codes is all that a
    concatenation, a split and a channel shuffle do.

    Args:
        graph: of the float model.
        adds: its residual adds.
        layers: convolutions and linear layers that quantize their input, if it is not.
        outputs: nodes whose output is to be quantized to 8 bits.
        share: follow grids through concatenations and splits; what is concatenated shares one.

    Attributes:
        outputs: those, and the sums that are quantized as well.
        divided: nodes on a grid that a split or a concatenation made.
    """

    def __init__(
        self, graph: fx.Graph, adds: set[fx.Node], layers: set[fx.Node], outputs: Iterable[fx.Node], *, share: bool
    ) -> None:
        self.outputs = set(outputs)
        self.divided: set[fx.Node] = set()
        self._layers, self._share = layers, share
        self._of: dict[fx.Node, fx.Node] = {}  # the quantized node that a node's grid is of
        self._shared: dict[fx.Node, fx.Node] = {}  # the earlier quantized node that one shares its quantizer with
        for node in graph.nodes:
            self._visit(node, node in adds)

    def __contains__(self, node: object) -> bool:
        return node in self._of

    def first(self, node: fx.Node) -> fx.Node:
        """The first node that is quantized as one on a grid is: the quantizer is the same."""
        node = self._of[node]
        while node in self._shared:
            node = self._shared[node]
        return node

    def _visit(self, node: fx.Node, is_sum: bool) -> None:
        joins = node.target in _CONCATS or is_sum
        operands = node.all_input_nodes if joins else node.all_input_nodes[:1]  # what follows are sizes
        on_grid = bool(operands) and all(operand in self for operand in operands)
        if node in self.outputs:
            self._of[node] = node
        elif node.target in _CONCATS and on_grid and self._share and leads_to(node, self._layers.__contains__, _moves):
            first, *others = dict.fromkeys(self.first(operand) for operand in operands)
            self._shared.update(dict.fromkeys(others, first))
            self._of[node] = first
            self.divided.add(node)
        elif on_grid and (node.target in _GRID_KEEPING or (node.target in _SPLITS and self._share)):
            self._of[node] = self._of[operands[0]]
            if node.target in _SPLITS or operands[0] in self.divided:
                self.divided.add(node)
        elif is_sum and on_grid:
            reading = readers(node)
            end = reading[0] if len(reading) == 1 and reading[0].target in RELUS else node
            if not self._layers.issuperset(readers(end)) and all(reader.op != "output" for reader in readers(end)):
                self.outputs.add(end)
                if end is node:
                    self._of[node] = node
