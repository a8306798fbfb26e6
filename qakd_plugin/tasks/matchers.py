"""How one output of the student is compared with the teacher's: a loss, its weight, and which positions count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ..errors import QakdError
from ..losses import binary_kl, cosine, kl_divergence, l1, l2, smooth_l1

Where: TypeAlias = str | Callable[[Any, dict[str, Tensor], dict[str, Tensor]], Tensor] | None
"""Which positions count: the name of a mask among inputs or targets, or a callable of inputs, the student's outputs and the
teacher's, by name, that returns bools or weights; None for all."""


Match: TypeAlias = "Mapping[str, Matcher]"


class Matcher(Protocol):
    """How one output is compared: a frozen dataclass."""

    @property
    def weight(self) -> float:
        """Factor of this loss in the sum, > 0."""

    @property
    def where(self) -> Where:
        """Which positions count."""

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        """One loss per sample, (N,)."""


@dataclass(frozen=True)
class _Comparison:
    """What all matchers check of themselves."""

    def __post_init__(self) -> None:
        for name in ("weight", "temperature", "beta"):
            value = getattr(self, name, None)
            if value is not None and not value > 0:
                raise QakdError(f"{type(self).__name__}: {name}={value} must be positive.")


@dataclass(frozen=True)
class KL(_Comparison):
    """Softened predictions over classes: ``T^2 KL(teacher || student)``, softmax over ``dim``, the mean over other positions.

    See :func:`qakd_plugin.losses.kl_divergence`.

    Args:
        dim: of the classes.
        temperature: None for the method's.
        weight: factor of this loss in the sum, > 0.
        where: which positions count: the name of a mask among inputs or targets ("attention_mask"), or a
            ``callable(inputs, student_outputs, teacher_outputs)`` that returns bools or weights, of the shape of the output
            without ``dim``, or of its first dimensions.
    """

    dim: int = 1
    temperature: float | None = None
    weight: float = 1.0
    where: Where = None

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        assert self.temperature is not None
        return kl_divergence(student, teacher, self.temperature, self.dim, where)


@dataclass(frozen=True)
class BinaryKL(_Comparison):
    """Independent yes-or-no logits: one logit, multi-label, heat maps, objectness. See :func:`qakd_plugin.losses.binary_kl`.

    Args:
        temperature: None for the method's.
        weight: see :class:`KL`.
        where: see :class:`KL`; of the shape of the output, or of its first dimensions.
    """

    temperature: float | None = None
    weight: float = 1.0
    where: Where = None

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        assert self.temperature is not None
        return binary_kl(student, teacher, self.temperature, where)


@dataclass(frozen=True)
class L2(_Comparison):
    """Squared difference: :func:`qakd_plugin.losses.l2`.

    Args:
        weight: see :class:`KL`.
        where: see :class:`KL`; of the shape of the output, or of its first dimensions.
    """

    weight: float = 1.0
    where: Where = None

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        return l2(student, teacher, where)


@dataclass(frozen=True)
class L1(_Comparison):
    """Absolute difference: :func:`qakd_plugin.losses.l1`.

    Args:
        weight: see :class:`KL`.
        where: see :class:`KL`; of the shape of the output, or of its first dimensions.
    """

    weight: float = 1.0
    where: Where = None

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        return l1(student, teacher, where)


@dataclass(frozen=True)
class SmoothL1(_Comparison):
    """Quadratic below ``beta``, linear above: :func:`qakd_plugin.losses.smooth_l1`.

    Args:
        beta: where the pieces meet, > 0.
        weight: see :class:`KL`.
        where: see :class:`KL`; of the shape of the output, or of its first dimensions.
    """

    beta: float = 1.0
    weight: float = 1.0
    where: Where = None

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        return smooth_l1(student, teacher, self.beta, where)


@dataclass(frozen=True)
class Cosine(_Comparison):
    """``1 - cos`` along ``dim``: :func:`qakd_plugin.losses.cosine`.

    Args:
        dim: along which the vectors lie.
        weight: see :class:`KL`.
        where: see :class:`KL`.
    """

    dim: int = -1
    weight: float = 1.0
    where: Where = None

    def loss(self, student: Tensor, teacher: Tensor, where: Tensor | None) -> Tensor:
        return cosine(student, teacher, self.dim, where)


def with_temperature(match: Match, temperature: float) -> dict[str, Matcher]:
    """The same with a method's temperature wherever a matcher takes one and has none of its own."""
    return {
        name: replace(matcher, temperature=temperature)
        if isinstance(matcher, KL | BinaryKL) and matcher.temperature is None
        else matcher
        for name, matcher in match.items()
    }


def agreed_labels(matcher: Matcher, outputs: Tensor) -> Tensor | None:
    """What two networks agree on: a label per position, or None where an output holds values."""
    if isinstance(matcher, KL):
        return outputs.argmax(matcher.dim)
    return outputs > 0 if isinstance(matcher, BinaryKL) else None
