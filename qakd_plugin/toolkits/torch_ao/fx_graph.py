"""What is changed in the graph that ``prepare_qat_fx`` returns, because no configuration can ask for it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.nn.modules.conv import _ConvNd

from ...errors import QakdError
from ...placement.fx_graph import called_function, called_module, is_smooth_activation, only_reader, relu_bounds
from ...placement.placement import Placement
from ...placement.sign_analysis import non_negative
from ...placement.sums import ADDS, after_relu
from ..fake_quantizers import substitute
from .configuration import unsigned_byte
from .qat_layers import FUSED_RELU

_SPLITS = {operator.getitem, torch.chunk, torch.split, "chunk", "split"}


@contextmanager
def traceable(model: nn.Module, toolkit: str) -> Iterator[None]:
    """Within the block torch.fx traces ``model``.

    Raises:
        QakdError: it cannot; says why, and which toolkits need no torch.fx.
    """
    try:
        yield
    except QakdError:
        raise
    except Exception as error:  # user code runs under the tracer: whatever it raises means "cannot be traced"
        reason = (str(error).splitlines() or [""])[0].split(". ")[0]
        raise QakdError(
            f"toolkit={toolkit!r} needs torch.fx, which cannot trace {type(model).__name__} ({reason}). Use "
            "toolkit='modelopt' or 'pt2e', or let no input steer the control flow of its forward."
        ) from error


def is_fake_quant(prepared: fx.GraphModule, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and isinstance(prepared.get_submodule(str(node.target)), FakeQuantizeBase)
    )


class _FollowsMode(nn.Module):
    """A function that works differently in training, as a module that knows its mode."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **arguments: Any) -> Tensor:
        return self.function(**arguments, training=self.training)


def follow_the_mode(prepared: fx.GraphModule) -> None:
    """Let dropout and stochastic depth that are written as functions work in training, although eval mode was traced.

    In eval mode, because whatever else a network does in training (auxiliary heads) would become a fixed part of the graph.
    BatchNorm as a function keeps its statistics: the graph does not tell one that is frozen from one that is not.
    """
    for node in prepared.graph.nodes:
        if node.op != "call_function" or node.target is F.batch_norm:
            continue
        assert callable(node.target)
        try:
            arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):  # an operator written in C
            continue
        if arguments.pop("training", None) is False:
            name = f"{node.name}_by_mode"
            prepared.add_submodule(name, _FollowsMode(node.target))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (), arguments
    prepared.recompile()


def leave_output_in_float(prepared: fx.GraphModule) -> None:
    """Remove a quantizer on the model's output: 256 different logits would tie, and no target needs it."""
    (output,) = (node for node in prepared.graph.nodes if node.op == "output")
    last = output.args[0]
    if isinstance(last, fx.Node) and is_fake_quant(prepared, last):
        last.replace_all_uses_with(last.all_input_nodes[0])
        prepared.graph.erase_node(last)
        prepared.recompile()
        prepared.delete_all_unused_submodules()


def leave_activations_in_float(prepared: fx.GraphModule, *, after_convolutions: bool) -> None:
    """Remove quantizers between a layer and the SiLU, GELU or the like that alone reads it, where the next one is to follow.

    Args:
        prepared: from ``prepare_qat_fx``.
        after_convolutions: and not after linear layers alone, whose integer kernels return floats everywhere.
    """
    modules = dict(prepared.named_modules())
    for node in list(prepared.graph.nodes):
        if not is_fake_quant(prepared, node) or not node.users:
            continue
        layer = called_module(node.args[0], modules)
        linear = isinstance(layer, nn.Linear) or (after_convolutions and isinstance(layer, _ConvNd))
        if linear and all(is_smooth_activation(user, called_module(user, modules)) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    prepared.recompile()
    prepared.delete_all_unused_submodules()


def leave_summands_in_float(prepared: fx.GraphModule) -> None:
    """Remove, of each sum that is quantized, the quantizer of the first operand that a convolution makes for it alone."""
    modules = dict(prepared.named_modules())
    for add in [node for node in prepared.graph.nodes if called_function(node) in ADDS]:
        end = after_relu(add, modules)
        if not end.users or not all(is_fake_quant(prepared, user) for user in end.users):
            continue
        for operand in add.all_input_nodes:
            layer = called_module(operand.args[0], modules) if is_fake_quant(prepared, operand) else None
            if isinstance(layer, _ConvNd) and not isinstance(layer, FUSED_RELU) and only_reader(operand) is add:
                operand.replace_all_uses_with(operand.args[0])
                prepared.graph.erase_node(operand)
                break
    prepared.recompile()
    prepared.delete_all_unused_submodules()


def share_after_splits(prepared: fx.GraphModule) -> None:
    """Let a part of a quantized tensor keep that tensor's quantizer, as all else does that only moves numbers."""
    for node in prepared.graph.nodes:
        if not is_fake_quant(prepared, node):
            continue
        source = node.args[0]
        while called_function(source) in _SPLITS and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        if source is not node.args[0] and is_fake_quant(prepared, source):
            node.target = source.target
    prepared.recompile()
    prepared.delete_all_unused_submodules()


def use_unsigned_bytes(prepared: fx.GraphModule) -> None:
    """Give what cannot be negative codes 0..255; TensorRT's backend configuration has none."""
    _quantize_after_relus(prepared)
    modules: dict[str, nn.Module] = {}
    for name, module in prepared.named_modules(remove_duplicate=False):
        keeps_sign = isinstance(module, FakeQuantizeBase)
        modules[name] = nn.ReLU() if isinstance(module, FUSED_RELU) else nn.Identity() if keeps_sign else module
    positive = non_negative(prepared.graph.nodes, modules)
    verdicts: dict[nn.Module, bool] = {}
    for node in prepared.graph.nodes:
        if is_fake_quant(prepared, node):
            quantizer = prepared.get_submodule(node.target)
            verdicts[quantizer] = verdicts.get(quantizer, True) and node in positive
    for quantizer in [quantizer for quantizer, holds in verdicts.items() if holds]:
        substitute(prepared, quantizer, unsigned_byte(quantizer))


def _quantize_after_relus(prepared: fx.GraphModule) -> None:
    """Let quantizers change places with the ReLUs that read them, where the toolkit has not fused those into a layer."""
    for node in list(prepared.graph.nodes):
        # A ReLU may work in place: nobody else may read what it is given.
        if not is_fake_quant(prepared, node) or len(node.users) != 1 or len(node.args[0].users) != 1:
            continue
        (relu,) = node.users
        module = prepared.get_submodule(str(relu.target)) if relu.op == "call_module" else None
        if relu_bounds(relu, module) is None:
            continue
        relu.replace_input_with(node, node.args[0])
        readers = list(relu.users)
        quantizer = prepared.get_submodule(str(node.target))
        stands_there = len(readers) == 1 and is_fake_quant(prepared, readers[0])
        if not stands_there or prepared.get_submodule(str(readers[0].target)) is not quantizer:
            with prepared.graph.inserting_after(relu):
                moved = prepared.graph.call_module(str(node.target), (relu,))
            relu.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
        prepared.graph.erase_node(node)
    prepared.graph.lint()
    prepared.recompile()


def insert_low_bit_inputs(prepared: fx.GraphModule, placement: Placement, bits: int) -> dict[str, tuple[int, int]]:
    """Give every inner layer a quantizer of fewer bits on its input, after the 8-bit one that adds and poolings share.

    Returns:
        The new quantizers' names with their code ranges.
    """
    ranges: dict[str, tuple[int, int]] = {}
    readers = [
        node
        for node in prepared.graph.nodes
        if node.op == "call_module"
        and node.target in placement.layers
        and node.target not in placement.edges
        and is_fake_quant(prepared, node.args[0])
    ]
    added: dict[tuple[fx.Node, bool], fx.Node] = {}
    for source in dict.fromkeys(node.args[0] for node in readers):
        # Where the eight-bit grid has no other reader it goes; elsewhere it stays in front, so that the convolution before it
        # still ends in a single quantizer.
        alone = all(user in readers for user in source.users)
        for node in [user for user in source.users if user in readers]:
            unsigned = node.target in placement.unsigned
            if (source, unsigned) not in added:
                name = f"low_bit_input_{len(ranges)}"
                ranges[name] = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                prepared.add_submodule(name, nn.Identity())
                with prepared.graph.inserting_after(source):
                    added[source, unsigned] = prepared.graph.call_module(name, (source.args[0] if alone else source,))
            node.replace_input_with(source, added[source, unsigned])
    prepared.graph.eliminate_dead_code()
    prepared.graph.lint()
    prepared.recompile()
    prepared.delete_all_unused_submodules()
    return ranges
