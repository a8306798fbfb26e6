"""The losses of a phase on one batch: the one place of training that calls both networks and compares their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._common.precision import wide
from ..quantizers import refresh_delta
from ..tasks.inputs import Inputs, arguments, call
from ..tasks.matching import agreement
from ..tasks.outputs import Outputs, frozen_output, named_outputs
from ..tasks.task_loss import with_targets
from ..toolkits import Adapter
from .batches import Batch
from .features import FeatureTaps
from .methods import Imitation, MatchCheck, Phase, total_loss
from .networks import Networks
from .teachers import taught_outputs


@dataclass(frozen=True)
class Losses:
    """Of one batch, means over its samples.

    Attributes:
        student: () to call ``backward`` on.
        teacher: likewise, while it learns too; None otherwise.
        numbers: () each, detached: what the history lists, and "agreement", the share of samples on which both agree.
    """

    student: Tensor
    teacher: Tensor | None
    numbers: dict[str, Tensor]


class Objective:
    """The losses of every phase of a run.

    Args:
        adapter: of the student's toolkit.
        networks: both.
        phases: of the run.
        autocast: makes the context of forward passes.

    Raises:
        QakdError: a network has no layer whose features a phase compares.
    """

    def __init__(
        self,
        adapter: Adapter,
        networks: Networks,
        phases: Sequence[Phase],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._networks, self._autocast = networks, autocast
        self._check = MatchCheck()
        features = next((phase.features for phase in phases if phase.features is not None), None)
        self._taps = None
        if features is not None and networks.teacher is not None:
            self._taps = FeatureTaps(adapter, networks.model, networks.teacher, features)

    def __call__(self, phase: Phase, batch: Batch) -> Losses:
        """Forward passes of both networks, and the losses of a phase."""
        with self._autocast():
            student = named_outputs(call(self._networks.called_student, self._inputs(phase, self._networks.model, batch)))
            other = self.taught(phase, batch)
        self._check(phase, student, other, batch.inputs, batch.targets)
        loss, parts = total_loss(phase.student, student, other, batch.targets, batch.inputs)
        if phase.features is not None and self._taps is not None:
            loss = self._taps.added(loss, parts)
        numbers = {"loss": loss, **parts}
        teacher_loss = None
        if phase.teacher and other is not None:
            teacher_loss, teacher_parts = total_loss(phase.teacher, other, student, batch.targets, batch.inputs)
            numbers |= {"teacher_loss": teacher_loss, **{f"teacher_{name}": part for name, part in teacher_parts.items()}}
        numbers = {name: wide(value.detach()) for name, value in numbers.items()}
        if other is not None and phase.imitation is not None:
            match = phase.imitation.matched(student, batch.inputs)
            if (agreed := agreement(match, student, other)) is not None:
                numbers["agreement"] = agreed
        return Losses(loss, teacher_loss, numbers)

    def taught(self, phase: Phase, batch: Batch) -> Outputs | None:
        """The teacher's outputs for a batch, from the cache where it knows them; None in a phase without a teacher."""
        if phase.needs_teacher and batch.taught is not None:
            return batch.taught
        teacher = self._networks.teacher
        inputs = batch.inputs if teacher is None or not phase.teacher else self._inputs(phase, teacher, batch)
        return taught_outputs(self._networks.called_teacher, phase, *arguments(inputs))

    @torch.no_grad()
    def distance(self, phase: Phase, batch: Batch) -> Tensor | None:
        """How far the student is from the teacher in a phase that imitates it.

        At a temperature of 1, as predictions are read: what is softened says little of which class is ahead.

        Returns:
            () the loss of the student as it is now, in its mode; None where this mode lacks an output that is compared.
        """
        with self._autocast():
            student, other = named_outputs(call(self._networks.model, batch.inputs)), self.taught(phase, batch)
        assert phase.imitation is not None
        assert other is not None
        if not phase.imitation.matched(student, batch.inputs).keys() <= student.keys() & other.keys():
            return None
        terms = tuple(replace(term, temperature=1.0) if isinstance(term, Imitation) else term for term in phase.student)
        return wide(total_loss(terms, student, other, batch.targets, batch.inputs)[0])

    def refresh_curvature(self, phase: Phase, batch: Batch) -> None:
        """Set EWGS's delta from the curvature of this phase's loss on a batch, the student in eval mode."""
        teacher = self._networks.teacher
        args, kwargs = arguments(batch.inputs)
        other = None if teacher is None or not phase.needs_teacher else named_outputs(frozen_output(teacher, *args, **kwargs))

        def loss() -> Tensor:
            student = call(self._networks.model, self._inputs(phase, self._networks.model, batch))
            return total_loss(phase.student, student, other, batch.targets, batch.inputs)[0]

        refresh_delta(loss)

    def _inputs(self, phase: Phase, network: nn.Module, batch: Batch) -> Inputs:
        """As ``network`` is called in a phase: with its targets where it computes its own loss."""
        return with_targets(network, batch.inputs, batch.targets) if phase.calls_with_labels else batch.inputs

    def close(self) -> None:
        """Take hooks off again."""
        if self._taps is not None:
            self._taps.remove()
