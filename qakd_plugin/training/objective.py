"""The losses of a phase on one batch: the one place of training that calls both networks and compares their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quantizers import refresh_delta
from ..tasks.outputs import logits_for
from ..toolkits import Adapter
from .batches import Batch
from .features import FeatureTaps
from .methods import Phase, total_loss
from .networks import Networks
from .teachers import frozen_logits, teacher_logits


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
        features = next((phase.features for phase in phases if phase.features is not None), None)
        self._taps = None
        if features is not None and networks.teacher is not None:
            self._taps = FeatureTaps(adapter, networks.model, networks.teacher, features)

    def __call__(self, phase: Phase, batch: Batch) -> Losses:
        """Forward passes of both networks, and the losses of a phase."""
        with self._autocast():
            student = logits_for(self._networks.called_student, batch.inputs, "prepared_model")
            other = self.taught(phase, batch)
        loss, parts = total_loss(phase.student, student, other, batch.targets)
        if phase.features is not None and self._taps is not None:
            loss = self._taps.added(loss, parts)
        numbers = {"loss": loss, **parts}
        teacher_loss = None
        if phase.teacher and other is not None:
            teacher_loss, teacher_parts = total_loss(phase.teacher, other, student, batch.targets)
            numbers |= {"teacher_loss": teacher_loss, **{f"teacher_{name}": part for name, part in teacher_parts.items()}}
        numbers = {name: wide(value.detach()) for name, value in numbers.items()}
        if other is not None:
            numbers["agreement"] = wide((student.argmax(1) == other.argmax(1)).sum()) / len(batch.inputs)
        return Losses(loss, teacher_loss, numbers)

    def taught(self, phase: Phase, batch: Batch) -> Tensor | None:
        """The teacher's logits (N, C) for a batch, from the cache where it knows them; None in a phase without a teacher."""
        if phase.needs_teacher and batch.taught is not None:
            return batch.taught
        return teacher_logits(self._networks.called_teacher, phase, (batch.inputs,), {})

    def refresh_curvature(self, phase: Phase, batch: Batch) -> None:
        """Set EWGS's delta from the curvature of this phase's loss on a batch, the student in eval mode."""
        teacher = self._networks.teacher
        other = None if teacher is None or not phase.needs_teacher else frozen_logits(teacher, batch.inputs)

        def loss() -> Tensor:
            student = logits_for(self._networks.model, batch.inputs, "prepared_model")
            return total_loss(phase.student, student, other, batch.targets)[0]

        refresh_delta(loss)

    def close(self) -> None:
        """Take hooks off again."""
        if self._taps is not None:
            self._taps.remove()


def wide(value: Tensor) -> Tensor:
    """Float64 where the device has it, for sums over many samples."""
    return value.float() if value.device.type == "mps" else value.to(torch.float64)
