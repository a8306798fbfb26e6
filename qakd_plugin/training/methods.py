"""Methods: which phases run which loss on which network. Data only; the loop and ``attach`` carry them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..errors import LabelsRequiredError, QakdError
from ..losses import cross_entropy, kl_divergence
from .features import Features


class Term(Protocol):
    """One part of a loss: ``name`` and ``weight``, and a value per sample."""

    @property
    def name(self) -> str:
        """Under which the history lists it."""

    @property
    def weight(self) -> float:
        """Its factor in the sum."""

    @property
    def needs_labels(self) -> bool:
        """Whether labels are read."""

    @property
    def needs_other(self) -> bool:
        """Whether the other network's logits are read."""

    def __call__(self, own: Tensor, other: Tensor | None, labels: Tensor | None) -> Tensor:
        """Loss (N,) of the network with logits ``own``; ``other`` are the other network's, detached."""


@dataclass(frozen=True)
class Imitation:
    """``T^2 KL(other || own)``: learn from the other network."""

    temperature: float
    weight: float = 1.0
    name: str = "kl"
    needs_labels: bool = False
    needs_other: bool = True

    def __call__(self, own: Tensor, other: Tensor | None, labels: Tensor | None) -> Tensor:
        assert other is not None
        return kl_divergence(own, other, self.temperature)


@dataclass(frozen=True)
class Supervision:
    """Cross-entropy: learn from labels."""

    weight: float = 1.0
    name: str = "ce"
    needs_labels: bool = True
    needs_other: bool = False

    def __call__(self, own: Tensor, other: Tensor | None, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return cross_entropy(own, labels)


@dataclass(frozen=True)
class Phase:
    """Some epochs with the same losses.

    Attributes:
        name: for history and progress.
        epochs: how many.
        student: terms of the student's loss.
        teacher: terms of the teacher's loss; empty: the teacher is frozen, in eval mode.
        features: that the student is to match as well; None for none.
    """

    name: str
    epochs: int
    student: tuple[Term, ...]
    teacher: tuple[Term, ...] = ()
    features: Features | None = None

    @property
    def needs_labels(self) -> bool:
        return any(term.needs_labels for term in (*self.student, *self.teacher))

    @property
    def needs_teacher(self) -> bool:
        return bool(self.teacher or self.features) or any(term.needs_other for term in self.student)


class Method(Protocol):
    """A training method: a frozen dataclass with its hyper-parameters."""

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        """The phases of a run of ``epochs`` epochs, without empty ones."""


@dataclass(frozen=True)
class SQAKD:
    """Self-supervised quantization-aware distillation: KL to a full-precision teacher, no labels, nothing else.

    Args:
        temperature: softens both predictions.
        features: layers whose inputs are compared as well; None as in the paper.

    Source: Zhao and Zhao, AISTATS 2024, arXiv 2403.11106.
    """

    temperature: float = 4.0
    features: Features | None = None

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return (Phase("distill", epochs, (Imitation(self.temperature),), features=self.features),)


@dataclass(frozen=True)
class QAT:
    """Quantization-aware training with labels only: the yardstick for every distillation."""

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return (Phase("train", epochs, (Supervision(),)),)


@dataclass(frozen=True)
class KD:
    """A fixed teacher and labels: ``alpha * T^2 KL + (1 - alpha) * CE``.

    Args:
        temperature: softens both predictions.
        alpha: weight of the teacher, 0 to 1.
        features: layers whose inputs are compared as well.

    Source: Hinton et al., arXiv 1503.02531.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    features: Features | None = None

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        if not 0 <= self.alpha <= 1:
            raise QakdError(f"alpha={self.alpha} is out of range: the teacher's weight lies between 0 and 1.")

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        terms = (Imitation(self.temperature, weight=self.alpha), Supervision(weight=1 - self.alpha))
        return (Phase("distill", epochs, tuple(term for term in terms if term.weight > 0), features=self.features),)


@dataclass(frozen=True)
class QKD:
    """Three phases: the student alone, both networks together, the trained teacher frozen.

    Args:
        self_studying: epochs with labels only.
        co_studying: epochs in which both networks learn from labels and from each other.
        tutoring: epochs with labels and the frozen, trained teacher.
        temperature: softens predictions.
        features: layers whose inputs are compared as well, in the phases with a teacher.

    Numbers that are all at most 1 are fractions of ``distill``'s ``epochs``; otherwise they count epochs themselves, and
    ``epochs`` is not used.

    Source: Kim et al., 2019, arXiv 1911.12491.
    """

    self_studying: float = 0.15
    co_studying: float = 0.5
    tutoring: float = 0.35
    temperature: float = 2.0
    features: Features | None = None

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        lengths = self._lengths
        if min(lengths) < 0 or sum(lengths) <= 0:
            raise QakdError(f"QKD phases must not be negative and must not all be 0, got {lengths}.")
        if max(lengths) > 1 and any(length != int(length) for length in lengths):
            raise QakdError(f"QKD phases are either all fractions (at most 1) or all whole epochs, got {lengths}.")

    @property
    def _lengths(self) -> tuple[float, float, float]:
        return self.self_studying, self.co_studying, self.tutoring

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        both = (Supervision(), Imitation(self.temperature))
        counts = _whole_epochs(self._lengths, epochs)
        phases = (
            Phase("self-studying", counts[0], (Supervision(),)),
            Phase("co-studying", counts[1], both, teacher=both, features=self.features),
            Phase("tutoring", counts[2], both, features=self.features),
        )
        return tuple(phase for phase in phases if phase.epochs > 0)


def _whole_epochs(lengths: tuple[float, ...], epochs: int) -> list[int]:
    if max(lengths) > 1:
        return [int(length) for length in lengths]
    ends = [round(epochs * sum(lengths[: index + 1]) / sum(lengths)) for index in range(len(lengths))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def total_loss(
    terms: tuple[Term, ...], own: Tensor, other: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one network on one batch: its mean over samples, and its parts, unweighted and detached.

    Args:
        terms: of a phase.
        own: logits (N, C) of the network that learns.
        other: logits (N, C) of the other network; they are detached here.
        labels: (N,) or (N, C), or None where no term reads them.
    """
    total: Tensor | None = None
    parts = {}
    for term in terms:
        value = term(own, None if other is None else other.detach(), labels).mean()
        parts[term.name] = value.detach()
        weighted = value if term.weight == 1 else term.weight * value
        total = weighted if total is None else total + weighted
    assert total is not None
    return total, parts


def require_labels(method: Method, labels: object) -> Tensor:
    """Labels of a batch as a tensor.

    Raises:
        LabelsRequiredError: there are none; names the method.
    """
    if not isinstance(labels, Tensor):
        kind = "none" if labels is None else f"{type(labels).__name__}"
        raise LabelsRequiredError(
            f"{type(method).__name__} learns from labels, but the batch holds {kind}. Yield (x, y) with y an int64 tensor "
            "(N,), pass a batch_fn that finds the labels, or use SQAKD, which needs none."
        )
    return labels


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise QakdError(f"{name}={value} must be positive.")
