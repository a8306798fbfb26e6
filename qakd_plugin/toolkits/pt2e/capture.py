"""From a float model to the graph that ``prepare_qat_pt2e`` takes, and what it has to be told before and after."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import QakdError, UnsupportedQuantizerError
from ...placement.exported_graph import exported as capture
from ...placement.exported_graph import layer_name
from ...tasks.inputs import Inputs, arguments, doubled, named, sample_count
from ..adapter import require_no_zero_gamma
from .graph import BATCH_NORM, CONVOLUTIONS, TRANSPOSED, activation_name, attribute, from_inputs, is_quantizer, join

_EPS = 1e-5
"""The only BatchNorm eps that ``prepare_qat_pt2e`` knows; it puts it in the place of any other."""


def exported(network: nn.Module, batch: Inputs) -> fx.GraphModule:
    """The graph of a float model in eval mode, for any batch size.

    In eval mode, because whatever else a module does in training (stochastic depth, auxiliary heads) would become a fixed part
    of the graph; BatchNorm and dropout can be switched later.
    """
    args, kwargs = arguments(batch if sample_count(batch) > 1 else doubled(batch))
    dimension = torch.export.Dim("batch")
    shapes = {
        name: {0: dimension} if isinstance(v, Tensor) and v.ndim else None for name, v in named(network, args, kwargs).items()
    }
    try:
        return capture(network, args, kwargs, shapes)
    except Exception as error:  # user code runs under the tracer: whatever it raises means "cannot be exported"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "Check that neither values nor the batch size steer its control flow"
        if getattr(getattr(network, "config", None), "use_cache", False):  # a language model of Hugging Face returns a cache
            remedy = "Set model.config.use_cache = False, so that it returns no cache"
        raise QakdError(
            f"torch.export cannot trace {type(network).__name__}, which toolkit='pt2e' needs: {reason} {remedy}, or use "
            "toolkit='modelopt'."
        ) from error


@torch.no_grad()
def unify_batch_norms(network: nn.Module) -> None:
    """Give every BatchNorm the eps that prepare_qat_pt2e assumes, without changing what it computes in eval mode."""
    for name, module in network.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_var is None or module.running_mean is None:
            raise UnsupportedQuantizerError(
                f"{name}: its BatchNorm has no running statistics (track_running_stats=False), so it cannot be folded. "
                "Turn them on and run some batches in train mode, or use another normalization."
            )
        module.running_var += module.eps - _EPS
        module.eps = _EPS
        if module.weight is None or module.bias is None:  # the fused pattern needs both
            for parameter, value in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
                del module._parameters[parameter]
                module.register_buffer(parameter, value(module.running_var))  # no parameter, by which frozen ones are known


def refuse_zero_gammas(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target is not BATCH_NORM or node.args[0].target not in CONVOLUTIONS | TRANSPOSED:
            continue
        require_no_zero_gamma(layer_name(node), attribute(graph, node.args[1].target), "prepare_qat_pt2e")


def refuse_grouped_transposes(graph: fx.GraphModule) -> None:
    """prepare_qat_pt2e takes dimension 1 of a transposed weight for all output channels, and it holds those of one group."""
    for node in graph.graph.nodes:
        layer = node.args[0] if node.target is BATCH_NORM else None
        if layer is not None and layer.target in TRANSPOSED and (groups := (*layer.args, *7 * [1])[6]) != 1:
            raise QakdError(
                f"{layer_name(layer)}: prepare_qat_pt2e cannot fuse a BatchNorm into a transposed convolution with {groups} "
                "groups, and tries to also where it stays in floating point. Use toolkit='modelopt'."
            )


def restore_momenta(prepared: fx.GraphModule, network: nn.Module) -> None:
    """prepare_qat_pt2e gives every BatchNorm a momentum of 0.1."""
    for node in prepared.graph.nodes:
        if node.target is BATCH_NORM and node.args[3] is not None:  # weight standardization calls one without statistics
            norm = network.get_submodule(str(node.args[3].target).rpartition(".")[0])
            momentum = getattr(norm, "momentum", None)
            node.update_arg(6, 0.1 if momentum is None else momentum)
    prepared.recompile()


def rename_quantizers(prepared: fx.GraphModule) -> None:
    """Names that say where a quantizer is, in the place of ``activation_post_process_17``."""
    dynamic = from_inputs(prepared)
    names: dict[nn.Module, str] = {}
    old = set()
    for node in prepared.graph.nodes:
        if not is_quantizer(prepared, node):
            continue
        module = prepared.get_submodule(node.target)
        old.add(node.target)
        if module not in names:
            weight = node not in dynamic
            layer = layer_name(next(iter(node.users)))
            wanted = join(layer, "weight_fake_quant") if weight else activation_name(prepared, node, "fake_quant")
            taken, count = set(names.values()), 0
            name = wanted
            while name in taken:
                count += 1
                name = f"{wanted}_{count}"
            names[module] = name
            prepared.add_submodule(name, module)
        node.target = names[module]
    prepared.recompile()
    for name in old:
        delattr(prepared, name)
