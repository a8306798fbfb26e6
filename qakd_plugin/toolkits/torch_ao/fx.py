"""torch.ao FX graph mode: models prepared by ``torch.ao.quantization.quantize_fx.prepare_qat_fx``.

Facts of the toolkit that shape this file: an activation quantizer is a ``call_module`` node whose module may be shared by
several nodes (concatenations and poolings keep their input's); observers go on updating in eval mode unless they are
disabled; whatever a network asks of ``self.training`` is settled when it is traced; convolution and BatchNorm are fused into
one QAT module that divides by the folded scale again; the arithmetic is ``round(x * (1 / scale))``.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import NotPreparedError, QakdError, UnsupportedQuantizerError
from ...export_form.modules import ActivationQDQ, QuantizedLayer, QuantizedModule, replace_modules, store_weight
from ...placement.calibration import observe_inputs
from ...placement.placement import WEIGHTED, Placement, has_own_forward, non_negative, place_quantizers, relu_bounds
from ...quantizers import Rule
from ..adapter import Precision, QParams, Quantizer, require_no_negative, require_no_zero_gamma
from ..fake_quantizers import FakeQuantizeSwitches, is_active
from ..learned import learned_fake_quantize, restored_fake_quantize, rule_of, substitute

with warnings.catch_warnings():
    # torch.ao.quantization announces its migration to torchao on import; the models it prepared live on.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.ao.nn.intrinsic.qat as nniqat
    import torch.ao.nn.qat as nnqat
    from torch.ao.quantization import (
        FakeQuantize,
        FixedQParamsObserver,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
    )
    from torch.ao.quantization.backend_config import get_tensorrt_backend_config
    from torch.ao.quantization.fake_quantize import FakeQuantizeBase
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

_FUSED_BATCH_NORM = tuple(
    getattr(nniqat, name) for name in ("ConvBn1d", "ConvBn2d", "ConvBn3d", "ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d")
)
FUSED_RELU = tuple(
    getattr(nniqat, name)
    for name in ("ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")
)
QAT_LAYERS = (*_FUSED_BATCH_NORM, *FUSED_RELU, nnqat.Conv1d, nnqat.Conv2d, nnqat.Conv3d, nnqat.Linear)


class TorchAOAdapter(FakeQuantizeSwitches):
    """Adapter for ``prepare_qat_fx``."""

    name = "torch_ao"

    def detect(self, model: nn.Module) -> bool:
        return isinstance(model, torch.fx.GraphModule) and any(isinstance(m, FakeQuantizeBase) for m in model.modules())

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        found = []
        readers = self._readers(model)
        for fqn, module in model.named_modules():
            if not isinstance(module, FakeQuantizeBase) or not is_active(module):
                continue
            parent, _, child = fqn.rpartition(".")
            if child == "weight_fake_quant":
                layer = model.get_submodule(parent)
                found.append(Quantizer(fqn, module, "weight", (parent,), layer, _folded_weight_of(layer, parent)))
            else:
                found.append(Quantizer(fqn, module, "activation", readers.get(fqn, ())))
        return found

    def fake_quantizers(self, model: nn.Module) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]

    def _readers(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Weighted layers that read each activation quantizer."""
        assert isinstance(model, torch.fx.GraphModule)
        readers: dict[str, tuple[str, ...]] = {}
        for node in model.graph.nodes:
            if _is_fake_quant(model, node):
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

    def set_mode(self, model: nn.Module, training: bool) -> None:
        model.train(training)

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        require_signed_bytes(self.name, precision)
        return torch_ao_qconfig_mapping(model, place_quantizers(model, precision.keep), precision.weight_bits)

    def prepare(self, model: nn.Module, batches: Sequence[Tensor], precision: Precision) -> nn.Module:
        placement = place_quantizers(model, precision.keep)
        mapping = torch_ao_qconfig_mapping(model, placement, precision.weight_bits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)  # one per observer, on a default that changed years ago
            prepared = prepare_qat_fx(
                copy.deepcopy(model).eval(), mapping, (batches[0],), backend_config=get_tensorrt_backend_config()
            )
        _follow_the_mode(prepared)
        _leave_output_in_float(prepared)
        if precision.unsigned_bytes:
            _use_unsigned_bytes(prepared)
        bits = precision.activation_bits
        low_bit = _insert_low_bit_inputs(prepared, placement, bits) if bits < 8 else {}
        calibrate(self, prepared.eval(), batches, low_bit)
        return prepared

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        if rule.axis is not None:
            assert quantizer.weight is not None
            clip = clip.reshape([-1 if dim == rule.axis else 1 for dim in range(quantizer.weight().ndim)])
        substitute(model, quantizer.module, learned_fake_quantize(FakeQuantizeBase, rule, clip, quantizer.module))

    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        learned: Any = quantizer.module
        if learned.rule.transforms_weight:
            _bake_weight(model.get_submodule(quantizer.layers[0]), quantizer.layers[0], learned)
        substitute(model, learned, restored_fake_quantize(learned, FakeQuantize, FixedQParamsObserver))

    def learned(self, quantizer: Quantizer) -> Rule | None:
        return rule_of(quantizer.module)

    def export_form(self, model: nn.Module) -> nn.Module:
        form = copy.deepcopy(model).eval()
        self.freeze_ranges(form, True)
        quantizers = {q.module: q for q in self.quantizers(form)}
        exported: dict[nn.Module, nn.Module] = {}
        replacements: dict[str, nn.Module] = {}
        # remove_duplicate=False: a module shared by several names stays shared.
        for name, module in form.named_modules(remove_duplicate=False):
            if name.rpartition(".")[0] in replacements:
                continue  # part of a layer that is replaced as a whole
            if module not in exported:
                if isinstance(module, QAT_LAYERS):
                    exported[module] = self._exported_layer(module, name, quantizers)
                elif module in quantizers and quantizers[module].role == "activation":
                    exported[module] = ActivationQDQ(self.qparams(quantizers[module]), quantizers[module].fqn)
                elif isinstance(module, FakeQuantizeBase) and module not in quantizers:  # which the user switched off
                    exported[module] = nn.Identity()
                else:
                    continue
            replacements[name] = exported[module]
        return replace_modules(form, replacements)

    def _exported_layer(self, module: Any, name: str, quantizers: dict[nn.Module, Quantizer]) -> nn.Module:
        # Eager mode keeps the quantizer of the output in the layer.
        behind = quantizers.get(getattr(module, "activation_post_process", None))  # type: ignore[arg-type]
        output_qdq = None if behind is None else ActivationQDQ(self.qparams(behind), behind.fqn)
        quantizer = quantizers.get(module.weight_fake_quant)
        if quantizer is None:
            return QuantizedModule(module.to_float(), None, output_qdq)
        weight, bias = _folded(module, name)
        with torch.no_grad():
            fake_quantized: Tensor = module.weight_fake_quant(weight)
        stored = store_weight(fake_quantized, self.qparams(quantizer), name)
        return QuantizedLayer(module, stored, bias, relu=isinstance(module, FUSED_RELU), output_qdq=output_qdq)


def require_signed_bytes(toolkit: str, precision: Precision) -> None:
    """For all else ``prepare`` does by hand what no configuration of torch.ao can say."""
    if precision.activation_bits < 8 or precision.unsigned_bytes:
        asked = "a target other than TensorRT" if precision.unsigned_bytes else f"activation_bits={precision.activation_bits}"
        raise QakdError(
            f"{asked}: toolkit={toolkit!r} has no configuration for it, because residual adds keep 8 bits and unsigned grids "
            "have to follow the ReLUs. Use qakd_plugin.prepare, which puts those quantizers in itself."
        )


def torch_ao_qconfig(weight_bits: int) -> QConfig:
    """Symmetric int8 activations; symmetric weights per channel, whose scale follows the weight without delay."""
    limit = 2 ** (weight_bits - 1)
    return QConfig(
        activation=FakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        ),
        weight=FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            averaging_constant=1.0,
            quant_min=-127 if weight_bits == 8 else -limit,
            quant_max=limit - 1,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    )


def torch_ao_qconfig_mapping(model: nn.Module, placement: Placement, weight_bits: int) -> QConfigMapping:
    """The configuration for ``prepare_qat_fx`` that :func:`qakd_plugin.prepare` uses, for TensorRT's backend configuration.

    All activations take symmetric int8; weights are symmetric per channel and follow the weight without delay.

    Args:
        model: the float model.
        placement: from :func:`qakd_plugin.placement.placement.place_quantizers`.
        weight_bits: of all layers but the first and the last, which take 8.
    """

    mapping = QConfigMapping().set_global(torch_ao_qconfig(8))
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        if name not in placement.layers or has_own_forward(module):
            mapping.set_module_name(name, None)
        elif name not in placement.edges:
            mapping.set_module_name(name, torch_ao_qconfig(weight_bits))
    return mapping


class _FollowsMode(nn.Module):
    """A function that works differently in training, as a module that knows its mode."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **arguments: Any) -> Tensor:
        return self.function(**arguments, training=self.training)


def _follow_the_mode(prepared: torch.fx.GraphModule) -> None:
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


def _leave_output_in_float(prepared: torch.fx.GraphModule) -> None:
    """Remove a quantizer on the model's output: 256 different logits would tie, and no target needs it."""
    (output,) = (node for node in prepared.graph.nodes if node.op == "output")
    last = output.args[0]
    if isinstance(last, torch.fx.Node) and _is_fake_quant(prepared, last):
        last.replace_all_uses_with(last.all_input_nodes[0])
        prepared.graph.erase_node(last)
        prepared.recompile()
        prepared.delete_all_unused_submodules()


def _use_unsigned_bytes(prepared: torch.fx.GraphModule) -> None:
    """Give what cannot be negative codes 0..255; TensorRT's backend configuration has none."""
    _quantize_behind_relus(prepared)
    modules: dict[str, nn.Module] = {}
    for name, module in prepared.named_modules(remove_duplicate=False):
        keeps_sign = isinstance(module, FakeQuantizeBase)
        modules[name] = nn.ReLU() if isinstance(module, FUSED_RELU) else nn.Identity() if keeps_sign else module
    positive = non_negative(prepared.graph.nodes, modules)
    verdicts: dict[nn.Module, bool] = {}
    for node in prepared.graph.nodes:
        if _is_fake_quant(prepared, node):
            quantizer = prepared.get_submodule(node.target)
            verdicts[quantizer] = verdicts.get(quantizer, True) and node in positive
    for quantizer in [quantizer for quantizer, holds in verdicts.items() if holds]:
        substitute(prepared, quantizer, unsigned_byte(quantizer))


def _quantize_behind_relus(prepared: torch.fx.GraphModule) -> None:
    """Let quantizers change places with the ReLUs that read them, where the toolkit has not fused those into a layer."""
    for node in list(prepared.graph.nodes):
        # A ReLU may work in place: nobody else may read what it is given.
        if not _is_fake_quant(prepared, node) or len(node.users) != 1 or len(node.args[0].users) != 1:
            continue
        (relu,) = node.users
        module = prepared.get_submodule(str(relu.target)) if relu.op == "call_module" else None
        if relu_bounds(relu, module) is None:
            continue
        relu.replace_input_with(node, node.args[0])
        behind = list(relu.users)
        quantizer = prepared.get_submodule(str(node.target))
        stands_there = len(behind) == 1 and _is_fake_quant(prepared, behind[0])
        if not stands_there or prepared.get_submodule(str(behind[0].target)) is not quantizer:
            with prepared.graph.inserting_after(relu):
                moved = prepared.graph.call_module(str(node.target), (relu,))
            relu.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
        prepared.graph.erase_node(node)
    prepared.graph.lint()
    prepared.recompile()


def unsigned_byte(signed: Any) -> nn.Module:
    """A fake-quantizer of codes 0..255 in the place of ``signed``; for what cannot be negative: its zero point stays 0."""
    made: nn.Module = FakeQuantize(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    return made.to(signed.scale.device)


def _insert_low_bit_inputs(prepared: torch.fx.GraphModule, placement: Placement, bits: int) -> dict[str, tuple[int, int]]:
    """Give every inner layer a quantizer of fewer bits on its input, behind the 8-bit one that adds and poolings share.

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
        and _is_fake_quant(prepared, node.args[0])
    ]
    added: dict[tuple[torch.fx.Node, bool], torch.fx.Node] = {}
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


@torch.no_grad()
def calibrate(
    adapter: TorchAOAdapter, prepared: nn.Module, batches: Sequence[Tensor], low_bit: dict[str, tuple[int, int]]
) -> None:
    """Ranges of least squared error over all batches. Eight-bit ranges go on following the data in training, lower ones do
    not."""
    for name, module in prepared.named_modules():
        if isinstance(module, _FUSED_BATCH_NORM):
            gamma: Any = module.bn.weight
            require_no_zero_gamma(name, gamma, "the fused layer")
    activations = [q for q in adapter.quantizers(prepared) if q.role == "activation"]
    activations = [q for q in activations if q.fqn not in low_bit]
    watched = {q.fqn: q.module for q in activations} | {name: prepared.get_submodule(name) for name in low_bit}
    adapter.set_fake_quant(prepared, False)
    clamps = {name: (0.0, float("inf")) for name, (low, _) in low_bit.items() if low == 0}
    observers = observe_inputs(prepared, watched, batches, clamps)
    adapter.set_fake_quant(prepared, True)
    for quantizer in activations:
        q: Any = quantizer.module
        observer = q.activation_post_process
        if observer.quant_min == 0:
            require_no_negative(quantizer.fqn, observers[quantizer.fqn].minimum)
        clip = torch.tensor(observers[quantizer.fqn].best_clip(int(observer.quant_max)))
        observer.min_val.resize_(()).copy_(-clip if observer.quant_min < 0 else 0)
        observer.max_val.resize_(()).copy_(clip)
        scale, zero_point = q.calculate_qparams()
        q.scale.copy_(scale)
        q.zero_point.copy_(zero_point)
    for name, (low, high) in low_bit.items():
        fixed = fixed_fake_quantize(observers[name].best_clip(high), low, high, batches[0].device)
        substitute(prepared, prepared.get_submodule(name), fixed)


def fixed_fake_quantize(clip: float, low: int, high: int, device: torch.device) -> nn.Module:
    """A fake-quantizer per tensor whose range stays as it is."""
    fixed = FakeQuantize(
        observer=FixedQParamsObserver,
        quant_min=low,
        quant_max=high,
        scale=clip / high,
        zero_point=0,
        dtype=torch.quint8 if low == 0 else torch.qint8,
        qscheme=torch.per_tensor_affine,
    ).to(device)
    fixed.scale.fill_(clip / high)
    fixed.zero_point.fill_(0)
    return fixed


def _is_fake_quant(prepared: torch.fx.GraphModule, node: Any) -> bool:
    return (
        isinstance(node, torch.fx.Node)
        and node.op == "call_module"
        and isinstance(prepared.get_submodule(str(node.target)), FakeQuantizeBase)
    )


def _folded(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with BatchNorm folded in, as the fused QAT module quantizes the weight."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    factor = _batch_norm_factor(module, name)
    if factor is None:
        return weight, bias
    norm = module.bn
    shift = norm.bias.detach() - norm.running_mean.detach() * factor
    if bias is not None:
        shift = shift + bias * factor
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), shift


def _batch_norm_factor(module: Any, name: str) -> Tensor | None:
    """gamma / sigma of a fused BatchNorm (C,), or None."""
    if not isinstance(module, _FUSED_BATCH_NORM):
        return None
    norm = module.bn
    if norm.running_var is None:
        raise UnsupportedQuantizerError(
            f"{name}: its BatchNorm has no running statistics (track_running_stats=False), so it cannot be folded."
        )
    factor: Tensor = norm.weight.detach() / torch.sqrt(norm.running_var.detach() + norm.eps)
    return factor


@torch.no_grad()
def _bake_weight(layer: Any, name: str, quantizer: nn.Module) -> None:
    """Replace a weight by its quantized value, so that the toolkit's own quantizer finds it on the grid."""
    quantized = quantizer(_folded(layer, name)[0])
    factor = _batch_norm_factor(layer, name)
    layer.weight.copy_(quantized if factor is None else quantized / factor.reshape(-1, *[1] * (quantized.ndim - 1)))


def _folded_weight_of(layer: nn.Module, name: str) -> Callable[[], Tensor]:
    return lambda: _folded(layer, name)[0]


def _calibrated(q: Any) -> bool:
    """Whether the observer behind a fake-quantizer has seen a tensor, or needs none."""
    low, high = getattr(q.activation_post_process, "min_val", None), getattr(q.activation_post_process, "max_val", None)
    if low is None or high is None:
        return True
    return low.numel() > 0 and bool(torch.all(torch.isfinite(low) & torch.isfinite(high)))
