"""What this package needs to know of a quantization toolkit, and nothing more.

An adapter knows one toolkit. It knows nothing of losses, methods, ONNX or runtimes: those see a prepared model through
:class:`Adapter` alone, so that a new toolkit is one new file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from ..qparams import QParams

__all__ = ["Adapter", "QParams", "Quantizer", "Role"]

Role = Literal["weight", "activation"]


@dataclass(frozen=True)
class Quantizer:
    """One active quantizer of a prepared model: ``fqn`` is its dotted name in the model."""

    fqn: str
    module: nn.Module
    role: Role


class Adapter(Protocol):
    """One toolkit. Adapters are stateless: everything is read from the model."""

    name: str
    """The name ``prepare(toolkit=...)`` takes: "modelopt", "pt2e", "torch_ao", ..."""

    def detect(self, model: nn.Module) -> bool:
        """Whether this toolkit prepared the model. Never imports a toolkit that is not loaded already."""

    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        """Every enabled quantizer, each once, in the order of ``named_modules``."""

    def qparams(self, quantizer: Quantizer) -> QParams:
        """The numbers the forward pass uses now. Raises NotPreparedError when no range was calibrated."""

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        """Switch every quantizer that :meth:`quantizers` lists off (the float model) or on again."""

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        """Stop (or let go on) whatever updates ranges during forward passes."""

    def set_mode(self, model: nn.Module, training: bool) -> None:
        """``model.train(training)`` as the toolkit wants it done."""

    def prepare(
        self, model: nn.Module, batches: Sequence[Tensor], weight_bits: int, activation_bits: int, keep: Sequence[str]
    ) -> nn.Module:
        """A prepared and calibrated copy of a float model, in eval mode; see :func:`qakd_plugin.prepare`."""

    def export_form(self, model: nn.Module) -> nn.Module:
        """A copy in eval mode that computes the same with stored integer weights and ``qakd::qdq`` / ``qakd::dq`` only."""
