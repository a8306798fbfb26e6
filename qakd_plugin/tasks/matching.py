"""Which output of the student is compared with the teacher's.

``match={"out": KL(dim=1), "aux": KL(dim=1, weight=0.4), "boxes": SmoothL1(where=foreground)}``: names are paths
(:func:`qakd_plugin.tasks.outputs.named_outputs`). Without it exactly one reading must be possible, or an error shows the line
to write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.precision import wide
from ..errors import QakdError
from .inputs import Inputs, named_tensors
from .matchers import KL, BinaryKL, Match, Matcher, agreed_labels
from .outputs import Outputs, listed


def default_match(outputs: Outputs, inputs: Inputs) -> dict[str, Matcher]:
    """What is compared where the user did not say: one float output, or a field ``logits``, as its shape has it.

    Args:
        outputs: of the student, by name.
        inputs: of the batch: with token ids among them (integers) the classes of (N, T, C) are the last dimension.

    Raises:
        QakdError: more than one reading is possible; lists the outputs and shows the line to write.
    """
    floats = _comparable(outputs)
    name = "logits" if "logits" in floats else next(iter(floats)) if len(floats) == 1 else None
    matcher = None if name is None else _reading(floats[name], inputs)
    if name is None or matcher is None:
        raise QakdError(
            f"match: the network outputs {listed(outputs)}; what is to be compared with the teacher, and how, can be read in "
            f"more than one way. Say it: {suggestion(outputs)} (KL over classes, BinaryKL for independent logits, L2, L1, "
            "SmoothL1, Cosine for values)."
        )
    return {name: matcher}


def _comparable(outputs: Outputs) -> dict[str, Tensor]:
    """Float outputs with a batch dimension: a network's own loss has none."""
    return {name: tensor for name, tensor in outputs.items() if tensor.is_floating_point() and tensor.ndim}


def _reading(output: Tensor, inputs: Inputs) -> Matcher | None:
    if output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1):
        return BinaryKL()
    if output.ndim in (2, 4) and output.shape[1] > 1:
        return KL(dim=1)
    if output.ndim == 3 and any(not t.is_floating_point() for t in named_tensors(inputs).values()):
        return KL(dim=-1)
    return None


def suggestion(outputs: Outputs) -> str:
    """The line to write for these outputs."""
    parts = []
    for name, tensor in list(_comparable(outputs).items())[:6]:
        single = tensor.ndim == 1 or (tensor.ndim > 1 and tensor.shape[1] == 1)
        kind = "BinaryKL()" if single else "KL(dim=-1)" if tensor.ndim == 3 else "KL(dim=1)"
        parts.append(f'"{name}": qakd.{kind}')
    return f"method=qakd.SQAKD(match={{{', '.join(parts)}}})"


def check_match(match: Match, student: Outputs, teacher: Outputs, inputs: Inputs, targets: Any) -> None:
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
                hint = (
                    " (the other network has it: structures differ between training and eval mode; the student is compared in "
                    "training mode and, on a held-out split, in eval mode, a frozen teacher always in eval mode)"
                    if name in other
                    else ""
                )
                raise QakdError(
                    f"match names {name!r}, which the {whose} does not output{hint}: name one of {listed(outputs)}."
                )
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


def require_gradients(match: Match, student: Outputs) -> None:
    """Raise QakdError where what is compared does not depend on the student's weights: it is detached, or made of integers."""
    for name in match:
        if not student[name].requires_grad:
            raise QakdError(
                f"match: the student outputs {name!r} without a gradient (computed under no_grad, detached, or by arg max): "
                "nothing would be trained. Match an output that depends on the weights."
            )


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


def _require_gradient(name: str, matcher: Matcher, student: Outputs, teacher: Outputs, inputs: Inputs, targets: Any) -> None:
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


def mask_of(name: str, matcher: Matcher, student: Outputs, teacher: Outputs, inputs: Inputs, targets: Any) -> Tensor | None:
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


def matched_losses(match: Match, student: Outputs, teacher: Outputs, inputs: Inputs, targets: Any) -> dict[str, Tensor]:
    """One loss per sample (N,) for each matched output, unweighted."""
    return {
        name: matcher.loss(student[name], teacher[name], mask_of(name, matcher, student, teacher, inputs, targets))
        for name, matcher in match.items()
    }


def agreement(match: Match, student: Outputs, teacher: Outputs) -> Tensor | None:
    """Share of labels on which both agree, (): a mean over samples, their positions, and outputs that hold labels.

    None where no output holds any.
    """
    shares = []
    for name, matcher in match.items():
        ours, theirs = agreed_labels(matcher, student[name]), agreed_labels(matcher, teacher[name])
        if ours is not None and theirs is not None:
            same = ours == theirs
            shares.append(wide(same.sum()) / same.numel())
    return None if not shares else shares[0] if len(shares) == 1 else torch.stack(shares).mean()
