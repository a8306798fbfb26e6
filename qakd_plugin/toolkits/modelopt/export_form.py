"""The export form of a model that ModelOpt prepared: stored weights, explicit quantizers, the user's own float modules."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._common.module_copy import copied, move_hooks
from ...export_form.modules import (
    ActivationQDQ,
    QuantizedLayer,
    QuantizedModule,
    quantize_output,
    replace_modules,
    store_weight,
)
from ...placement.layer_names import never_called
from ...placement.placement import has_own_forward
from ..adapter import Adapter, Quantizer

_log = logging.getLogger(__name__)


def export_form(adapter: Adapter, model: nn.Module) -> nn.Module:
    """See :meth:`.Adapter.export_form`."""
    network = copied(model).eval()
    active = {q.fqn: q for q in adapter.quantizers(network)}
    for quantizer in active.values():
        adapter.qparams(quantizer)  # refuses what has no export form
    parents = {name: network.get_submodule(name) for name in sorted({fqn.rpartition(".")[0] for fqn in active})}
    made = {module: _exported(adapter, module, name, active) for name, module in parents.items()}
    for module, replacement in made.items():
        move_hooks(module, replacement)
    # remove_duplicate=False: a module shared by several names stays shared.
    replacements = {name: made[module] for name, module in network.named_modules(remove_duplicate=False) if module in made}
    replacements |= {name: plain(layer) for name, layer in _idle_layers(network).items()}
    return replace_modules(network, replacements)


def _idle_layers(network: nn.Module) -> dict[str, Any]:
    """Layers that ModelOpt took and nothing calls; where a quantizer of such a weight is on, a warning says that it is not."""
    found: dict[str, Any] = {name: network.get_submodule(name) for name in sorted(never_called(network))}
    found = {name: layer for name, layer in found.items() if hasattr(layer, "weight_quantizer")}
    for name, layer in found.items():
        if not layer.weight_quantizer._disabled:
            _log.warning(
                "%s: nn.MultiheadAttention reads its weight without calling it, so its quantizers never act: it is "
                "exported in floating point. Quantize qakd_plugin.placement.attention.open_attention(model) instead.",
                name,
            )
    return found


def _exported(adapter: Adapter, module: Any, name: str, active: dict[str, Quantizer]) -> nn.Module:
    """``module`` with its quantizers made explicit."""

    def activation(which: str) -> ActivationQDQ | None:
        quantizer = active.get(f"{name}.{which}" if name else which)
        return None if quantizer is None else ActivationQDQ(adapter.qparams(quantizer), quantizer.fqn)

    input_qdq, output_qdq = activation("input_quantizer"), activation("output_quantizer")
    weight = active.get(f"{name}.weight_quantizer" if name else "weight_quantizer")
    stored = None
    if weight is not None:
        with torch.no_grad():
            fake_quantized: Tensor = weight.module(_unpruned(module))
        qparams = adapter.qparams(weight)
        if qparams.block is not None:  # ModelOpt fills the last block of a row up with zeros, and so does the export form
            fake_quantized = F.pad(fake_quantized, (0, -fake_quantized.shape[1] % qparams.block))
        stored = store_weight(fake_quantized, qparams, name)
    # AWQ and SmoothQuant leave a factor in the input's quantizer, which multiplies even when that is disabled.
    factor = getattr(getattr(module, "input_quantizer", None), "pre_quant_scale", None)
    unquantized = plain(module)
    if stored is None and input_qdq is None and output_qdq is not None and next(unquantized.children(), None) is not None:
        return quantize_output(unquantized, output_qdq)
    if stored is None:
        return QuantizedModule(unquantized, input_qdq, output_qdq)
    bias = getattr(unquantized, "bias", None)  # an embedding has none
    assert bias is None or isinstance(bias, Tensor)
    return QuantizedLayer(
        unquantized,
        stored,
        bias,
        own_forward=has_own_forward(unquantized),
        input_qdq=input_qdq,
        output_qdq=output_qdq,
        input_factor=factor,
    )


def _unpruned(module: Any) -> Tensor:
    """The weight that a layer quantizes: its parameter, without what a mask of ModelOpt's sparsity leaves out."""
    weight: Tensor = module._parameters["weight"]
    mask = getattr(module, "_weight_mask", None)
    return weight if mask is None or not module.is_sparse else weight * mask


def plain(module: Any) -> nn.Module:
    """The user's own float module, without ModelOpt's dynamic class. ``module`` belongs to a copy and is consumed."""
    plain: nn.Module = module.export() if hasattr(module, "export") else module
    return plain
