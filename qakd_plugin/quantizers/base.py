"""What one learned quantizer computes, apart from where its numbers are kept.

A rule is plain data. Its tensors are registered on a module of the toolkit (the *holder*), so that the toolkit's own way to
save, move and copy a model takes them along.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..errors import QakdError
from .fake_quantize import fake_quantize, lsq_gradient_scale
from .qparams import QParams

PREFIX = "qakd_"
"""Of the names of all tensors on a holder."""

LOG_SCALE = PREFIX + "log_scale"
"""Name of the tensor on a holder that is the logarithm of the scale. Scales learned so stay positive, and a learning rate means
a relative change."""

DELTA = PREFIX + "delta"
"""Name of EWGS's delta on a holder."""


@dataclass(frozen=True)
class Rule(ABC):
    """One quantizer.

    Attributes:
        bits: of a code.
        axis: channel dimension of a weight with one scale per channel; None per tensor.
        block: set where each row that is quantized is a block of a linear layer's weight: its length. ``axis`` is 0 then.
        method: LSQ, PACT, DoReFa or EWGS, for people.
    """

    bits: int
    axis: int | None = None
    block: int | None = None
    method: str = ""

    transforms_weight: ClassVar[bool] = False
    """Whether more happens to a weight than clipping and rounding: then a toolkit's own quantizer cannot repeat it."""

    @property
    @abstractmethod
    def codes(self) -> tuple[int, int]:
        """Lowest and highest integer code of the exported quantizer."""

    @property
    def code_step(self) -> int:
        """Distance of neighbouring codes: 2 for grids without a zero."""
        return 1

    @property
    def levels(self) -> tuple[float, float, float]:
        """Lowest and highest code in steps of the grid, and its shift: arguments of ``fake_quantize``."""
        low, high = self.codes
        step = self.code_step
        return low / step, high / step, high / step if step > 1 else 0.0

    @abstractmethod
    def install(self, holder: nn.Module, clip: Tensor) -> None:
        """Register parameters and buffers on ``holder``.

        Args:
            holder: without tensors of another rule.
            clip: float32, positive: the largest magnitude to represent; 0-d, or broadcastable with one value per channel.
        """

    @abstractmethod
    def quantize(self, x: Tensor, holder: nn.Module) -> Tensor:
        """Fake-quantize ``x`` in float32; what comes out has the type of ``x``."""

    def scale(self, holder: nn.Module) -> Tensor:
        """Step between neighbouring integer codes of the exported quantizer, in the shape the holder keeps."""
        log_scale: Tensor = getattr(holder, LOG_SCALE)
        return log_scale.detach().exp() / self.code_step

    def __call__(self, x: Tensor, holder: nn.Module) -> Tensor:
        """Fake-quantize in float32, whatever autocast does around it; what comes out has the type of ``x``."""
        with torch.autocast(x.device.type, enabled=False):
            return self.quantize(x, holder)

    def qparams(self, holder: nn.Module, out_features: int | None = None) -> QParams:
        """The exact numbers of the grid, zero point 0.

        Args:
            holder: of the tensors.
            out_features: of the layer, where its weight comes in blocks.
        """
        scale, axis = self.scale(holder), self.axis
        if self.block is not None:
            assert out_features is not None
            scale, axis = scale.reshape(out_features, -1), 1
        else:
            scale = scale.reshape(()) if axis is None else scale.reshape(-1)
        return QParams(
            scale=scale,
            zero_point=torch.zeros_like(scale, dtype=torch.int32),
            quant_min=self.codes[0],
            quant_max=self.codes[1],
            axis=axis,
            block=self.block,
            code_step=self.code_step,
        )

    def parameters(self, holder: nn.Module) -> list[nn.Parameter]:
        """What is learned on ``holder``, as logarithms or ratios: a learning rate means a relative change."""
        return [
            parameter for name, parameter in holder._parameters.items() if parameter is not None and name.startswith(PREFIX)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data from which :func:`rule_from_dict` makes the rule again."""
        return {"rule": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class ClippedActivation(Rule):
    """Activations of all four quantizers: clip to a symmetric or unsigned range, round.

    Attributes:
        unsigned: codes 0..2^b-1; TensorRT takes those below 8 bits only.
        learns: "step" (LSQ, EWGS: rounding errors count), "clip" (PACT: clipped values count), or "nothing" (DoReFa).
        full_range: -2^(b-1) is a code of the signed grid (LSQ); without it the clipping range is symmetric.
        delta: EWGS's backward pass, with this delta until it is first refreshed; None for straight-through.
        refresh_every: epochs between refreshes of delta; 0 never.
        decay: of the squared clipping range (PACT).
    """

    unsigned: bool = False
    learns: str = "step"
    full_range: bool = True
    delta: float | None = None
    refresh_every: int = 0
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.bits == 1 and not self.unsigned:
            raise QakdError(
                "activation_bits=1 is defined for activations that cannot be negative only: a signed grid of one bit has no "
                "positive code. Use 2 bits, or keep this quantizer as it is (keep=...)."
            )

    @property
    def codes(self) -> tuple[int, int]:
        if self.unsigned:
            return 0, 2**self.bits - 1
        limit = 2 ** (self.bits - 1)
        return -limit if self.full_range else 1 - limit, limit - 1

    def install(self, holder: nn.Module, clip: Tensor) -> None:
        log_scale = torch.log(clip.detach().float() / self.codes[1])
        if self.learns == "nothing":
            holder.register_buffer(LOG_SCALE, log_scale)
        else:
            holder.register_parameter(LOG_SCALE, nn.Parameter(log_scale))
        if self.delta is not None:
            holder.register_buffer(DELTA, torch.tensor(self.delta, device=clip.device))

    def quantize(self, x: Tensor, holder: nn.Module) -> Tensor:
        low, high = self.codes
        log_scale: Tensor = getattr(holder, LOG_SCALE)
        # LSQ counts features of one sample: the gradient is a mean over the batch already.
        elements = x.numel() // max(1, x.shape[0] if x.ndim else 1)
        return fake_quantize(
            x,
            log_scale.exp(),
            low,
            high,
            delta=getattr(holder, DELTA, None),
            gradient_scale=lsq_gradient_scale(elements, high) if self.learns == "step" else 1.0,
            through_rounding=self.learns == "step",
            decay=self.decay,
        )


class QuantizerConfig(Protocol):
    """LSQ, PACT, DoReFa or EWGS: a frozen dataclass that makes the rule of each quantizer."""

    @property
    def weight_bits(self) -> int | None:
        """Of all weights that are swapped; None keeps what each has."""

    @property
    def activation_bits(self) -> int | None:
        """Of all activations that are swapped; None keeps what each has."""

    @property
    def per_channel(self) -> bool:
        """One scale per output channel of a weight, or one for all."""

    def weight_rule(self, bits: int, axis: int | None, block: int | None) -> Rule:
        """The rule of one weight."""

    def activation_rule(self, bits: int, unsigned: bool) -> Rule:
        """The rule of one activation."""


def check_bits(config: QuantizerConfig, lowest_weight_bits: int) -> None:
    """Raise QakdError unless the numbers of bits are ones the quantizer is defined for."""
    name = type(config).__name__
    for argument, bits, lowest in (
        ("weight_bits", config.weight_bits, lowest_weight_bits),
        ("activation_bits", config.activation_bits, 1),
    ):
        if bits is not None and not (isinstance(bits, int) and lowest <= bits <= 8):
            raise QakdError(f"{name}: {argument}={bits!r} is out of range: it must be {lowest} to 8.")


def rule_from_dict(data: dict[str, Any]) -> Rule:
    """The inverse of :meth:`Rule.as_dict`; equal data give the same rule, because toolkits ask in every forward pass."""
    return _rule(tuple(data.items()))


@cache
def _rule(items: tuple[tuple[str, Any], ...]) -> Rule:
    fields = dict(items)
    name = fields.pop("rule")
    made: Rule = _classes()[name](**fields)
    return made


def remove_tensors(holder: nn.Module) -> None:
    """Take everything a rule registered off a holder."""
    for tensors in (holder._parameters, holder._buffers):
        for name in [name for name in tensors if name.startswith(PREFIX)]:
            delattr(holder, name)


def _classes() -> dict[str, type[Rule]]:
    found: dict[str, type[Rule]] = {}
    pending: list[type[Rule]] = list(Rule.__subclasses__())
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found
