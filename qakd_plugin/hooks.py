"""``attach``: the same losses in somebody's own training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import adapter_for
from .errors import QakdError
from .methods import SQAKD, Method, Phase, require_labels, total_loss
from .modes import eval_mode


class Attached:
    """Losses of a method on a prepared model, collected by a forward hook on its root.

    The root is the only module whose hooks fire with every toolkit. Made by :func:`attach`; detach it with :meth:`detach` or by
    leaving the ``with`` block.
    """

    def __init__(self, prepared_model: nn.Module, teacher: nn.Module | None, method: Method, phases: Sequence[Phase]) -> None:
        self.method = method
        self.teacher = teacher
        self._phases = list(phases)
        self._index = 0
        self._batch: tuple[Tensor, Tensor | None] | None = None
        self.parts: dict[str, Tensor] = {}
        self._handle = prepared_model.register_forward_hook(self._collect, with_kwargs=True)

    @property
    def phase(self) -> Phase:
        """The phase whose losses :meth:`loss` puts together."""
        return self._phases[self._index]

    def next_phase(self) -> Phase:
        """Go on to the next phase and return it.

        Raises:
            QakdError: this was the last one.
        """
        if self._index + 1 == len(self._phases):
            raise QakdError(f"{self.phase.name!r} is the last phase of {type(self.method).__name__}.")
        self._index += 1
        self._batch = None
        return self.phase

    def loss(self, labels: Tensor | None = None) -> Tensor:
        """The student's loss on the last batch: a scalar to call ``backward`` on.

        Args:
            labels: (N,) or (N, C), where the phase reads them.

        Raises:
            LabelsRequiredError: labels are needed and missing; names the method.
            QakdError: the model has not been called in training since the last loss.
        """
        student, teacher = self._last()
        targets = require_labels(self.method, labels) if any(t.needs_labels for t in self.phase.student) else None
        loss, self.parts = total_loss(self.phase.student, student, teacher, targets)
        if not self.phase.teacher:
            self._batch = None
        return loss

    def teacher_loss(self, labels: Tensor | None = None) -> Tensor:
        """The teacher's loss on the last batch, while it learns too; call it after :meth:`loss`.

        Raises:
            QakdError: the teacher is frozen in this phase.
        """
        if not self.phase.teacher:
            raise QakdError(f"the teacher is frozen in phase {self.phase.name!r}: only kd.loss() belongs here.")
        student, teacher = self._last()
        assert teacher is not None
        targets = require_labels(self.method, labels) if any(t.needs_labels for t in self.phase.teacher) else None
        loss, _ = total_loss(self.phase.teacher, teacher, student, targets)
        self._batch = None
        return loss

    def detach(self) -> None:
        """Remove the hook. Nothing of it is left on the model."""
        self._handle.remove()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _collect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        self._batch = output, teacher_logits(self.teacher, self.phase, args, kwargs) if self.phase.needs_teacher else None

    def _last(self) -> tuple[Tensor, Tensor | None]:
        if self._batch is None:
            raise QakdError(
                "call prepared_model(x) with gradients enabled before kd.loss(): there is no batch to take a loss on."
            )
        return self._batch


def attach(prepared_model: nn.Module, teacher: nn.Module | None, method: Method | None = None) -> Attached:
    """Register a method's losses on a prepared model, for use in a loop of your own.

    Example::

        with qakd.attach(prepared_model, teacher, method=qakd.SQAKD(temperature=4.0)) as kd:
            for x, y in loader:
                prepared_model(x)
                kd.loss().backward()
                optimizer.step(); optimizer.zero_grad()

    Args:
        prepared_model: prepared by a supported toolkit.
        teacher: full-precision network; None for methods that need none. While it is frozen it runs in eval mode and without
            gradients, and its own mode is put back after each call.
        method: SQAKD() by default.

    Returns:
        The handle; a context manager that detaches at the end.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: the method needs a teacher and there is none.
    """
    adapter_for(prepared_model)
    method = SQAKD() if method is None else method
    phases = method.phases(100)  # how many epochs each has is up to the caller's loop
    require_teacher(method, phases, teacher)
    return Attached(prepared_model, teacher, method, phases)


def require_teacher(method: Method, phases: Sequence[Phase], teacher: nn.Module | None) -> None:
    """Raise QakdError where a phase needs a teacher and there is none."""
    if teacher is None and any(phase.needs_teacher for phase in phases):
        raise QakdError(
            f"teacher=None, but {type(method).__name__} learns from a teacher. Pass a full-precision network, or use QAT()."
        )


def teacher_logits(teacher: nn.Module | None, phase: Phase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The teacher's logits: with gradients where it learns in this phase, in eval mode and without them otherwise."""
    assert teacher is not None
    if phase.teacher:
        return teacher(*args, **kwargs)  # type: ignore[no-any-return]
    with eval_mode(teacher), torch.no_grad():
        return teacher(*args, **kwargs)  # type: ignore[no-any-return]
