"""What this package needs to know of a quantization toolkit, and nothing more.

An adapter knows one toolkit. It knows nothing of losses, methods, ONNX or runtimes: those see a prepared model through
:class:`Adapter` alone, so that a new toolkit is one new file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ..errors import NotPreparedError
from ..quantizers import Rule
from ..quantizers.qparams import QParams
from ..tasks.inputs import Inputs

__all__ = [
    "PLACEMENT",
    "Adapter",
    "Precision",
    "QParams",
    "Quantizer",
    "Role",
    "loaded_class",
    "require_no_negative",
    "require_no_zero_gamma",
    "weight_of",
]

Role = Literal["weight", "activation", "internal"]
"""What is quantized: a layer's weight, a tensor that enters or leaves a module, or one within a module, which no other module
sees and no export form has."""


def loaded_class(module: str, name: str) -> type[nn.Module] | None:
    """A toolkit's class, if the toolkit is loaded: a model that it prepared cannot exist otherwise."""
    loaded = sys.modules.get(module)
    return None if loaded is None else getattr(loaded, name)  # type: ignore[no-any-return]


PLACEMENT = 4
"""Version of where quantizers go, so that students of earlier ones are prepared again as they were.

1: with ModelOpt, sums have none, those of 0..255 stand in front of the ReLU, and transposed convolutions have a scale per input
channel; with PT2E, what is concatenated shares none; with torch.ao FX, what was split has another one than the whole.
2: one stands between a convolution and a SiLU or the like for OpenVINO, too; with torch.ao FX, between a linear layer and one.
3: one stands between a convolution and a sum that is quantized for OpenVINO, too.
"""


@dataclass(frozen=True)
class Precision:
    """What a float model is to be prepared for; see :func:`qakd_plugin.prepare`.

    Attributes:
        weight_bits: of all layers but the first and the last.
        activation_bits: of their inputs; those of the first and the last layer take 8.
        keep: names or patterns of modules that stay in floating point; None: the heads of a detector.
        unsigned_bytes: let 8-bit activations that cannot be negative take codes 0..255, which TensorRT cannot.
        placement: where quantizers go: :data:`PLACEMENT`, or what a student's file says.
        edges: bits of the weights of the first and the last layer.
        before_activations: quantize what a convolution hands to a SiLU, GELU or the like, which OpenVINO has no use for.
        before_sums: quantize all that is added where the sum is quantized. OpenVINO adds in floating point, and has no use for
            a quantizer between a convolution and a sum, where rounding takes time.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    keep: tuple[str, ...] | None = None
    unsigned_bytes: bool = False
    placement: int = PLACEMENT
    edges: int = 8
    before_activations: bool = True
    before_sums: bool = True

    def bits_of_weight(self, edge: bool) -> int:
        """Of the first or the last layer, or of another one."""
        return self.edges if edge else self.weight_bits

    def is_unsigned(self, bits: int, non_negative: bool) -> bool:
        """Whether an activation gets an unsigned grid: below 8 bits half of a signed one would be lost."""
        return non_negative and (bits < 8 or self.unsigned_bytes)


@dataclass(frozen=True)
class Quantizer:
    """One active quantizer of a prepared model.

    Attributes:
        fqn: its dotted name in the model.
        module: the toolkit's quantizer.
        role: what it quantizes.
        layers: dotted names of the weighted layers that read its output; empty where none does, or none is known.
        layer: whose weight it quantizes; None for activations.
        after: dotted name of the weighted layer before an activation's quantizer, where the order in which modules are called
            does not tell it; else empty.
        weight: that weight as the quantizer would see it now (BatchNorm folded in where the toolkit does that).
    """

    fqn: str
    module: nn.Module
    role: Role
    layers: tuple[str, ...] = ()
    layer: nn.Module | None = None
    weight: Callable[[], Tensor] | None = None
    after: str = ""


def weight_of(layer: nn.Module) -> Callable[[], Tensor]:
    """Reads a layer's weight parameter, detached, whenever it is called."""

    def weight() -> Tensor:
        parameter = layer._parameters["weight"]
        assert parameter is not None
        return parameter.detach()

    return weight


def rows_of(layer: nn.Module) -> int:
    """Output features of a linear layer, or entries of an embedding."""
    return len(weight_of(layer)())


def require_no_zero_gamma(name: str, gamma: Tensor, function: str) -> None:
    """Refuse a BatchNorm whose gamma is 0 in some channel, where a toolkit fuses it and divides by gamma.

    Raises:
        NotPreparedError: names the layer and the channel.
    """
    zero = (gamma == 0).nonzero().flatten()
    if len(zero):
        raise NotPreparedError(
            f"{name}: its BatchNorm has gamma = 0 in channel {int(zero[0])} (zero_init_residual?), and {function} divides by "
            "it. Train the model first, set such gammas to a small number (1e-3), or use toolkit='modelopt'."
        )


def require_no_negative(name: str, minimum: float) -> None:
    """Refuse an unsigned quantizer that saw a negative value, although the network's graph says that there is none.

    Raises:
        NotPreparedError: names the quantizer.
    """
    if minimum < 0:
        raise NotPreparedError(
            f"{name}: an unsigned grid was chosen for it, because what it reads comes from a ReLU or the like, but it saw "
            f"{minimum:.3g} in calibration. Is a tensor changed in place after its ReLU? Write that operation out of place."
        )


class Adapter(Protocol):
    """One toolkit. Adapters are stateless: everything is read from the model."""

    name: str
    """The name ``prepare(toolkit=...)`` takes: "modelopt", "pt2e", "torch_ao", ..."""

    def detect(self, model: nn.Module) -> bool:
        """Whether this toolkit prepared the model. Never imports a toolkit that is not loaded already."""

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        """Every enabled quantizer once, in the order of ``named_modules``, also while :meth:`set_fake_quant` has it off."""

    def wrapper_prefix(self, model: nn.Module) -> str:
        """What the toolkit's wrapper around a model adds to the names of its layers; "" where it puts none."""

    def qparams(self, quantizer: Quantizer) -> QParams:
        """The numbers the forward pass uses now. Raises NotPreparedError when no range was calibrated."""

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        """Switch every quantizer that :meth:`quantizers` lists off (the float model) or on again, and no other."""

    def switch(self, quantizer: Quantizer, enabled: bool) -> None:
        """The same for one quantizer."""

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        """Stop (or let go on) whatever updates ranges during forward passes."""

    def has_frozen_ranges(self, model: nn.Module) -> bool:
        """Whether :meth:`freeze_ranges` has stopped something that it would let go on."""

    def set_mode(self, model: nn.Module, training: bool) -> None:
        """``model.train(training)`` as the toolkit wants it done."""

    def configuration(self, model: nn.Module, precision: Precision) -> Any:
        """What :meth:`prepare` hands to the toolkit; see :func:`qakd_plugin.configuration`."""

    def prepare(self, model: nn.Module, example: Inputs, batches: Iterator[Inputs], precision: Precision) -> nn.Module:
        """A prepared and calibrated copy of a float model, in eval mode; see :func:`qakd_plugin.prepare`.

        Args:
            model: the float model.
            example: inputs to trace it with.
            batches: inputs of all calibration batches, which come once; ``example`` is the first.
            precision: what is asked for.
        """

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        """Let a learned quantizer work in the place of the toolkit's own.

        Args:
            model: that holds it.
            quantizer: from :meth:`quantizers`.
            rule: what the learned one computes.
            clip: for :meth:`Rule.install`; () per tensor, (C,) per channel of ``rule.axis``, or one per block, row by row.
        """

    def uninstall(self, model: nn.Module, quantizer: Quantizer) -> None:
        """Put the toolkit's own quantizer back, with the learned numbers, and weights as they were quantized if need be."""

    def learned(self, quantizer: Quantizer) -> Rule | None:
        """The rule of a quantizer that was installed, or None."""

    def export_form(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode that computes the same with stored integer weights and ``qakd::qdq`` / ``qakd::dq`` only."""
