"""Learned quantizers in the shape torch.ao and torchao expect of a fake-quantizer.

Both toolkits have a class ``FakeQuantizeBase``; the classes are unrelated but look alike.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedQuantizerError
from ..quantizers import Rule


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
            self.train(original.training)

        @property
        def scale(self) -> Tensor:
            return self.rule.scale(self).reshape(-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.rule(x, self) if self.fake_quant_enabled[0] == 1 else x

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
