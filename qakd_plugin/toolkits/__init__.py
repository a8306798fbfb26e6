"""Toolkit adapters: what prepared this model, and how it is handled.

Nothing of a toolkit is imported before a model that it prepared is met, or ``prepare`` is asked for it by name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from .._common.module_copy import uncompiled
from ..errors import MissingPackageError, NotPreparedError, QakdError
from .adapter import PLACEMENT, Adapter, Precision, QParams, Quantizer, Role, loaded_class

__all__ = ["PLACEMENT", "TOOLKITS", "Adapter", "Precision", "QParams", "Quantizer", "Role", "adapter_for", "adapter_named"]


@dataclass(frozen=True)
class _Toolkit:
    """Where an adapter and the class of its toolkit's quantizers are defined: module and name."""

    adapter: tuple[str, str]
    quantizer: tuple[str, str]


_TABLE = {
    "modelopt": _Toolkit(
        (".modelopt.adapter", "ModelOptAdapter"),
        ("modelopt.torch.quantization.nn.modules.tensor_quantizer", "TensorQuantizer"),
    ),
    "pt2e": _Toolkit((".pt2e.adapter", "PT2EAdapter"), ("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase")),
    "torchao": _Toolkit(
        (".torchao_qat", "TorchAOQATAdapter"), ("torchao.quantization.qat.fake_quantizer", "FakeQuantizerBase")
    ),
    "torch_ao": _Toolkit((".torch_ao.fx", "TorchAOAdapter"), ("torch.ao.quantization.fake_quantize", "FakeQuantizeBase")),
    "torch_ao_eager": _Toolkit(
        (".torch_ao.eager", "TorchAOEagerAdapter"), ("torch.ao.quantization.fake_quantize", "FakeQuantizeBase")
    ),
}

TOOLKITS = tuple(_TABLE)
"""The names that ``prepare(toolkit=...)`` takes."""


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of the toolkit that prepared ``model``.

    Raises:
        NotPreparedError: no quantizer of a known toolkit was found in it.
    """
    if uncompiled(model) is not model:
        raise NotPreparedError(
            "prepared_model is what torch.compile made: pass the network that was compiled, prepared_model._orig_mod. Both "
            "hold the same weights."
        )
    wrapped = None
    for name, toolkit in _TABLE.items():
        quantizer = loaded_class(*toolkit.quantizer)
        if quantizer is None or not any(isinstance(module, quantizer) for module in model.modules()):
            continue
        adapter = adapter_named(name)
        if adapter.detect(model):
            return adapter
        wrapped = wrapped or next((name for name, module in model.named_modules() if name and adapter.detect(module)), None)
    if wrapped is not None:
        raise NotPreparedError(
            f"prepared_model ({type(model).__name__}) wraps {wrapped}, which was prepared as a graph of its own. Pass that, "
            f"prepared_model.get_submodule({wrapped!r}), and do what is around it in batch_fn, or prepare the whole."
        )
    raise NotPreparedError(
        f"prepared_model ({type(model).__name__}) holds no quantizer of {' or '.join(TOOLKITS)}: it looks "
        "like a float model. Prepare it with its toolkit first, or with qakd_plugin.prepare(model, calibration_batches)."
    )


@cache
def adapter_named(name: str) -> Adapter:
    """The adapter that ``prepare(toolkit=name)`` uses.

    Raises:
        QakdError: there is none of this name.
        MissingPackageError: PyTorch has the toolkit no more.
    """
    if name not in _TABLE:
        raise QakdError(f"toolkit={name!r} is unknown: use one of {list(TOOLKITS)}.")
    home, adapter = _TABLE[name].adapter
    try:
        module = importlib.import_module(home, __package__)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"toolkit={name!r} needs {error.name}, which PyTorch {torch.__version__} does not have. Use toolkit='pt2e' or "
            "'modelopt'."
        ) from error
    made: Adapter = getattr(module, adapter)()
    return made
