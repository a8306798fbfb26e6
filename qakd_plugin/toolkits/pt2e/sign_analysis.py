"""Which tensors of an exported graph cannot be negative: what ATen operators do with a sign."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import fx

from ...placement.sign_analysis import propagate
from .graph import ADDS, RELUS, is_tensor, may_be_view, writes

_aten = torch.ops.aten
_HARDTANH = {_aten.hardtanh.default, _aten.hardtanh_.default}
_MAKES = {_aten.sigmoid.default, _aten.hardsigmoid.default, _aten.softmax.int, _aten.softplus.default}
"""Operators whose output is never negative, beside ReLUs."""

_KEEPS = {
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.max_pool3d.default,
    _aten.avg_pool1d.default,
    _aten.avg_pool2d.default,
    _aten.avg_pool3d.default,
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default,
    _aten.mean.dim,
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.cat.default,
    _aten.dropout.default,
    _aten.add.Tensor,
    _aten.add_.Tensor,
}
"""Operators whose output is not negative where none of the tensors they read is."""


def non_negative(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that cannot be negative, whatever the inputs of the graph."""
    return propagate(graph.nodes, _holds, may_be_view, writes)


def _holds(node: fx.Node, found: Set[fx.Node]) -> bool:
    if node.target in _HARDTANH:
        return len(node.args) > 1 and bool(node.args[1] >= 0)  # type: ignore[operator]
    if node.target in _KEEPS:
        sources = [source for source in node.all_input_nodes if is_tensor(source)]
        # Of adds only those of two tensors: a scalar or a factor (alpha) may be negative.
        return set(sources) <= found and (node.target not in ADDS or (len(sources) == 2 and not node.kwargs))
    return node.target in RELUS or node.target in _MAKES
