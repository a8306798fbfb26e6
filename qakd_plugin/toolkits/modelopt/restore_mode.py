"""What ModelOpt's own record of a model says of quantizers that its ``restore`` does not know by itself.

ModelOpt lists what was done to a model as modes, which a file holds and ``modelopt.torch.opt.restore`` goes through. One more,
ahead of all others, makes it say what to call instead; where this package is not imported, by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modelopt.torch.opt import apply_mode
from modelopt.torch.opt.config import ModeloptBaseConfig
from modelopt.torch.opt.mode import ModeDescriptor
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.nn import QuantModuleRegistry
from torch import nn

from ...errors import NotPreparedError

_MODE = "qakd_plugin.restore_modelopt"


@QuantizeModeRegistry.register_mode
class RestoreModeDescriptor(ModeDescriptor):  # type: ignore[misc]
    """Changes nothing; restoring asks whether ModelOpt takes the classes of the modules that have quantizers."""

    @property
    def name(self) -> str:
        return _MODE

    @property
    def config_class(self) -> type[ModeloptBaseConfig]:
        return ModeloptBaseConfig  # type: ignore[no-any-return]

    @property
    def convert(self) -> Callable[..., tuple[nn.Module, dict[str, Any]]]:
        return _noted

    @property
    def restore(self) -> Callable[..., nn.Module]:
        return _known


def require_our_restore(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Note in ModelOpt's record that modules of these names are of classes that it takes only with our help."""
    noted: nn.Module = apply_mode(model, [(_MODE, {})], mode_kwargs=[{"modules": list(names)}])
    return noted


def _noted(model: nn.Module, config: ModeloptBaseConfig, modules: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    return model, {"modules": list(modules)}


def _known(model: nn.Module, config: ModeloptBaseConfig, metadata: dict[str, Any]) -> nn.Module:
    found = dict(model.named_modules())
    for name in metadata["modules"]:
        if name not in found or type(found[name]) not in QuantModuleRegistry:
            raise NotPreparedError(
                f"{name}: mto.restore does not know this module's quantizer, which qakd_plugin.prepare put there. Call "
                "qakd_plugin.restore_modelopt(float_model, path) in its place."
            )
    return model
