"""torch.ao eager mode: models prepared by ``torch.ao.quantization.prepare_qat``.

Facts of the toolkit that shape this file: a forward hook runs a module's output through its child
``activation_post_process``; functional operators are invisible to it, so adds and concatenations are quantized only where the
model is written with ``FloatFunctional``; inputs are quantized by a ``QuantStub``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import MovingAverageMinMaxObserver, QuantStub, QuantWrapper, fuse_modules_qat, prepare_qat
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.quantize import _register_activation_post_process_hook

from ..._common.module_mode import eval_mode
from ...errors import QakdError
from ...placement.folded_batch_norm import fold_linear_batch_norms
from ...placement.fx_graph import GRID_KEEPING, called_module, only_reader
from ...placement.placement import Placement, layer_graph, place_quantizers
from ...placement.sign_analysis import non_negative
from ...tasks.inputs import Inputs, device_of
from ..adapter import Precision
from ..left_out import name_left_out
from .calibration import calibrate
from .configuration import fixed_fake_quantize, require_signed_bytes, torch_ao_qconfig, unsigned_byte
from .fx import TorchAOAdapter
from .fx_graph import traceable
from .qat_layers import QAT_LAYERS

_KEEP_GRID = {torch.flatten, torch.reshape, torch.squeeze, torch.nn.functional.max_pool2d,
              "flatten", "reshape", "view", "squeeze", "contiguous"}  # fmt: skip
_RELU = {torch.relu, torch.nn.functional.relu, "relu"}


_WRAPPED = "module."
"""Where ``QuantWrapper`` holds the model."""


class TorchAOEagerAdapter(TorchAOAdapter):
    """Adapter for ``prepare_qat``."""

    name = "torch_ao_eager"

    def detect(self, model: nn.Module) -> bool:
        return not isinstance(model, fx.GraphModule) and any(isinstance(m, FakeQuantizeBase) for m in model.modules())

    def wrapper_prefix(self, model: nn.Module) -> str:
        return _WRAPPED if isinstance(model, QuantWrapper) else ""

    def _readers(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Eager mode keeps no graph: a quantizer is known by the module that makes what it quantizes."""
        return {
            f"{name}.activation_post_process": (name,)
            for name, module in model.named_modules()
            if isinstance(module, QAT_LAYERS)
        }

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        """Configurations to assign as ``qconfig`` before ``prepare_qat``, by the names of modules."""
        require_signed_bytes(self.name, precision)
        placement = place_quantizers(model, precision.keep)
        found = ((name, _qconfig(name, module, placement, precision)) for name, module in model.named_modules())
        return {name: qconfig for name, qconfig in found if qconfig is not None}

    def prepare(self, model: nn.Module, example: Inputs, batches: Iterator[Inputs], precision: Precision) -> nn.Module:
        model = fold_linear_batch_norms(model, lambda: layer_graph(model, example))
        placement = place_quantizers(model, precision.keep, example)
        plan = _Plan(model, placement)
        prepared: nn.Module = copy.deepcopy(model).train()
        if plan.fusions:
            prepared = fuse_modules_qat(prepared, plan.fusions)
        _assign_qconfigs(prepared, placement, precision)
        prefix = ""
        if not any(isinstance(module, QuantStub) for module in model.modules()):
            prepared, prefix = QuantWrapper(prepared), _WRAPPED
            prepared.quant.qconfig = torch_ao_qconfig(8)  # type: ignore[union-attr, assignment]
        prepared = prepare_qat(prepared.train(), inplace=True)
        network = prepared.get_submodule("module") if prefix else prepared
        _finish_outputs(network, plan, precision)
        low_bit = _use_low_bits(network, plan, precision.activation_bits, device_of(example))
        calibrate(self, prepared.eval(), batches, {prefix + name: codes for name, codes in low_bit.items()})
        name_left_out(self, prepared, placement)
        return prepared


def _qconfig(name: str, module: nn.Module, placement: Placement, precision: Precision) -> Any:
    """What a module of this name takes; None where it stays in floating point."""
    if name not in placement.layers:
        return torch_ao_qconfig(8) if isinstance(module, FloatFunctional | QuantStub) else None
    return torch_ao_qconfig(precision.bits_of_weight(name in placement.edges))


def _assign_qconfigs(fused: nn.Module, placement: Placement, precision: Precision) -> None:
    """A fused layer stands where its convolution or linear layer stood, and holds it as a child."""
    for name, module in fused.named_modules():
        layer = next((part for part in (name, name.rpartition(".")[0]) if part in placement.layers), name)
        module.qconfig = _qconfig(layer, module, placement, precision)


def _finish_outputs(network: nn.Module, plan: _Plan, precision: Precision) -> None:
    """Quantizers that the toolkit leaves out, and those that it should not have put in."""
    for name in plan.between:
        _quantize_output(network.get_submodule(name))
    for name in plan.last:
        _leave_in_float(network.get_submodule(name))
    if precision.unsigned_bytes:
        for name in [name for name, holds in plan.non_negative.items() if holds]:
            holder: Any = network.get_submodule(name)
            holder.activation_post_process = unsigned_byte(holder.activation_post_process)


def _use_low_bits(network: nn.Module, plan: _Plan, bits: int, device: torch.device) -> dict[str, tuple[int, int]]:
    """Let what inner layers alone read take fewer bits.

    Returns:
        Lowest and highest code of those quantizers, by name. They are placeholders: calibration puts others in their place.
    """
    low_bit: dict[str, tuple[int, int]] = {}
    if bits == 8:
        return low_bit
    for name, unsigned in plan.only_read_by_inner_layers.items():
        limit = 2 ** (bits - 1)
        low, high = (0, 2 * limit - 1) if unsigned else (-limit, limit - 1)
        network.get_submodule(name).activation_post_process = fixed_fake_quantize(1.0, low, high, device)
        low_bit[f"{name}.activation_post_process"] = low, high
    return low_bit


class _Plan:
    """What the graph of a float model says about its eager-mode preparation.

    Attributes:
        fusions: lists of module names, each to become one QAT module.
        last: layers that make the model's output, which stays in floating point.
        between: other modules that a quantized layer reads (poolings, activations): their output needs a quantizer.
        only_read_by_inner_layers: modules whose output nothing else reads, and whether those layers see no negative value: then
            an unsigned grid fits, be it in front of the ReLU.
        non_negative: modules whose output is quantized, and whether it cannot be negative.
    """

    def __init__(self, model: nn.Module, placement: Placement) -> None:
        with eval_mode(model), traceable(model, "torch_ao_eager"):
            graph_module = fx.symbolic_trace(model)
        self.modules = dict(graph_module.named_modules())
        self.floats = dict(model.named_modules())
        self.placement = placement
        self.fusions: list[list[str]] = []
        self.last: list[str] = []
        self.between: list[str] = []
        self.only_read_by_inner_layers: dict[str, bool] = {}
        self.non_negative: dict[str, bool] = {}
        self._positive = non_negative(graph_module.graph.nodes, self.modules)
        self._quantized: set[fx.Node] = set()
        self._calls = Counter(node.target for node in graph_module.graph.nodes if node.op == "call_module")
        for node in graph_module.graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._quantized.add(node)
        if node.op != "call_module":
            return
        name = str(node.target)
        if name.endswith(".activation_post_process") and isinstance(self.floats[name.rpartition(".")[0]], FloatFunctional):
            self._ends(node, name.rpartition(".")[0])
        if name not in self.placement.layers:
            return
        self._require_quantized_input(node)
        chain = [node]
        for kind in (nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, nn.ReLU):
            reader = only_reader(chain[-1])
            # A ReLU that is called in several places cannot become part of one layer.
            if reader is not None and isinstance(self._module(reader), kind) and self._calls[reader.target] == 1:
                chain.append(reader)
        if len(chain) > 1:
            self.fusions.append([str(member.target) for member in chain])
        if any(user.op == "output" for user in chain[-1].users):
            self.last.append(name)
            return
        self._ends(chain[-1], name)

    def _ends(self, node: fx.Node, name: str) -> None:
        """``node`` is where module ``name``'s quantized output leaves it."""
        self._quantized.add(node)
        self.non_negative[name] = self.non_negative.get(name, True) and node in self._positive
        readers = [str(reader.target) for reader in self._readers(node)]
        if all(reader in self.placement.layers and reader not in self.placement.edges for reader in readers):
            self.only_read_by_inner_layers[name] = all(reader in self.placement.unsigned for reader in readers)

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """What reads a value, looked at through operators that keep its grid."""
        for user in node.users:
            if self._keeps_grid(user):
                yield from self._readers(user)
            else:
                yield user

    def _module(self, node: fx.Node) -> nn.Module | None:
        return called_module(node, self.modules)

    def _keeps_grid(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), GRID_KEEPING) or node.target in _KEEP_GRID | _RELU

    def _require_quantized_input(self, layer: fx.Node) -> None:
        source = layer.all_input_nodes[0]
        while source not in self._quantized:
            keeps = self._keeps_grid(source)
            if self._module(source) is not None and not keeps:
                self.between.append(str(source.target))
                self._ends(source, str(source.target))
                return
            if not keeps:
                raise QakdError(
                    f"{layer.target}: its input comes from {source.name!r}, which eager mode cannot quantize: it sees "
                    "outputs of modules only. Write that operation as a module (FloatFunctional for adds and "
                    "concatenations), or use toolkit='torch_ao' (FX), 'pt2e' or 'modelopt'."
                )
            source = source.all_input_nodes[0]


def _quantize_output(module: nn.Module) -> None:
    """Give a module that the toolkit leaves alone a quantizer on its output, as the toolkit does."""
    module.add_module("activation_post_process", torch_ao_qconfig(8).activation())
    _register_activation_post_process_hook(module)


def _leave_in_float(module: Any) -> None:
    """Only observe the model's output: quantized, 256 different logits would tie, and no target needs it.

    The toolkit's convert asks an observer for the range.
    """
    module.activation_post_process = MovingAverageMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
