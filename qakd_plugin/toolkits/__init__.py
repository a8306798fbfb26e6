"""Toolkit adapters: what prepared this model, and how it is handled."""

from __future__ import annotations

from torch import nn

from ..errors import NotPreparedError
from .adapter import Adapter, Precision, QParams, Quantizer, Role
from .modelopt.adapter import ModelOptAdapter
from .pt2e.adapter import PT2EAdapter
from .torch_ao.eager import TorchAOEagerAdapter
from .torch_ao.fx import TorchAOAdapter
from .torchao_qat import TorchAOQATAdapter

__all__ = ["ADAPTERS", "Adapter", "Precision", "QParams", "Quantizer", "Role", "adapter_for"]

ADAPTERS: tuple[Adapter, ...] = (
    ModelOptAdapter(),
    PT2EAdapter(),
    TorchAOQATAdapter(),
    TorchAOAdapter(),
    TorchAOEagerAdapter(),
)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the toolkit that prepared ``model``.

    Raises:
        NotPreparedError: no quantizer of a known toolkit was found in it.
    """
    for adapter in ADAPTERS:
        if adapter.detect(model):
            return adapter
    raise NotPreparedError(
        f"prepared_model ({type(model).__name__}) holds no quantizer of {' or '.join(a.name for a in ADAPTERS)}: it looks "
        "like a float model. Prepare it with its toolkit first, or with qakd_plugin.prepare(model, calibration_batches)."
    )
