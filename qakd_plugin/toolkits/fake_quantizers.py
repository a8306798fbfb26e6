"""What adapters share: fake-quantizers with torch.ao's methods, which torchao's PT2E took over, and learned ones like them.

Both toolkits have a class ``FakeQuantizeBase``; the classes are unrelated but look alike.
"""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotPreparedError, UnsupportedQuantizerError
from ..placement.calibration import RangeObserver, observe_inputs
from ..quantizers import Rule
from ..tasks.inputs import Inputs
from .adapter import Adapter, Quantizer

_log = logging.getLogger(__name__)

_PAUSED = "_qakd_paused"


def set_paused(quantizer: nn.Module, paused: bool) -> None:
    """Remember that ``set_fake_quant`` switched a quantizer off, and not the user; nothing stays in a toolkit's state."""
    if paused:
        setattr(quantizer, _PAUSED, True)
    else:
        quantizer.__dict__.pop(_PAUSED, None)


def is_paused(quantizer: nn.Module) -> bool:
    """Whether ``set_fake_quant`` switched a quantizer off."""
    return _PAUSED in quantizer.__dict__


class FakeQuantizeAdapter(ABC):
    """The part of an adapter that fake-quantizers with torch.ao's methods have in common."""

    @abstractmethod
    def quantizer_class(self) -> Any:
        """The toolkit's class ``FakeQuantizeBase``."""

    def fake_quantizers(self, model: nn.Module) -> list[Any]:
        """All of the toolkit's fake-quantizers, also those that the user switched off."""
        return [module for module in model.modules() if isinstance(module, self.quantizer_class())]

    def wrapper_prefix(self, model: nn.Module) -> str:
        return ""

    def set_fake_quant(self, model: nn.Module, enabled: bool) -> None:
        for q in self.fake_quantizers(model):
            if is_active(q):
                _switch(q, enabled)

    def switch(self, quantizer: Quantizer, enabled: bool) -> None:
        _switch(quantizer.module, enabled)

    def freeze_ranges(self, model: nn.Module, frozen: bool) -> None:
        for q in self.fake_quantizers(model):
            if frozen:
                if not hasattr(q, "_qakd_observed"):
                    q._qakd_observed = bool(q.observer_enabled[0])
                q.enable_observer(False)
            elif hasattr(q, "_qakd_observed"):  # an observer the user switched off stays off
                q.enable_observer(q._qakd_observed)
                del q._qakd_observed

    def has_frozen_ranges(self, model: nn.Module) -> bool:
        return any(hasattr(q, "_qakd_observed") for q in self.fake_quantizers(model))

    def install(self, model: nn.Module, quantizer: Quantizer, rule: Rule, clip: Tensor) -> None:
        clip = per_channel(clip, rule, quantizer)
        substitute(model, quantizer.module, learned_fake_quantize(self.quantizer_class(), rule, clip, quantizer.module))

    def learned(self, quantizer: Quantizer) -> Rule | None:
        return rule_of(quantizer.module)


def _switch(fake_quantizer: Any, enabled: bool) -> None:
    fake_quantizer.enable_fake_quant(enabled)
    set_paused(fake_quantizer, not enabled)


def is_active(fake_quantizer: Any) -> bool:
    """Whether a fake-quantizer is on, or was until ``set_fake_quant`` paused it: not one that the user switched off."""
    return bool(fake_quantizer.fake_quant_enabled[0]) or is_paused(fake_quantizer)


def require_calibrated(quantizer: Quantizer, toolkit: str) -> None:
    """Refuse a fake-quantizer whose observer needs a tensor and has seen none.

    Raises:
        NotPreparedError: names the quantizer.
    """
    observer: Any = getattr(quantizer.module, "activation_post_process", None)
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if low is None or high is None:
        return
    if low.numel() == 0 or not bool(torch.all(torch.isfinite(low) & torch.isfinite(high))):
        raise NotPreparedError(
            f"{quantizer.fqn} has no calibrated range: its observer never saw a batch. Run the prepared model on several "
            f"batches, or prepare it with qakd_plugin.prepare(model, calibration_batches, toolkit={toolkit!r})."
        )


@torch.no_grad()
def observe_unquantized(
    adapter: Adapter,
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    batches: Iterable[Inputs],
    clamps: Mapping[str, tuple[float, float] | None],
    groups: Mapping[str, str] | None = None,
) -> dict[str, RangeObserver]:
    """What reaches some quantizers (or the places of some) while all of them are off; arguments as ``observe_inputs``."""
    adapter.set_fake_quant(model, False)
    observers = observe_inputs(model, watched, batches, clamps, groups)
    adapter.set_fake_quant(model, True)
    return observers


def dead_activations(observers: Mapping[str, RangeObserver]) -> set[str]:
    """Quantizers that saw only zeros in calibration, which have no range and are to be left off; a warning names them.

    Raises:
        NotPreparedError: all of them did.
    """
    dead = [name for name, observer in observers.items() if observer.maximum == 0]
    if dead and len(dead) == len(observers):
        raise NotPreparedError(f"{dead[0]} and all other activations saw only zeros during calibration: use real batches.")
    if dead:
        _log.warning(
            "%s saw only zeros during calibration: what is read there stays in floating point. If these layers are not meant "
            "to be silent, calibrate on real batches; keep=(...) leaves them in floating point as a whole.",
            ", ".join(dead),
        )
    return set(dead)


@torch.no_grad()
def set_range(fake_quantizer: Any, clip: Tensor) -> None:
    """Give a fake-quantizer per tensor, whose observer goes on from there, a symmetric range, or one from 0 on."""
    observer = fake_quantizer.activation_post_process
    observer.min_val.resize_(()).copy_(-clip if observer.quant_min < 0 else 0)
    observer.max_val.resize_(()).copy_(clip)
    scale, zero_point = fake_quantizer.calculate_qparams()
    fake_quantizer.scale.copy_(scale)
    fake_quantizer.zero_point.copy_(zero_point)


def per_channel(clip: Tensor, rule: Rule, quantizer: Quantizer) -> Tensor:
    """A clipping range (C,) in the shape in which it broadcasts with the weight; one per tensor as it is."""
    if rule.axis is None:
        return clip
    assert quantizer.weight is not None
    return clip.reshape([-1 if dim == rule.axis else 1 for dim in range(quantizer.weight().ndim)])


def learned_fake_quantize(base: Any, rule: Rule, clip: Tensor, original: nn.Module) -> nn.Module:
    """A fake-quantizer of class ``base`` that carries out ``rule`` in the place of ``original``."""
    made: nn.Module = _class(base)(rule, clip, original)
    return made


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a learned fake-quantizer; None for the toolkit's own."""
    rule = getattr(module, "rule", None)
    return rule if isinstance(rule, Rule) else None


def substitute(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one quantizer in every place of another."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)


@cache
def _class(base: Any) -> type[nn.Module]:
    class LearnedFakeQuantize(base):  # type: ignore[misc]
        """Fake-quantizes by a rule whose tensors it holds."""

        def __init__(self, rule: Rule, clip: Tensor, original: Any) -> None:
            super().__init__()
            self.rule = rule
            self.originals = [original]  # in a list: not a submodule, and not in the state
            per_channel = rule.axis is not None
            self.ch_axis = rule.axis if per_channel else -1
            self.is_per_channel = per_channel
            self.qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
            self.dtype = original.dtype
            self.is_dynamic = False
            self.quant_min, self.quant_max = rule.codes
            self.fake_quant_enabled.copy_(original.fake_quant_enabled)
            self.register_buffer("zero_point", torch.zeros(clip.numel(), dtype=torch.int32, device=clip.device))
            rule.install(self, clip)
            # Weak, so that a copy of this module, whose flag is another tensor, starts without.
            self._flag_read: tuple[weakref.ref[Tensor], int, bool] | None = None
            self.train(original.training)

        @property
        def scale(self) -> Tensor:
            return self.rule.scale(self).reshape(-1)

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():  # to which a value that is read is the end of a graph
                return torch.where(self.fake_quant_enabled == 1, self.rule(x, self), x)
            return self.rule(x, self) if self._is_on() else x

        def _is_on(self) -> bool:
            """The flag, read again only once somebody has written to it: on a GPU a look at it waits for all that is queued."""
            flag: Tensor = self.fake_quant_enabled
            if flag.is_inference():  # which counts no writes
                return bool(flag[0] == 1)
            if self._flag_read is None or self._flag_read[0]() is not flag or self._flag_read[1] != flag._version:
                self._flag_read = weakref.ref(flag), flag._version, bool(flag[0] == 1)
            return self._flag_read[2]

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            """What the toolkit's ``convert`` asks for."""
            if self.rule.transforms_weight:
                raise UnsupportedQuantizerError(
                    f"{type(self.rule).__name__} does more to a weight than clip and round, which the toolkit's convert cannot "
                    "repeat. Call qakd_plugin.restore_quantizers(model) first: it stores the weights as they were quantized."
                )
            return self.scale, self.zero_point

        def extra_repr(self) -> str:
            return f"{self.rule}, scale={self.scale.mean():.4g}"

    return LearnedFakeQuantize


def restored_fake_quantize(learned: Any, fake_quantize: Any, fixed_observer: Any) -> nn.Module:
    """The toolkit's own fake-quantizer with the numbers that were learned, which it keeps.

    Args:
        learned: from :func:`learned_fake_quantize`.
        fake_quantize: the toolkit's class ``FakeQuantize``.
        fixed_observer: the toolkit's class ``FixedQParamsObserver``.
    """
    rule: Rule = learned.rule
    low, high = rule.codes
    scale = learned.scale.detach().clone()
    made = fake_quantize(
        observer=fixed_observer,
        quant_min=low,
        quant_max=high,
        scale=1.0,
        zero_point=0,
        dtype=torch.quint8 if high > 127 else torch.qint8,
        qscheme=learned.qscheme,
    ).to(scale.device)
    made.ch_axis = learned.ch_axis
    for module in (made, made.activation_post_process):
        module.register_buffer("scale", scale.clone())
        module.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int32))
    made.fake_quant_enabled.copy_(learned.fake_quant_enabled)
    made.train(learned.training)
    restored: nn.Module = made
    return restored
