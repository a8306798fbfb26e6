"""Which output of the student is compared with the teacher's, and by which loss.

``match={"out": KL(dim=1), "aux": KL(dim=1, weight=0.4), "boxes": SmoothL1(where=foreground)}``: names are paths
(:func:`qakd_plugin.tasks.outputs.named_outputs`). Without it exactly one reading must be possible, or an error shows the line
to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import QakdError
from ..losses import binary_kl, cosine, kl_divergence, l1, l2, smooth_l1
from .inputs import Inputs, arguments, named_tensors
from .outputs import frozen_output, listed, named_outputs

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
    """Absolute difference: :func:`qakd_plugin.losses.l1`. Arguments as :class:`L2`."""

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


def default_match(outputs: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Matcher]:
    """What is compared where the user did not say: one float output, or a field ``logits``, as its shape has it.

    Args:
        outputs: of the student, by name.
        inputs: of the batch: with token ids among them (integers) the classes of (N, T, C) are the last dimension.

    Raises:
        QakdError: more than one reading is possible; lists the outputs and shows the line to write.
    """
    floats = {name: tensor for name, tensor in outputs.items() if tensor.is_floating_point() and tensor.ndim}
    name = "logits" if "logits" in floats else next(iter(floats)) if len(floats) == 1 else None
    matcher = None if name is None else _reading(floats[name], inputs)
    if name is None or matcher is None:
        raise QakdError(
            f"match: the network outputs {listed(outputs)}; what is to be compared with the teacher, and how, can be read in "
            f"more than one way. Say it: {suggestion(floats)} (KL over classes, BinaryKL for independent logits, L2, L1, "
            "SmoothL1, Cosine for values)."
        )
    return {name: matcher}


def _reading(output: Tensor, inputs: Inputs) -> Matcher | None:
    if output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1):
        return BinaryKL()
    if output.ndim in (2, 4) and output.shape[1] > 1:
        return KL(dim=1)
    if output.ndim == 3 and any(not t.is_floating_point() for t in named_tensors(inputs).values()):
        return KL(dim=-1)
    return None


def suggestion(outputs: Mapping[str, Tensor]) -> str:
    """The line to write for these outputs."""
    parts = []
    for name, tensor in list(outputs.items())[:6]:
        single = tensor.ndim == 1 or (tensor.ndim > 1 and tensor.shape[1] == 1)
        kind = "BinaryKL()" if single else "KL(dim=-1)" if tensor.ndim == 3 else "KL(dim=1)"
        parts.append(f'"{name}": qakd.{kind}')
    return f"method=qakd.SQAKD(match={{{', '.join(parts)}}})"


def check_match(
    match: Match, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], inputs: Inputs, targets: Any
) -> None:
    """Refuse, at the first batch, what would compare the wrong things or nothing.

    Args:
        match: by name, with temperatures.
        student: outputs in the mode in which they are compared, with gradients.
        teacher: outputs likewise.
        inputs: of the batch, for masks.
        targets: of the batch, for masks.

    Raises:
        QakdError: an output is not there, shapes differ, an output holds probabilities where logits are compared, a mask does
            not fit, or the loss is the same whatever the student outputs.
    """
    for name, matcher in match.items():
        for whose, outputs, other in (("student", student, teacher), ("teacher", teacher, student)):
            if name not in outputs:
                hint = " (the other network has it: structures differ between training and eval mode)" if name in other else ""
                raise QakdError(f"match names {name!r}, which the {whose} does not output{hint}; it outputs {listed(outputs)}.")
        ours, theirs = student[name], teacher[name]
        if ours.shape != theirs.shape:
            raise QakdError(
                f"match: the teacher outputs {name!r} as {tuple(theirs.shape)}, the student as {tuple(ours.shape)} for the "
                "same batch. They must have the same classes and positions."
            )
        if isinstance(matcher, KL | BinaryKL):
            _refuse_probabilities(name, matcher, ours, theirs)
        if isinstance(matcher, KL) and ours.shape[matcher.dim] == 1:
            raise QakdError(
                f"match: {name!r} has one class along dim {matcher.dim} ({tuple(ours.shape)}), of which softmax is always 1: "
                f'nothing would be trained. Write match={{"{name}": qakd.BinaryKL()}}.'
            )
        _require_gradient(name, matcher, student, teacher, inputs, targets)


def _refuse_probabilities(name: str, matcher: Matcher, ours: Tensor, theirs: Tensor) -> None:
    found = {"student": _are_probabilities(matcher, ours), "teacher": _are_probabilities(matcher, theirs)}
    if any(found.values()):
        whose = " and the ".join(who for who, yes in found.items() if yes)
        raise QakdError(
            f"match: what the {whose} outputs as {name!r} are probabilities, and {type(matcher).__name__} compares logits. A "
            "network that applies softmax or sigmoid in eval mode does this to its teacher: return logits in both modes, or "
            f'match the probabilities as values: match={{"{name}": qakd.L2()}}.'
        )


def _are_probabilities(matcher: Matcher, outputs: Tensor) -> bool:
    values = outputs.detach().float()
    if bool((values < 0).any()) or bool((values > 1).any()):
        return False
    if isinstance(matcher, KL):
        return values.shape[matcher.dim] > 1 and torch.allclose(
            values.sum(matcher.dim), torch.ones_like(values.select(matcher.dim, 0)), atol=1e-3
        )
    return values.numel() >= 16  # sixteen logits, none of them negative or above 1, are probabilities


def _require_gradient(
    name: str, matcher: Matcher, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], inputs: Inputs, targets: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    own = student[name].detach()
    noise = torch.randn(own.shape, generator=generator).to(own)
    moved = (own + (0.1 * own.float().std(unbiased=False).clamp(min=1e-3)).to(own) * noise).requires_grad_(True)
    where = mask_of(name, matcher, {**student, name: moved}, teacher, inputs, targets)
    if where is not None and not bool(where.any()):
        return  # nothing counts in this batch
    with torch.enable_grad():
        value = matcher.loss(moved, teacher[name].detach(), where).sum()
        (gradient,) = torch.autograd.grad(value, moved, allow_unused=True) if value.requires_grad else (None,)
    if gradient is None or not bool(gradient.any()):
        raise QakdError(
            f"match: {type(matcher).__name__} of {name!r} {tuple(own.shape)} is the same whatever the student outputs: nothing "
            "would be trained. Compare it by another loss."
        )


def mask_of(
    name: str, matcher: Matcher, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], inputs: Inputs, targets: Any
) -> Tensor | None:
    """The mask that a matcher asks for.

    Raises:
        QakdError: there is no such mask, or a callable returned no tensor.
    """
    if matcher.where is None:
        return None
    if callable(matcher.where):
        found = matcher.where(inputs, dict(student), dict(teacher))
        if not isinstance(found, Tensor):
            raise QakdError(f"match: where of {name!r} returned {type(found).__name__}; expected a tensor of bools or weights.")
        return found
    masks = named_tensors(inputs) | ({} if targets is None else named_tensors(targets))
    if matcher.where not in masks:
        raise QakdError(
            f"match: where={matcher.where!r} of {name!r} names no input or target; there are {', '.join(masks) or 'none'}."
        )
    return masks[matcher.where]


def matched_losses(
    match: Match, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], inputs: Inputs, targets: Any
) -> dict[str, Tensor]:
    """One loss per sample (N,) for each matched output, unweighted."""
    return {
        name: matcher.loss(student[name], teacher[name], mask_of(name, matcher, student, teacher, inputs, targets))
        for name, matcher in match.items()
    }


def agreement(match: Match, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor | None:
    """Share of labels on which both agree, (): a mean over samples, their positions, and outputs that hold labels.

    None where no output holds any.
    """
    shares = []
    for name, matcher in match.items():
        ours, theirs = agreed_labels(matcher, student[name]), agreed_labels(matcher, teacher[name])
        if ours is not None and theirs is not None:
            same = ours == theirs
            count = same.sum()
            shares.append((count.float() if count.device.type == "mps" else count.double()) / same.numel())
    return None if not shares else shares[0] if len(shares) == 1 else torch.stack(shares).mean()


@dataclass(frozen=True)
class OutputLine:
    """One output of a network.

    Attributes:
        name: its path.
        shape: of the example.
        dtype: likewise.
        matched: with what it would be compared by default, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matched: Matcher | None


class OutputTable(tuple[OutputLine, ...]):
    """What a network outputs; prints as a table, with the line to write where no default exists."""

    hint: str | None

    def __new__(cls, lines: list[OutputLine], hint: str | None) -> OutputTable:
        table = super().__new__(cls, lines)
        table.hint = hint
        return table

    def __str__(self) -> str:
        width = max([len("output"), *(len(line.name) for line in self)])
        rows = [f"{'output':{width}}  {'shape':20}  {'dtype':10}  matched by default"]
        for line in self:
            dtype = str(line.dtype).removeprefix("torch.")
            rows.append(f"{line.name:{width}}  {line.shape!s:20}  {dtype:10}  {line.matched or ''}".rstrip())
        return "\n".join([*rows, *([f"no default: {self.hint}"] if self.hint else [])])


def outputs_of(model: nn.Module, inputs: Inputs) -> OutputTable:
    """What a network outputs in eval mode: names, shapes, dtypes, and with what each would be compared by default.

    Args:
        model: any network.
        inputs: a batch: a tensor, a tuple of positional arguments or a mapping of keywords.

    Returns:
        A table: print it. ``table.hint`` is the line to write where there is no default.
    """
    args, kwargs = arguments(inputs)
    found = named_outputs(frozen_output(model, *args, **kwargs))
    hint = None
    try:
        match = default_match(found, inputs)
    except QakdError:
        match, hint = {}, suggestion({name: tensor for name, tensor in found.items() if tensor.is_floating_point()})
    lines = [OutputLine(name, tuple(tensor.shape), tensor.dtype, match.get(name)) for name, tensor in found.items()]
    return OutputTable(lines, hint)
