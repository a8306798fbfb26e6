"""Switches of fake-quantizers with torch.ao's methods; torchao's PT2E took them over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from .base import Quantizer


class FakeQuantizeSwitches(ABC):
    """The part of an adapter that turns quantization and observers on and off."""

    @abstractmethod
    def quantizers(self, model: nn.Module) -> list[Quantizer]:
        """All quantizers of a prepared model."""

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        for quantizer in self.quantizers(model):
            quantizer.module.enable_fake_quant(enabled)  # type: ignore[operator]

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        for quantizer in self.quantizers(model):
            q: Any = quantizer.module
            if frozen:
                if not hasattr(q, "_qakd_observed"):
                    q._qakd_observed = bool(q.observer_enabled[0])
                q.enable_observer(False)
            elif hasattr(q, "_qakd_observed"):  # an observer the user switched off stays off
                q.enable_observer(q._qakd_observed)
                del q._qakd_observed
