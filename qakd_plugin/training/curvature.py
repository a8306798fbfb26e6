"""When EWGS's delta, the curvature of the loss, is due to be estimated anew."""

from __future__ import annotations

import logging

from torch import nn

from ..toolkits import Adapter

_log = logging.getLogger(__name__)


def refreshes(adapter: Adapter, model: nn.Module) -> bool:
    """Whether some quantizer ever wants a new delta."""
    return bool(_periods(adapter, model))


def is_due(adapter: Adapter, model: nn.Module, epoch: int) -> bool:
    """Whether some quantizer wants a new delta before this epoch."""
    return any(epoch % period == 0 for period in _periods(adapter, model))


def warn_of_no_refresh(adapter: Adapter, model: nn.Module, loop: str) -> None:
    """Warn where quantizers want a new delta now and then, and ``loop`` never gives them one."""
    if periods := _periods(adapter, model):
        _log.warning(
            "EWGS: %s never refreshes delta, which stays as it is although refresh_every=%d. Call "
            "qakd_plugin.quantizers.refresh_delta every so many epochs, set refresh_every=0 with a delta of your own, or train "
            "with qakd.distill.",
            loop,
            min(periods),
        )


def _periods(adapter: Adapter, model: nn.Module) -> set[int]:
    """Epochs between refreshes; empty where nothing is to be refreshed."""
    rules = [adapter.learned(quantizer) for quantizer in adapter.quantizers(model)]
    return {getattr(rule, "refresh_every", 0) for rule in rules} - {0}
