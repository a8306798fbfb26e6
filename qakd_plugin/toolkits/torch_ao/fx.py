"""torch.ao FX graph mode: models prepared by ``torch.ao.quantization.quantize_fx.prepare_qat_fx``.

Facts of the toolkit that shape this file: an activation quantizer is a ``call_module`` node whose module may be shared by
several nodes (concatenations and poolings keep their input's); observers go on updating in eval mode unless they are
disabled; whatever a network asks of ``self.training`` is settled when it is traced; convolution and BatchNorm are fused into
one QAT module that divides by the folded scale again; the arithmetic is ``round(x * (1 / scale))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import FakeQuantize, FixedQParamsObserver
from torch.ao.quantization.backend_config import get_tensorrt_backend_config
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.quantize import _observer_forward_hook, _observer_forward_pre_hook
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from ..._common.module_copy import carry_hooks, copied, move_hooks
from ...errors import QakdError
from ...export_form.modules import ActivationQDQ, QuantizedLayer, QuantizedModule, replace_modules, store_weight
from ...placement.folded_batch_norm import fold_linear_batch_norms
from ...placement.placement import layer_graph, place_quantizers
from ...tasks.inputs import Inputs, arguments
from ..adapter import Precision, QParams, Quantizer
from ..fake_quantizers import FakeQuantizeAdapter, is_active, require_calibrated, restored_fake_quantize, rule_of, substitute
from ..frozen_statistics import set_training
from ..left_out import name_left_out
from .calibration import calibrate
from .configuration import require_signed_bytes, torch_ao_qconfig_mapping
from .fx_graph import (
    follow_the_mode,
    insert_low_bit_inputs,
    is_fake_quant,
    leave_activations_in_float,
    leave_output_in_float,
    leave_summands_in_float,
    share_after_splits,
    traceable,
    use_unsigned_bytes,
)
from .qat_layers import FUSED_RELU, QAT_LAYERS, bake_weight, folded, folded_weight_of

_OWN_HOOKS = (_observer_forward_hook, _observer_forward_pre_hook)
"""Of eager mode, which run the quantizers of a module's input and output."""


class TorchAOAdapter(FakeQuantizeAdapter):
    """Adapter for ``prepare_qat_fx``."""

    name = "torch_ao"

    def quantizer_class(self) -> Any:
        return FakeQuantizeBase

    def detect(self, model: nn.Module) -> bool:
        return isinstance(model, fx.GraphModule) and any(isinstance(m, FakeQuantizeBase) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        found = []
        readers = self._readers(model)
        for fqn, module in model.named_modules():
            if not isinstance(module, FakeQuantizeBase) or not is_active(module):
                continue
            parent, _, child = fqn.rpartition(".")
            if child == "weight_fake_quant":
                layer = model.get_submodule(parent)
                found.append(Quantizer(fqn, module, "weight", (parent,), layer, folded_weight_of(layer, parent)))
            else:
                found.append(Quantizer(fqn, module, "activation", readers.get(fqn, ())))
        return found

    def _readers(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Weighted layers that read each activation quantizer."""
        assert isinstance(model, fx.GraphModule)
        readers: dict[str, tuple[str, ...]] = {}
        for node in model.graph.nodes:
            if is_fake_quant(model, node):
                users = [str(user.target) for user in node.users if user.op == "call_module"]
                layers = tuple(name for name in users if isinstance(model.get_submodule(name), QAT_LAYERS))
                readers[str(node.target)] = readers.get(str(node.target), ()) + layers
        return readers

    def qparams(self, quantizer: Quantizer) -> QParams:
        q: Any = quantizer.module
        if (rule := rule_of(q)) is not None:
            return rule.qparams(q)
        scale, zero_point = q.scale.detach().float(), q.zero_point.detach().to(torch.int32)
        per_channel = scale.numel() > 1 or bool(q.is_per_channel)
        require_calibrated(quantizer, "torch_ao")
        observer = q.activation_post_process
        return QParams(
            scale=scale.reshape(-1) if per_channel else scale.reshape(()),
            zero_point=zero_point.reshape(-1) if per_channel else zero_point.reshape(()),
            quant_min=int(observer.quant_min),
            quant_max=int(observer.quant_max),
            axis=int(q.ch_axis) if per_channel else None,
        )

    def set_mode(self, model: nn.Module, training: bool) -> None:
        set_training(model, training)

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        require_signed_bytes(self.name, precision)
        return torch_ao_qconfig_mapping(model, place_quantizers(model, precision.keep), precision)

    def prepare(self, model: nn.Module, example: Inputs, batches: Iterator[Inputs], precision: Precision) -> nn.Module:
        model = fold_linear_batch_norms(model, lambda: layer_graph(model, example))
        placement = place_quantizers(model, precision.keep, example)
        mapping = torch_ao_qconfig_mapping(model, placement, precision)
        with traceable(model, self.name):
            prepared = prepare_qat_fx(
                copy.deepcopy(model).eval(), mapping, _positional(example), backend_config=get_tensorrt_backend_config()
            )
        carry_hooks(model, prepared)  # the tracer sees forward alone
        follow_the_mode(prepared)
        leave_output_in_float(prepared)
        if precision.placement > 1:
            share_after_splits(prepared)
        if precision.placement > 2:
            leave_activations_in_float(prepared, after_convolutions=not precision.before_activations)
        if not precision.before_sums:
            leave_summands_in_float(prepared)
        if precision.unsigned_bytes:
            use_unsigned_bytes(prepared)
        bits = precision.activation_bits
        low_bit = insert_low_bit_inputs(prepared, placement, bits) if bits < 8 else {}
        calibrate(self, prepared.eval(), batches, low_bit)
        name_left_out(self, prepared, placement)
        return prepared

    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        learned: Any = quantizer.module
        if learned.rule.transforms_weight:
            bake_weight(model.get_submodule(quantizer.layers[0]), quantizer.layers[0], learned)
        substitute(model, learned, restored_fake_quantize(learned, FakeQuantize, FixedQParamsObserver))

    def export_form(self, model: nn.Module) -> nn.Module:
        network = copied(model).eval()
        self.freeze_ranges(network, True)
        quantizers = {q.module: q for q in self.quantizers(network)}
        exported: dict[nn.Module, nn.Module | None] = {}
        replacements: dict[str, nn.Module] = {}
        # remove_duplicate=False: a module shared by several names stays shared.
        for name, module in network.named_modules(remove_duplicate=False):
            if name.rpartition(".")[0] in replacements:
                continue  # part of a layer that is replaced as a whole
            if module not in exported:
                exported[module] = self._exported(module, name, quantizers)
            if (replacement := exported[module]) is not None:
                replacements[name] = replacement
                move_hooks(module, replacement, but_not=_OWN_HOOKS)
        return replace_modules(network, replacements)

    def _exported(self, module: nn.Module, name: str, quantizers: dict[nn.Module, Quantizer]) -> nn.Module | None:
        """What stands in the place of a module in the export form; None where it stays."""
        if isinstance(module, QAT_LAYERS):
            return self._exported_layer(module, name, quantizers)
        if not isinstance(module, FakeQuantizeBase):
            return None
        if module not in quantizers:  # which the user switched off
            return nn.Identity()
        quantizer = quantizers[module]
        return ActivationQDQ(self.qparams(quantizer), quantizer.fqn) if quantizer.role == "activation" else None

    def _exported_layer(self, module: Any, name: str, quantizers: dict[nn.Module, Quantizer]) -> nn.Module:
        # Eager mode keeps the quantizer of the output in the layer.
        of_output = quantizers.get(getattr(module, "activation_post_process", None))  # type: ignore[arg-type]
        output_qdq = None if of_output is None else ActivationQDQ(self.qparams(of_output), of_output.fqn)
        quantizer = quantizers.get(module.weight_fake_quant)
        if quantizer is None:
            return QuantizedModule(module.to_float(), None, output_qdq)
        weight, bias = folded(module, name)
        with torch.no_grad():
            fake_quantized: Tensor = module.weight_fake_quant(weight)
        stored = store_weight(fake_quantized, self.qparams(quantizer), name)
        return QuantizedLayer(module, stored, bias, relu=isinstance(module, FUSED_RELU), output_qdq=output_qdq)


def _positional(inputs: Inputs) -> tuple[Any, ...]:
    """FX traces positional arguments."""
    args, kwargs = arguments(inputs)
    if kwargs:
        raise QakdError(
            f"calibration_batches: toolkit='torch_ao' traces positional arguments, got {', '.join(kwargs)} by name. Pass "
            "batch_fn=lambda batch: ((..., ...), targets), or use toolkit='modelopt'."
        )
    return args
