"""torchao PT2E: models prepared by ``torchao.quantization.pt2e.quantize_pt2e.prepare_qat_pt2e``.

Facts of the toolkit that shape this file: the model is a flat graph of ATen operators, in which a quantizer is a
``call_module`` node and a weight quantizer one whose input depends on no model input; ``train()`` and ``eval()`` raise and
``.training`` never changes, the mode being arguments of BatchNorm and dropout nodes; a convolution with BatchNorm computes
``conv(x, fq(w * gamma / sigma)) / (gamma / sigma)`` and normalizes that, always with an eps of 1e-5; the arithmetic is
``round(x * (1 / scale))``.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._optional import require
from ..calibration import observe_inputs
from ..deploy.export_form import ActivationQDQ, StoredWeight, store_weight
from ..errors import NotPreparedError, QakdError, UnsupportedQuantizerError
from ..placement import place_quantizers
from ..quantizers import Rule
from .base import Precision, QParams, Quantizer, require_no_negative, require_no_zero_gamma
from .fake_quantize import FakeQuantizeSwitches, is_active
from .learned import learned_fake_quantize, restored_fake_quantize, rule_of, substitute

_aten = torch.ops.aten
CONVOLUTIONS = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv1d.padding,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv3d.default,
        _aten.conv3d.padding,
    }
)
TRANSPOSED = frozenset({_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input})
WEIGHTED = CONVOLUTIONS | TRANSPOSED | {_aten.linear.default}
_BATCH_NORM = _aten.batch_norm.default
_TRAINING_ARGUMENT = {
    _BATCH_NORM: 5,
    _aten.dropout.default: 2,
    _aten.dropout_.default: 2,
    _aten.feature_dropout.default: 2,
    _aten.feature_dropout_.default: 2,
    _aten.alpha_dropout.default: 2,
    _aten.alpha_dropout_.default: 2,
    _aten.feature_alpha_dropout.default: 2,
    _aten.feature_alpha_dropout_.default: 2,
}
"""Where the operators that work differently in training are told so."""

_EPS = 1e-5
"""The only BatchNorm eps that ``prepare_qat_pt2e`` knows; it puts it in the place of any other."""

_UNIT_TOLERANCE = 1e-6
"""How far from 1 the product of the folded scale and its inverse may lie: float32 rounding leaves about 2e-7."""


class PT2EAdapter(FakeQuantizeSwitches):
    """Adapter for ``prepare_qat_pt2e``."""

    name = "pt2e"

    def detect(self, model: nn.Module) -> bool:
        quantizer_class = _quantizer_class()
        return (
            quantizer_class is not None
            and isinstance(model, fx.GraphModule)
            and any(isinstance(m, quantizer_class) for m in model.modules())
        )

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        assert isinstance(model, fx.GraphModule)
        dynamic = from_inputs(model)
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in model.graph.nodes:
            if is_quantizer(model, node):
                calls.setdefault(model.get_submodule(node.target), []).append(node)
        found = []
        for fqn, module in model.named_modules():
            if module not in calls or not is_active(module):
                continue
            nodes = calls[module]
            layers = tuple(dict.fromkeys(layer_name(u) for node in nodes for u in node.users if u.target in WEIGHTED))
            if any(node in dynamic for node in nodes):
                found.append(Quantizer(fqn, module, "activation", layers))
            else:
                found.append(Quantizer(fqn, module, "weight", layers, weight=_weight_before(model, nodes[0])))
        return found

    def fake_quantizers(self, model: nn.Module) -> list[Any]:
        quantizer_class = _quantizer_class()
        assert quantizer_class is not None
        return [module for module in model.modules() if isinstance(module, quantizer_class)]

    def qparams(self, quantizer: Quantizer) -> QParams:
        q: Any = quantizer.module
        if (rule := rule_of(q)) is not None:
            return rule.qparams(q)
        observer = getattr(q, "activation_post_process", None)
        if not isinstance(getattr(q, "scale", None), Tensor) or observer is None or getattr(q, "is_dynamic", False):
            raise UnsupportedQuantizerError(
                f"{quantizer.fqn}: {type(q).__name__} is not a static integer quantizer. Use FakeQuantize with an observer, "
                "or qakd_plugin.prepare(model, calibration_batches, toolkit='pt2e')."
            )
        if not _calibrated(observer):
            raise NotPreparedError(
                f"{quantizer.fqn} has no calibrated range: its observer never saw a batch. Run the prepared model on several "
                "batches, or prepare it with qakd_plugin.prepare(model, calibration_batches, toolkit='pt2e')."
            )
        # Ranges that are learned have a zero point in floating point, and no flag for channels.
        scale, zero_point = q.scale.detach().float(), q.zero_point.detach().round().to(torch.int32)
        per_channel = q.qscheme in {torch.per_channel_symmetric, torch.per_channel_affine}
        shape = (-1,) if per_channel else ()
        return QParams(
            scale=scale.reshape(shape),
            zero_point=zero_point.reshape(shape),
            quant_min=int(observer.quant_min),
            quant_max=int(observer.quant_max),
            axis=int(q.ch_axis) if per_channel else None,
        )

    def set_mode(self, model: nn.Module, training: bool) -> None:
        """Tell every BatchNorm and dropout of the graph.

        torchao's own ``move_exported_model_to_train`` and ``..._to_eval`` rewrite the graph by pattern matching, which takes
        0.4 s and gives each BatchNorm a momentum of 0.1. Changing the one argument keeps everything else as it is, and the
        graph itself is the only record of its mode. The flags are set for whoever reads them.
        """
        assert isinstance(model, fx.GraphModule)
        changed = False
        for node in model.graph.nodes:
            index = _TRAINING_ARGUMENT.get(node.target)
            has_statistics = node.target is not _BATCH_NORM or node.args[3] is not None
            if index is not None and has_statistics and node.args[index] is not training:
                node.update_arg(index, training)
                changed = True
        if changed:
            model.recompile()
        for module in model.modules():
            module.training = training
        setattr(model, "_exported_training", training)  # noqa: B010 - what torchao's two functions look at first

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        require("torchao.quantization.pt2e.quantize_pt2e", extra="torchao", purpose="make a quantizer for prepare_qat_pt2e")
        from .pt2e_quantizer import SymmetricQuantizer

        return SymmetricQuantizer(
            place_quantizers(model, precision.keep),
            precision.weight_bits,
            precision.activation_bits,
            unsigned_bytes=precision.unsigned_bytes,
        )

    def prepare(self, model: nn.Module, batches: Sequence[Tensor], precision: Precision) -> nn.Module:
        pt2e = require(
            "torchao.quantization.pt2e.quantize_pt2e", extra="torchao", purpose="prepare a model with toolkit='pt2e'"
        )
        quantizer = self.configuration(model, precision)
        network = copy.deepcopy(model).eval()
        _unify_batch_norms(network)
        graph = _exported(network, batches[0])
        _refuse_zero_gammas(graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared: fx.GraphModule = pt2e.prepare_qat_pt2e(graph, quantizer)
        _restore_momenta(prepared, network)
        _rename_quantizers(prepared)
        self.set_mode(prepared, False)
        _calibrate(self, prepared, batches)
        return prepared

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        if rule.axis is not None:
            assert quantizer.weight is not None
            clip = clip.reshape([-1 if dim == rule.axis else 1 for dim in range(quantizer.weight().ndim)])
        base = _quantizer_class()
        assert base is not None
        substitute(model, quantizer.module, learned_fake_quantize(base, rule, clip, quantizer.module))

    @torch.no_grad()
    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        learned: Any = quantizer.module
        if learned.rule.transforms_weight:
            assert isinstance(model, fx.GraphModule)
            assert quantizer.weight is not None
            _bake_weight(model, learned, learned(quantizer.weight()))
        toolkit: Any = sys.modules["torchao.quantization.pt2e.fake_quantize"]
        substitute(model, learned, restored_fake_quantize(learned, toolkit.FakeQuantize, toolkit.FixedQParamsObserver))

    def learned(self, quantizer: Quantizer) -> Rule | None:
        return rule_of(quantizer.module)

    def export_form(self, model: nn.Module) -> nn.Module:
        form = copy.deepcopy(model)
        assert isinstance(form, fx.GraphModule)
        self.set_mode(form, False)
        self.freeze_ranges(form, True)
        with torch.no_grad():
            return _ExportForm(self, form).build()


class _ExportForm:
    """One prepared graph on its way to its export form. The graph belongs to a copy and is consumed."""

    def __init__(self, adapter: PT2EAdapter, model: fx.GraphModule) -> None:
        self.model = model
        self.graph = model.graph
        self.quantizers = {quantizer.module: quantizer for quantizer in adapter.quantizers(model)}
        self.qparams = adapter.qparams
        self._drop_inactive()
        self.dynamic = from_inputs(model)
        self._value = _Constants(model).value
        self.targets: dict[str, Any] = {}
        self.done: set[fx.Node] = set()

    def build(self) -> fx.GraphModule:
        for node in self._pending():
            if node.target in WEIGHTED and node in self.dynamic and node.args[1] not in self.dynamic:
                self._layer(node)
        quantizers = [node for node in self._pending() if node in self.dynamic and is_quantizer(self.model, node)]
        names = [_activation_name(self.model, node, "qdq") for node in quantizers]  # which look at the quantizer in front, too
        activations: dict[nn.Module, str] = {}
        for node, name in zip(quantizers, names, strict=True):
            self._activation(node, name, activations)
        for node in self._pending():
            if node not in self.dynamic and node.op not in {"get_attr", "output"}:
                self._constant(node)
        self._drop_unused()
        kept: dict[str, str] = {}
        for node in self._pending():
            if node.op in {"get_attr", "call_module"}:
                target = str(node.target)
                if target not in kept:
                    kept[target] = self._add(target, _attribute(self.model, target))
                self._retarget(node, kept[target])
        form = fx.GraphModule(self.targets, self.graph, type(self.model).__name__)
        form.graph.lint()  # type: ignore[no-untyped-call]  # annotated in later releases of torch than 2.11
        for name, module in form.named_modules():
            if isinstance(module, ActivationQDQ | StoredWeight):
                module.name = name
        return form.eval()

    def _drop_inactive(self) -> None:
        """Quantizers that the user switched off pass on what they get."""
        for node in list(self.graph.nodes):
            if is_quantizer(self.model, node) and self.model.get_submodule(str(node.target)) not in self.quantizers:
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.graph.erase_node(node)

    def _pending(self) -> list[fx.Node]:
        """Nodes that still speak of the prepared model's attributes, not of the export form's."""
        return [node for node in self.graph.nodes if node not in self.done]

    def _retarget(self, node: fx.Node, name: str) -> None:
        node.target = name
        self.done.add(node)

    def _insert_constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", self._add(name, value.detach().clone()))
        self.done.add(node)
        return node

    def _layer(self, node: fx.Node) -> None:
        """Store the weight of a convolution or linear layer, and fold the BatchNorm behind it into its bias."""
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if weight not in self.done and is_quantizer(self.model, weight):
            quantizer = self.quantizers[self.model.get_submodule(str(weight.target))]
            layer = layer_name(node)
            stored = store_weight(self._value(weight), self.qparams(quantizer), layer or quantizer.fqn)
            self._retarget(weight, self._add(_join(layer, "weight"), stored))
            weight.args = ()
        folded = self._folded_bias(node)
        if folded is None:
            return
        end, bias = folded
        folded_bias = self._insert_constant(node, _join(layer_name(node), "bias"), bias.float())
        node.args = (*node.args[:2], folded_bias, *node.args[3:])
        end.replace_all_uses_with(node)

    def _folded_bias(self, layer: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """The BatchNorm of ``layer -> / factor [-> + bias] -> BatchNorm`` and the one bias it all comes down to.

        None where it is something else, or where the BatchNorm does not undo the division by ``factor`` (a plain convolution
        with BatchNorm: that is folded into the stored scale later, in the ONNX graph, as every toolkit's is).
        """
        bias = self._value(layer.args[2]).double() if len(layer.args) > 2 and layer.args[2] is not None else 0.0
        end = _only_user(layer, _aten.div.Tensor)
        if end is None or not self._is_constant(end.args[1]):
            return None
        factor = self._value(end.args[1]).double().flatten()
        bias = bias / factor
        shifted = _only_user(end, _aten.add.Tensor)
        if shifted is not None and self._is_constant(shifted.args[1]) and not shifted.kwargs:
            bias = bias + self._value(shifted.args[1]).double().flatten()
            end = shifted
        norm = _only_user(end, _BATCH_NORM)
        if norm is None or not all(self._is_constant(argument) for argument in norm.args[1:5]):
            return None
        gamma, beta, mean, variance = (self._value(argument).double() for argument in norm.args[1:5])
        scale = gamma / torch.sqrt(variance + norm.args[7])
        if not bool(((scale / factor - 1).abs() < _UNIT_TOLERANCE).all()):
            return None
        return norm, (bias - mean) * scale + beta

    def _activation(self, node: fx.Node, name: str, made: dict[nn.Module, str]) -> None:
        module = self.model.get_submodule(str(node.target))
        if module not in made:
            quantizer = self.quantizers[module]
            made[module] = self._add(name, ActivationQDQ(self.qparams(quantizer), quantizer.fqn))
        self._retarget(node, made[module])

    def _constant(self, node: fx.Node) -> None:
        """Put a tensor in the place of a calculation that no input of the model takes part in."""
        if not any(user in self.dynamic or user.op == "output" for user in node.users):
            return
        value = self._value(node)
        if not isinstance(value, Tensor):
            return
        node.replace_all_uses_with(self._insert_constant(node, node.name, value))

    def _drop_unused(self) -> None:
        """Constants nobody reads any more (among them the counters of BatchNorm), and torch.export's checks of its inputs."""
        for node in reversed(list(self.graph.nodes)):
            unread = not node.users and node.op not in {"placeholder", "output"}
            checks = node.op == "call_module" and node not in self.done
            if unread and (node not in self.dynamic or checks or not _writes(node)):
                self.graph.erase_node(node)

    def _is_constant(self, argument: object) -> bool:
        return isinstance(argument, fx.Node) and argument not in self.dynamic

    def _add(self, name: str, target: nn.Module | Tensor) -> str:
        """Register a module or tensor under ``name``, or the next free one like it."""
        free, count = name, 0
        while free in self.targets:
            count += 1
            free = f"{name}_{count}"
        self.targets[free] = target
        return free


class _Constants:
    """What the nodes of a graph compute that depend on no input of the model."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model
        self.values: dict[fx.Node, Any] = {}

    def value(self, argument: Any) -> Any:
        """Of a node; anything else is what it is."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self.values:
            self.values[argument] = self._compute(argument)
        return self.values[argument]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return _attribute(self.model, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _weight_before(model: fx.GraphModule, quantizer: fx.Node) -> Callable[[], Tensor]:
    """Reads the weight in front of a quantizer, whenever it is called."""

    def weight() -> Tensor:
        with torch.no_grad():
            value: Tensor = _Constants(model).value(quantizer.args[0])
        return value.detach()

    return weight


def _bake_weight(model: fx.GraphModule, quantizer: nn.Module, quantized: Tensor) -> None:
    """Replace a weight by its quantized value, so that the toolkit's own quantizer finds it on the grid."""
    for node in model.graph.nodes:
        if node.op != "call_module" or model.get_submodule(str(node.target)) is not quantizer:
            continue
        source, factor = node.args[0], None
        if source.target is _aten.mul.Tensor:  # gamma / sigma of a BatchNorm
            factor = _Constants(model).value(source.args[1])
            source = source.args[0]
        assert source.op == "get_attr"
        _attribute(model, str(source.target)).copy_(quantized if factor is None else quantized / factor)
        return


def from_inputs(model: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose value depends on an input of the model, or on chance."""
    dynamic: set[fx.Node] = set()
    for node in model.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "placeholder" or random or any(source in dynamic for source in node.all_input_nodes):
            dynamic.add(node)
    return dynamic


def is_quantizer(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a fake-quantizer."""
    quantizer_class = _quantizer_class()
    return (
        node.op == "call_module"
        and quantizer_class is not None
        and isinstance(model.get_submodule(str(node.target)), quantizer_class)
    )


def layer_name(node: fx.Node) -> str:
    """Dotted name of the module of the float model that a node of the exported graph belongs to; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # Repeated calls of a module are told apart by "@1", "@2", ...
    return path.partition("@")[0].removeprefix("L['self']").removeprefix(".")


def _quantizer_class() -> type[nn.Module] | None:
    """torchao's FakeQuantizeBase, if it is loaded: a model that it prepared cannot exist otherwise."""
    module = sys.modules.get("torchao.quantization.pt2e.fake_quantize")
    return None if module is None else module.FakeQuantizeBase  # type: ignore[no-any-return]


def _exported(network: nn.Module, batch: Tensor) -> fx.GraphModule:
    """The graph of a float model in eval mode, for any batch size.

    In eval mode, because whatever else a module does in training (stochastic depth, auxiliary heads) would become a fixed part
    of the graph; BatchNorm and dropout can be switched later.
    """
    example = batch if batch.shape[0] > 1 else torch.cat([batch, batch])
    try:
        with torch.enable_grad(), _without_fast_path():
            program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            graph = program.module(check_guards=False)
    except Exception as error:  # user code runs under the tracer: whatever it raises means "cannot be exported"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QakdError(
            f"torch.export cannot trace {type(network).__name__}, which toolkit='pt2e' needs: {reason} Check that its forward "
            "takes one tensor and that neither values nor the batch size steer its control flow, or use toolkit='modelopt'."
        ) from error
    assert isinstance(graph, fx.GraphModule)
    return graph


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention as separate operators, not as the one that only inference knows."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@torch.no_grad()
def _unify_batch_norms(network: nn.Module) -> None:
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
            module.weight = nn.Parameter(torch.ones_like(module.running_var), requires_grad=False)
            module.bias = nn.Parameter(torch.zeros_like(module.running_mean), requires_grad=False)


def _refuse_zero_gammas(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target is not _BATCH_NORM or node.args[0].target not in CONVOLUTIONS | TRANSPOSED:
            continue
        require_no_zero_gamma(layer_name(node), _attribute(graph, node.args[1].target), "prepare_qat_pt2e")


def _restore_momenta(prepared: fx.GraphModule, network: nn.Module) -> None:
    """prepare_qat_pt2e gives every BatchNorm a momentum of 0.1."""
    for node in prepared.graph.nodes:
        if node.target is _BATCH_NORM:
            norm = network.get_submodule(str(node.args[3].target).rpartition(".")[0])
            momentum = getattr(norm, "momentum", None)
            node.update_arg(6, 0.1 if momentum is None else momentum)
    prepared.recompile()


def _rename_quantizers(prepared: fx.GraphModule) -> None:
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
            wanted = _join(layer, "weight_fake_quant") if weight else _activation_name(prepared, node, "fake_quant")
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


def _activation_name(model: fx.GraphModule, node: fx.Node, what: str) -> str:
    """``<layer>.input_<what>`` for a quantizer one layer alone reads, else ``<module>.output_<what>`` of what is before it."""
    readers = {layer_name(user) for user in node.users if user.target in WEIGHTED}
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if len(readers) == 1 and len(node.users) == 1:
        return _join(next(iter(readers)), f"input_{what}")
    while is_quantizer(model, source):
        source = source.all_input_nodes[0]
    return f"input_{what}" if source.op == "placeholder" else _join(layer_name(source), f"output_{what}")


@torch.no_grad()
def _calibrate(adapter: PT2EAdapter, prepared: fx.GraphModule, batches: Sequence[Tensor]) -> None:
    """Ranges of least squared error over all batches. Eight-bit ranges go on following the data in training, lower ones do
    not."""
    activations = [q for q in adapter.quantizers(prepared) if q.role == "activation"]
    adapter.set_fake_quant(prepared, False)
    observers = observe_inputs(prepared, {q.fqn: q.module for q in activations}, batches, {})
    adapter.set_fake_quant(prepared, True)
    for quantizer in activations:
        q: Any = quantizer.module
        observer = q.activation_post_process
        low, high = int(observer.quant_min), int(observer.quant_max)
        if low == 0:
            require_no_negative(quantizer.fqn, observers[quantizer.fqn].minimum)
        clip = torch.tensor(observers[quantizer.fqn].best_clip(high))
        if clip == 0:
            raise NotPreparedError(
                f"{quantizer.fqn} saw only zeros during calibration. Calibrate on real batches, or exclude this layer from "
                "quantization (keep=...)."
            )
        observer.min_val.copy_(-clip if low < 0 else 0)
        observer.max_val.copy_(clip)
        if high - low == 255:
            scale, zero_point = q.calculate_qparams()
            q.scale.copy_(scale)
            q.zero_point.copy_(zero_point)
        else:
            q.scale.fill_(clip / high)
            q.zero_point.fill_(0)
            q.enable_observer(False)


def _calibrated(observer: Any) -> bool:
    """Whether an observer has seen a tensor, or needs none."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if low is None or high is None:
        return True
    return low.numel() > 0 and bool(torch.all(torch.isfinite(low) & torch.isfinite(high)))


def _only_user(node: fx.Node, target: object) -> fx.Node | None:
    """The single node that reads ``node``, if it applies ``target`` to it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target and users[0].args[0] is node else None


def _writes(node: fx.Node) -> bool:
    """Whether a node changes one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _attribute(model: nn.Module, target: str) -> Any:
    parent, _, name = target.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
