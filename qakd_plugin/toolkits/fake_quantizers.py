"""Switches of fake-quantizers with torch.ao's methods; torchao's PT2E took them over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class FakeQuantizeSwitches(ABC):
    """The part of an adapter that turns quantization and observers on and off."""

    @abstractmethod
    def fake_quantizers(self, model: nn.Module) -> list[Any]:
        """All of the toolkit's fake-quantizers, also those that the user switched off."""

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        for q in self.fake_quantizers(model):
            if is_active(q):
                q.enable_fake_quant(enabled)
                q._qakd_paused = not enabled

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        for q in self.fake_quantizers(model):
            if frozen:
                if not hasattr(q, "_qakd_observed"):
                    q._qakd_observed = bool(q.observer_enabled[0])
                q.enable_observer(False)
            elif hasattr(q, "_qakd_observed"):  # an observer the user switched off stays off
                q.enable_observer(q._qakd_observed)
                del q._qakd_observed


def is_active(fake_quantizer: Any) -> bool:
    """Whether a fake-quantizer is on, or was until ``set_fake_quant`` paused it: not one that the user switched off."""
    return bool(fake_quantizer.fake_quant_enabled[0]) or getattr(fake_quantizer, "_qakd_paused", False)
