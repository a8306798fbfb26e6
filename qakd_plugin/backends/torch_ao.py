"""torch.ao FX graph mode: models prepared by ``torch.ao.quantization.quantize_fx.prepare_qat_fx``.

Facts of the toolkit that shape this file: an activation quantizer is a ``call_module`` node whose module may be shared by
several nodes (concatenations and poolings keep their input's); observers go on updating in eval mode unless they are
disabled; convolution and BatchNorm are fused into one QAT module that divides by the folded scale again; the arithmetic is
``round(x * (1 / scale))``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.export_form import ActivationQDQ, QuantizedLayer, replace_modules, store_weight
from ..errors import NotPreparedError, UnsupportedQuantizerError
from .base import QParams, Quantizer

with warnings.catch_warnings():
    # torch.ao.quantization announces its migration to torchao on import; the models it prepared live on.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.ao.nn.intrinsic.qat as nniqat
    import torch.ao.nn.qat as nnqat
    from torch.ao.quantization.fake_quantize import FakeQuantizeBase

_FUSED_BATCH_NORM = tuple(
    getattr(nniqat, name)
    for name in ("ConvBn1d", "ConvBn2d", "ConvBn3d", "ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d")
)
_FUSED_RELU = tuple(
    getattr(nniqat, name)
    for name in ("ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")
)
_WEIGHTED = (*_FUSED_BATCH_NORM, *_FUSED_RELU, nnqat.Conv1d, nnqat.Conv2d, nnqat.Conv3d, nnqat.Linear)


class TorchAOAdapter:
    """Adapter for ``prepare_qat_fx``."""

    name = "torch_ao"

    def detect(self, model: nn.Module) -> bool:
        return isinstance(model, torch.fx.GraphModule) and any(isinstance(m, FakeQuantizeBase) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        return [
            Quantizer(fqn, module, "weight" if fqn.rpartition(".")[2] == "weight_fake_quant" else "activation")
            for fqn, module in model.named_modules()
            if isinstance(module, FakeQuantizeBase)
        ]

    def qparams(self, quantizer: Quantizer) -> QParams:
        q: Any = quantizer.module
        scale, zero_point = q.scale.detach().float(), q.zero_point.detach().to(torch.int32)
        per_channel = scale.numel() > 1 or bool(q.is_per_channel)
        if not _calibrated(q):
            raise NotPreparedError(
                f"{quantizer.fqn} has no calibrated range: its observer never saw a batch. Run the prepared model on several "
                "batches, or prepare it with qakd_plugin.prepare(model, calibration_batches, toolkit='torch_ao')."
            )
        observer = q.activation_post_process
        return QParams(
            scale=scale.reshape(-1) if per_channel else scale.reshape(()),
            zero_point=zero_point.reshape(-1) if per_channel else zero_point.reshape(()),
            quant_min=int(observer.quant_min),
            quant_max=int(observer.quant_max),
            axis=int(q.ch_axis) if per_channel else None,
        )

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        for quantizer in self.quantizers(model):
            quantizer.module.enable_fake_quant(enabled)  # type: ignore[operator]

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        for quantizer in self.quantizers(model):
            quantizer.module.enable_observer(not frozen)  # type: ignore[operator]

    def set_mode(self, model: nn.Module, training: bool) -> None:
        model.train(training)

    def export_form(self, model: nn.Module) -> nn.Module:
        form = copy.deepcopy(model).eval()
        self.freeze_ranges(form, True)
        quantizers = {q.module: q for q in self.quantizers(form)}
        exported: dict[nn.Module, nn.Module] = {}
        replacements: dict[str, nn.Module] = {}
        # remove_duplicate=False: a module shared by several names stays shared.
        for name, module in form.named_modules(remove_duplicate=False):
            if module not in exported:
                if isinstance(module, _WEIGHTED):
                    exported[module] = self._exported_layer(module, name, quantizers)
                elif module in quantizers and quantizers[module].role == "activation":
                    exported[module] = ActivationQDQ(self.qparams(quantizers[module]), quantizers[module].fqn)
                else:
                    continue
            replacements[name] = exported[module]
        for name, module in replacements.items():
            replace_modules(form, {name: module})
        return form

    def _exported_layer(self, module: Any, name: str, quantizers: dict[nn.Module, Quantizer]) -> QuantizedLayer:
        quantizer = quantizers[module.weight_fake_quant]
        weight, bias = _folded(module, name)
        with torch.no_grad():
            fake_quantized: Tensor = module.weight_fake_quant(weight)
        stored = store_weight(fake_quantized, self.qparams(quantizer), name)
        return QuantizedLayer(module, stored, bias, relu=isinstance(module, _FUSED_RELU))


def _folded(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with BatchNorm folded in, as the fused QAT module quantizes the weight."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if not isinstance(module, _FUSED_BATCH_NORM):
        return weight, bias
    norm = module.bn
    if norm.running_var is None:
        raise UnsupportedQuantizerError(
            f"{name}: its BatchNorm has no running statistics (track_running_stats=False), so it cannot be folded."
        )
    sigma = torch.sqrt(norm.running_var.detach() + norm.eps)
    gamma = norm.weight.detach()
    factor = gamma / sigma
    shift = norm.bias.detach() - norm.running_mean.detach() * factor
    if bias is not None:
        shift = shift + bias * factor
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), shift


def _calibrated(q: Any) -> bool:
    """Whether the observer behind a fake-quantizer has seen a tensor, or needs none."""
    low, high = getattr(q.activation_post_process, "min_val", None), getattr(q.activation_post_process, "max_val", None)
    if low is None or high is None:
        return True
    return low.numel() > 0 and bool(torch.all(torch.isfinite(low) & torch.isfinite(high)))
