"""Methods: which phases run which loss on which network. Data only; the loop and ``attach`` carry them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LabelsRequiredError, QakdError
from ..tasks.inputs import named_tensors
from ..tasks.matchers import Match, Matcher, with_temperature
from ..tasks.matching import check_match, default_match, matched_losses, require_gradients
from ..tasks.metrics import simplified
from ..tasks.outputs import Outputs, named_outputs
from ..tasks.task_loss import TaskLoss, default_task_loss, model_loss
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
        """Whether the other network's outputs are read."""

    def __call__(self, own: Outputs, other: Outputs | None, inputs: Any, targets: Any) -> Mapping[str, Tensor]:
        """Losses, (N,) each or scalars, whose sum is the term; by name where there are several, else under "".

        Args:
            own: outputs of the network that learns, by path.
            other: those of the other network, detached.
            inputs: of the batch.
            targets: of the batch, or None where no term reads them.
        """


@dataclass(frozen=True)
class Imitation:
    """Learn from the other network: ``T^2 KL(other || own)``, or what ``match`` says of each output.

    Attributes:
        temperature: T, > 0; softens both predictions.
        weight: factor in the sum of a phase's terms.
        name: in the history.
        match: which outputs are compared, and how; None where exactly one reading is possible.
        needs_labels: no label is read.
        needs_other: the other network's outputs are.
    """

    temperature: float
    weight: float = 1.0
    name: str = "kl"
    match: Match | None = None
    needs_labels: bool = False
    needs_other: bool = True

    def __call__(self, own: Outputs, other: Outputs | None, inputs: Any, targets: Any) -> Mapping[str, Tensor]:
        assert other is not None
        match = self.matched(own, inputs)
        found = matched_losses(match, own, other, inputs, targets)
        if len(found) == 1:
            ((name, value),) = found.items()
            return {"": value if match[name].weight == 1 else match[name].weight * value}
        return {name: match[name].weight * value for name, value in found.items()}

    def matched(self, own: Outputs, inputs: Any) -> dict[str, Matcher]:
        """What is compared, each with a temperature."""
        return with_temperature(default_match(own, inputs) if self.match is None else self.match, self.temperature)


@dataclass(frozen=True)
class Supervision:
    """Learn from labels: cross-entropy over the classes, or a loss of the user's.

    Attributes:
        weight: factor in the sum of a phase's terms.
        name: in the history.
        task_loss: callable(outputs, targets) that returns a scalar or (N,), or "model"; None for cross-entropy.
        needs_labels: they are read.
        needs_other: the other network's outputs are not.
    """

    weight: float = 1.0
    name: str = "ce"
    task_loss: TaskLoss | None = None
    needs_labels: bool = True
    needs_other: bool = False

    def __call__(self, own: Outputs, other: Outputs | None, inputs: Any, targets: Any) -> Mapping[str, Tensor]:
        if self.task_loss is None:
            return {"": default_task_loss(own, inputs, targets)}
        found = model_loss(own) if self.task_loss == "model" else self.task_loss(simplified(own), targets)
        if not isinstance(found, Tensor):
            raise QakdError(
                f"task_loss returned {type(found).__name__}; expected a tensor: a scalar, or one value a sample (N,)."
            )
        if not found.requires_grad and any(output.requires_grad for output in own.values()):
            raise QakdError(
                "task_loss: what it returned has no gradient, so nothing would be trained: it is made of integers, of detached "
                "outputs or of an arg max. Compute it from the outputs themselves."
            )
        return {"": found}


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

    @property
    def calls_with_labels(self) -> bool:
        """Whether networks compute their own loss, and so are called with labels."""
        return any(getattr(term, "task_loss", None) == "model" for term in (*self.student, *self.teacher))

    @property
    def only_imitates(self) -> bool:
        """Whether to be like the frozen teacher is all that the student learns."""
        return not self.teacher and all(isinstance(term, Imitation) for term in self.student)

    @property
    def imitation(self) -> Imitation | None:
        """What the student learns from the teacher, or None."""
        return next((term for term in self.student if isinstance(term, Imitation)), None)


class MatchCheck:
    """Checks once, on the first outputs of the modes in which they are compared, that a phase can compare them."""

    def __init__(self) -> None:
        self._done = False

    def __call__(self, phase: Phase, student: Outputs, teacher: Outputs | None, inputs: Any, targets: Any) -> None:
        """Outputs of both networks for a batch; see :func:`~qakd_plugin.tasks.matching.check_match` for what is raised."""
        if not self._done and teacher is not None and phase.imitation is not None:
            match = phase.imitation.matched(student, inputs)
            check_match(match, student, teacher, inputs, targets)
            if torch.is_grad_enabled():
                require_gradients(match, student)
            self._done = True


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
        match: which outputs are compared, and how: ``{"out": qakd.KL(dim=1), "boxes": qakd.SmoothL1()}``; None where exactly
            one reading is possible, see docs/tasks.md.

    Source: Zhao and Zhao, AISTATS 2024, arXiv 2403.11106.
    """

    temperature: float = 4.0
    features: Features | None = None
    match: Match | None = None

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        _check_match(self.match)

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return (Phase("distill", epochs, (Imitation(self.temperature, match=self.match),), features=self.features),)


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
        match: which outputs are compared, and how; see :class:`SQAKD`.

    Source: Hinton et al., arXiv 1503.02531.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    features: Features | None = None
    match: Match | None = None

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        _check_match(self.match)
        if not 0 <= self.alpha <= 1:
            raise QakdError(f"alpha={self.alpha} is out of range: the teacher's weight must lie between 0 and 1.")

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        terms = (Imitation(self.temperature, weight=self.alpha, match=self.match), Supervision(weight=1 - self.alpha))
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
        match: which outputs are compared, and how; see :class:`SQAKD`.

    Numbers that are all at most 1 are fractions of ``distill``'s ``epochs``: a phase ends at the nearest whole epoch, so that
    short runs leave phases out, which ``distill`` says (the defaults need 4 epochs). Otherwise they count epochs themselves,
    and ``epochs`` is not used.

    Source: Kim et al., 2019, arXiv 1911.12491.
    """

    self_studying: float = 0.15
    co_studying: float = 0.5
    tutoring: float = 0.35
    temperature: float = 2.0
    features: Features | None = None
    match: Match | None = None

    def __post_init__(self) -> None:
        _positive("temperature", self.temperature)
        _check_match(self.match)
        lengths = self._lengths
        if min(lengths) < 0 or sum(lengths) <= 0:
            raise QakdError(f"QKD phases must not be negative and must not all be 0, got {lengths}.")
        if max(lengths) > 1 and any(length != int(length) for length in lengths):
            raise QakdError(f"QKD phases must be either all fractions (at most 1) or all whole epochs, got {lengths}.")

    @property
    def _lengths(self) -> tuple[float, float, float]:
        return self.self_studying, self.co_studying, self.tutoring

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        both = (Supervision(), Imitation(self.temperature, match=self.match))
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


def planned(method: Method, epochs: int, task_loss: TaskLoss | None) -> tuple[Phase, ...]:
    """The phases of a run of so many epochs, with the user's loss of labels where there is one.

    Raises:
        QakdError: what was passed is no method; shows the line to write.
    """
    if isinstance(method, type):
        raise QakdError(f"method={method.__name__} is a class: pass method=qakd.{method.__name__}().")
    if not callable(getattr(method, "phases", None)):
        raise QakdError(f"method={method!r} is no method: pass method=qakd.SQAKD(), or KD(), QKD(), QAT().")
    return with_task_loss(method.phases(epochs), task_loss)


def left_out(method: Method, phases: Sequence[Phase]) -> tuple[list[str], int]:
    """Phases that a longer run of the method has and these are without, by name; and the fewest epochs that hold all."""
    every = [phase.name for phase in method.phases(_MANY)]
    names = {phase.name for phase in phases}
    missing = [name for name in every if name not in names]
    fewest = next((n for n in range(1, _MANY) if len(method.phases(n)) == len(every)), _MANY) if missing else 0
    return missing, fewest


_MANY = 1000
"""Epochs of a run that leaves no phase out."""


def with_task_loss(phases: tuple[Phase, ...], task_loss: TaskLoss | None) -> tuple[Phase, ...]:
    """The same phases, with a loss of the user's in the place of the default wherever labels are learned from."""
    if task_loss is None:
        return phases

    def terms(found: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(replace(term, task_loss=task_loss) if isinstance(term, Supervision) else term for term in found)

    return tuple(replace(phase, student=terms(phase.student), teacher=terms(phase.teacher)) for phase in phases)


def total_loss(
    terms: tuple[Term, ...], own: Any, other: Any, targets: Any, inputs: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one network on one batch: its mean over samples, and its parts, unweighted and detached.

    Args:
        terms: of a phase.
        own: what the network that learns outputs: logits, or any tree of tensors.
        other: likewise, of the other network, or None; detached here.
        targets: of the batch, or None where no term reads them.
        inputs: of the batch, for masks.
    """
    mine, others = named_outputs(own), None if other is None else _detached(named_outputs(other))
    total: Tensor | None = None
    parts: dict[str, Tensor] = {}
    for term in terms:
        means = {name: value.mean() for name, value in term(mine, others, inputs, targets).items()}
        value = sum(means.values()) if len(means) > 1 else next(iter(means.values()))
        assert isinstance(value, Tensor)
        parts |= {f"{term.name}_{name}": mean.detach() for name, mean in means.items() if name}
        parts[term.name] = value.detach()
        weighted = value if term.weight == 1 else term.weight * value
        total = weighted if total is None else total + weighted
    assert total is not None
    return total, parts


def _detached(outputs: Outputs) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in outputs.items()}


def require_labels(method: Method, labels: Any) -> Any:
    """Labels of a batch: a tensor, or a structure that holds some.

    Raises:
        LabelsRequiredError: there are none; names the method.
    """
    if labels is None or isinstance(labels, str) or not named_tensors(labels):
        kind = "none" if labels is None else f"{type(labels).__name__}"
        raise LabelsRequiredError(
            f"{type(method).__name__} learns from labels, but the batch holds {kind}. Yield (x, y) with y an int64 tensor "
            "(N,), pass a batch_fn that finds the labels, or use SQAKD, which needs none."
        )
    return labels


def _check_match(match: Match | None) -> None:
    if match is not None and not (isinstance(match, Mapping) and match):
        raise QakdError(f'match={match!r} must be a mapping from outputs to losses: match={{"logits": qakd.KL()}}.')
    for name, matcher in (match or {}).items():
        if not callable(getattr(matcher, "loss", None)):
            raise QakdError(f"match: {name!r} is matched by {matcher!r}; use qakd.KL, BinaryKL, L2, L1, SmoothL1 or Cosine.")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise QakdError(f"{name}={value} must be positive.")
