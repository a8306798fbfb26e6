"""torch.ao eager mode: models prepared by ``torch.ao.quantization.prepare_qat``.

Facts of the toolkit that shape this file: a forward hook runs a module's output through its child
``activation_post_process``; functional operators are invisible to it, so adds and concatenations are quantized only where the
model is written with ``FloatFunctional``; inputs are quantized by a ``QuantStub``.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..._common.module_mode import eval_mode
from ...errors import QakdError
from ...placement.placement import GRID_KEEPING, Placement, non_negative, place_quantizers
from ..adapter import Precision
from .fx import (
    QAT_LAYERS,
    TorchAOAdapter,
    calibrate,
    fixed_fake_quantize,
    require_signed_bytes,
    torch_ao_qconfig,
    unsigned_byte,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.ao.nn.quantized import FloatFunctional
    from torch.ao.quantization import MovingAverageMinMaxObserver, QuantStub, QuantWrapper, fuse_modules_qat, prepare_qat
    from torch.ao.quantization.fake_quantize import FakeQuantizeBase
    from torch.ao.quantization.quantize import _register_activation_post_process_hook

_KEEP_GRID = {torch.flatten, torch.reshape, torch.squeeze, torch.nn.functional.max_pool2d,
              "flatten", "reshape", "view", "squeeze", "contiguous"}  # fmt: skip
_RELU = {torch.relu, torch.nn.functional.relu, "relu"}


class TorchAOEagerAdapter(TorchAOAdapter):
    """Adapter for ``prepare_qat``."""

    name = "torch_ao_eager"

    def detect(self, model: nn.Module) -> bool:
        return not isinstance(model, fx.GraphModule) and any(isinstance(m, FakeQuantizeBase) for m in model.modules())

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
        found: dict[str, Any] = {}
        for name, module in model.named_modules():
            bits = precision.weight_bits if name in placement.layers and name not in placement.edges else 8
            if name in placement.layers or isinstance(module, FloatFunctional | QuantStub):
                found[name] = torch_ao_qconfig(bits)
        return found

    def prepare(self, model: nn.Module, batches: Sequence[Tensor], precision: Precision) -> nn.Module:
        placement = place_quantizers(model, precision.keep)
        plan = _Plan(model, placement)
        prepared: nn.Module = copy.deepcopy(model).train()
        if plan.fusions:
            prepared = fuse_modules_qat(prepared, plan.fusions)
        for name, module in prepared.named_modules():
            # A fused layer stands where its convolution or linear layer stood, and holds it as a child.
            layer = next((part for part in (name, name.rpartition(".")[0]) if part in placement.layers), None)
            wanted = layer is not None or isinstance(module, FloatFunctional | QuantStub)
            bits = precision.weight_bits if layer is not None and layer not in placement.edges else 8
            module.qconfig = torch_ao_qconfig(bits) if wanted else None  # type: ignore[assignment]
        prefix = ""
        if not any(isinstance(module, QuantStub) for module in model.modules()):
            prepared, prefix = QuantWrapper(prepared), "module."
            prepared.quant.qconfig = torch_ao_qconfig(8)  # type: ignore[union-attr, assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the toolkit announces its migration, and a default that changed years ago
            prepared = prepare_qat(prepared.train(), inplace=True)
        for name in plan.between:
            _quantize_output(prepared.get_submodule(prefix + name))
        for name in plan.last:
            _leave_in_float(prepared.get_submodule(prefix + name))
        if precision.unsigned_bytes:
            for name in [name for name, holds in plan.non_negative.items() if holds]:
                holder: Any = prepared.get_submodule(prefix + name)
                holder.activation_post_process = unsigned_byte(holder.activation_post_process)
        low_bit: dict[str, tuple[int, int]] = {}
        if precision.activation_bits < 8:
            for name, unsigned in plan.only_read_by_inner_layers.items():
                limit = 2 ** (precision.activation_bits - 1)
                low, high = (0, 2 * limit - 1) if unsigned else (-limit, limit - 1)
                quantizer = f"{prefix}{name}.activation_post_process"
                low_bit[quantizer] = low, high
                # A placeholder of the right grid; its range is calibrated below.
                holder = prepared.get_submodule(prefix + name)
                holder.activation_post_process = fixed_fake_quantize(1.0, low, high, batches[0].device)
        calibrate(self, prepared.eval(), batches, low_bit)
        return prepared


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
        with eval_mode(model):
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
            user = _only_user(chain[-1])
            module = None if user is None or user.op != "call_module" else self.modules[str(user.target)]
            # A ReLU that is called in several places cannot become part of one layer.
            if user is not None and isinstance(module, kind) and self._calls[user.target] == 1:
                chain.append(user)
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
            module = self.modules.get(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, GRID_KEEPING) or user.target in _KEEP_GRID | _RELU:
                yield from self._readers(user)
            else:
                yield user

    def _require_quantized_input(self, layer: fx.Node) -> None:
        source = layer.all_input_nodes[0]
        while source not in self._quantized:
            module = self.modules.get(str(source.target)) if source.op == "call_module" else None
            keeps = isinstance(module, GRID_KEEPING) or source.target in _KEEP_GRID | _RELU
            if module is not None and not keeps:
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
    """Give a module that the toolkit leaves alone a quantizer behind it, as the toolkit does."""
    module.add_module("activation_post_process", torch_ao_qconfig(8).activation())
    _register_activation_post_process_hook(module)


def _leave_in_float(module: Any) -> None:
    """Only observe the model's output: quantized, 256 different logits would tie, and no target needs it.

    The toolkit's convert asks an observer for the range.
    """
    module.activation_post_process = MovingAverageMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None
