"""Which classes ModelOpt takes, and models that it saved with more of them than it knows by itself."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

from ..._common.files import read_whole
from ..._common.one_at_a_time import one_at_a_time
from ..._common.optional import require
from ..._common.silenced import silenced
from ..._common.torch_file import load_plain
from ...errors import CheckpointError, QakdError
from ...placement.attention import open_attention
from ...placement.attention_products import PRODUCTS, insert_products
from ...placement.folded_batch_norm import fold_as_saved
from ...placement.layer_names import WEIGHTED


@contextlib.contextmanager
def registered(model: nn.Module, names: Iterable[str]) -> Iterator[list[str]]:
    """Within the block ModelOpt takes the classes of all modules of these names. Yields those that it does not take by itself.

    By itself it leaves classes out that override the forward of PyTorch's layers, and activations. Only within the block: what
    the user's own calls of ``mtq.quantize`` choose must not depend on whether this package ran before. Recurrent layers, of
    which ModelOpt makes something that can be neither copied nor exported, are left alone.
    """
    toolkit = require("modelopt.torch.quantization.nn", extra="modelopt", purpose="quantize a model")
    registry, base = toolkit.QuantModuleRegistry, toolkit.QuantInputBase
    added: list[type[nn.Module]] = []
    foreign: list[str] = []
    try:
        for name in names:
            kind = type(model.get_submodule(name))
            if kind in added:
                foreign.append(name)
            elif kind not in registry:
                foreign.append(name)
                parent = next((cls for cls in kind.__mro__ if issubclass(cls, WEIGHTED) and cls in registry), None)
                registry.register({kind: f"{kind.__module__}.{kind.__qualname__}"})(registry[parent] if parent else base)
                added.append(kind)
        with _unrecognized([module for module in model.modules() if isinstance(module, nn.RNNBase)]):
            yield foreign
    finally:
        for kind in added:
            registry.unregister(kind)


def without_prints() -> contextlib.AbstractContextManager[None]:
    """Within the block ModelOpt does not print how many quantizers it inserted."""
    return silenced("modelopt.torch.quantization.conversion")


@contextlib.contextmanager
def _unrecognized(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the modules are of a class with a forward of its own, which ModelOpt leaves alone."""
    classes: dict[nn.Module, Any] = {module: type(module) for module in modules}
    for module, kind in classes.items():
        module.__class__ = _with_own_forward(kind)
    try:
        yield
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


@cache
def _with_own_forward(kind: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


@one_at_a_time
def restore_modelopt(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Put what ``modelopt.torch.opt.save`` wrote of a model from :func:`qakd_plugin.prepare` back into its float model.

    ``modelopt.torch.opt.restore`` does the same where the model holds neither residual blocks whose sums are quantized, nor
    ``nn.MultiheadAttention``, nor attention whose products are quantized, nor frozen BatchNorms, nor recurrent layers, nor
    layers of classes that are not PyTorch's own; it knows nothing of those, and says what to call for quantizers of modules
    that it does not take.

    Args:
        model: the float model; it is not changed.
        path: of the file.

    Returns:
        A prepared copy.

    Raises:
        QakdError: the file cannot be read, is damaged, holds more than tensors and plain data, or does not fit the model.
    """
    mto = require("modelopt.torch.opt", extra="modelopt", purpose="restore a model that it saved")
    from . import restore_mode as restore_mode  # tells ModelOpt of the mode that files name

    try:
        saved = load_plain(read_whole(path))
    except (CheckpointError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QakdError(f"{path}: {reason}. Name a file of modelopt.torch.opt.save.") from error
    copied = copy.deepcopy(open_attention(model))
    try:
        weights = saved["model_state_dict"]
        fold_as_saved(copied, weights)
        names = {key.rpartition("_quantizer.")[0].rpartition(".")[0] for key in weights if "_quantizer." in key}
        insert_products(copied, _attention_of(names))
        with without_prints(), registered(copied, sorted(names - {""})):
            restored: nn.Module = mto.restore_from_modelopt_state(copied, saved["modelopt_state"])
        restored.load_state_dict(weights)
    except Exception as error:  # ModelOpt and modules fail in many ways on foreign content; all mean the same here
        reason = " ".join(str(error).split())[:300]
        raise QakdError(
            f"{path} does not fit {type(model).__name__} ({type(error).__name__}: {reason}). Pass the float network that was "
            "prepared, and a file of modelopt.torch.opt.save."
        ) from error
    return restored.eval()


def _attention_of(names: Iterable[str]) -> list[str]:
    """The modules whose products of attention have quantizers, of the names of all modules that have some."""
    products = {name.rpartition(".")[0] for name in names if name.endswith("_bmm")}
    return sorted({name.removesuffix(PRODUCTS).removesuffix(".") for name in products if name.split(".")[-1] == PRODUCTS})
