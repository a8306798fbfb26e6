"""Both networks of a run, where they compute, and what trains them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._common.device import move
from ..toolkits import Adapter
from .distributed.processes import Processes
from .distributed.sharding import divided_copy, gathered
from .optimizers import clip_gradients


@dataclass(frozen=True)
class Networks:
    """Student and teacher.

    Attributes:
        model: the prepared model.
        teacher: the run's own copy where it learns too; None where there is none.
        called_student: ``model`` as training calls it: wrapped where several processes train.
        called_teacher: likewise; only a teacher that learns is wrapped.
    """

    model: nn.Module
    teacher: nn.Module | None
    called_student: nn.Module
    called_teacher: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, teacher: nn.Module | None, processes: Processes, *, teacher_learns: bool) -> Networks:
        """Wrap what learns for data parallel training, unless it is divided. Lazy parameters must have their shapes by now."""
        if processes.divide:
            return cls(model, teacher, model, teacher)
        wrap = processes.accelerator.prepare_model
        return cls(model, teacher, wrap(model), wrap(teacher) if teacher_learns else teacher)


class Learner:
    """A network that learns, with its optimizer and its schedule.

    Args:
        called: as training calls it.
        optimizer: of its parameters.
        schedule: of the optimizer's rates, one call a step.
        of_quantizers: ids of parameters that belong to quantizers, which are clipped apart.
    """

    def __init__(
        self,
        called: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        of_quantizers: Container[int] = (),
    ) -> None:
        self.called, self.optimizer, self.schedule, self._of_quantizers = called, optimizer, schedule, of_quantizers

    @property
    def lr(self) -> float:
        """The rate of its weights now."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    @property
    def peak(self) -> float:
        """The rate of its weights that the schedule rises to."""
        return float(self.schedule.base_lrs[0])

    def follow_schedule(self) -> None:
        """Set the rates of the next step: a schedule that was restored may be that of a shorter run, which had come to 0."""
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.schedule.last_epoch)

    def clip(self, limit: float | None) -> Tensor:
        """Clip its gradients; () their norm before."""
        return clip_gradients(self.called.parameters(), self._of_quantizers, limit)

    def step(self) -> None:
        """One step of the optimizer and of the schedule; gradients are gone after it."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()


@contextmanager
def placed(
    processes: Processes, adapter: Adapter, model: nn.Module, teacher: nn.Module | None, *, teacher_learns: bool
) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Student and teacher as they are trained: on the processes' device until the end of the block; or copies that are divided
    among the processes, and what they learned is in the networks themselves at its end. An error leaves those as they were.

    Args:
        processes: that train together.
        adapter: of the student's toolkit.
        model: the prepared model.
        teacher: or None.
        teacher_learns: whether the teacher is trained, too.
    """
    if not processes.divide:
        with on_device(processes.device, model, teacher):
            yield model, teacher
        return
    student, mentor = (None if network is None else divided_copy(network, processes.device) for network in (model, teacher))
    assert student is not None
    for network in (student, mentor):
        if network is not None:
            processes.compute_together(network)
    yield student, mentor
    adapter.freeze_ranges(model, True)
    model.load_state_dict(gathered(student))
    adapter.set_mode(model, False)
    if teacher_learns and teacher is not None and mentor is not None:
        teacher.load_state_dict(gathered(mentor))
        teacher.eval()


@contextmanager
def on_device(device: torch.device, *networks: nn.Module | None) -> Iterator[None]:
    """Within the block the networks are on a device; afterwards each is back where it was."""
    homes: list[tuple[nn.Module, Any]] = []
    try:
        for network in networks:
            tensor = None if network is None else next(network.parameters(), next(network.buffers(), None))
            if network is not None and tensor is not None:
                homes.append((network, tensor.device))
                move(network, device)
        yield
    finally:
        for network, home in homes:
            move(network, home)
