"""The one training loop, top to bottom: epochs, steps, evaluation, checkpoints.

It knows tensors, a method's phases and an adapter; no toolkit. Everything it needs is built before it begins, by
:func:`~qakd_plugin.training.assembly.assembled`.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from .._common.console import Progress
from .._common.history import NEARER, START, Picking, below_start, kept_of, start_of
from .._common.precision import wide
from ..augment.selector import Augmentation
from ..toolkits import Adapter
from . import curvature
from .batches import Batch, Batches
from .config import Resume, Settings
from .deployed_view import DeployedView, evaluated
from .distributed.observers import joint_ranges
from .distributed.processes import Processes
from .distributed.sharding import load_gathered
from .divergence import Moment, require_finite_gradient, require_finite_losses
from .ema import Ema
from .methods import Phase
from .networks import Learner, Networks
from .objective import Losses, Objective
from .outcome import Start, at_chance, line_of
from .run_state import Best, Position, RunState
from .validation import Validation, warn_of_one_class

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Trainer:
    """One run of one method on one student.

    Attributes:
        adapter: of the toolkit that prepared the student.
        networks: student and teacher.
        processes: that train together.
        epochs: the phase of each.
        batches: of training.
        augment: of them; it may choose before an epoch.
        objective: the losses of a phase on a batch.
        student: what trains the student.
        teacher: what trains a teacher that learns too, or None.
        ema: average of the student's weights, or None.
        view: the student as it would be deployed.
        validation: metrics of a network on the held-out split; empty without one.
        worth: of an epoch by its row, larger is better; None where nothing says.
        picking: names of the numbers that say it, and their direction.
        start: the prepared model's weights.
        state: position, best epoch, history, and checkpoints.
        settings: numbers of the run.
        checkpoint_every: also after so many optimizer steps; None for epochs only.
        callbacks: objects; their methods ``on_step_end(step, losses)`` and ``on_epoch_end(row)`` are called where they exist.
        own_rate: whether the rate was left to the run, which then answers for it: it returns nothing that is not clearly nearer
            the teacher than the start was.
        gradient_norm: of the last step, before clipping.
    """

    adapter: Adapter
    networks: Networks
    processes: Processes
    epochs: Sequence[Phase]
    batches: Batches
    augment: Augmentation
    objective: Objective
    student: Learner
    teacher: Learner | None
    ema: Ema | None
    view: DeployedView
    validation: Validation
    worth: Callable[[Mapping[str, Any]], float | None]
    picking: Picking
    start: Start
    state: RunState
    settings: Settings
    checkpoint_every: int | None
    callbacks: Sequence[object]
    own_rate: bool = False
    gradient_norm: float = math.nan

    def train(self, *, resume: Resume) -> None:
        """Train all epochs that are left, and load the best weights."""
        bar = Progress(len(self.epochs) * self.batches.steps, enabled=self.processes.is_main)
        ranges = joint_ranges(self.processes, self.adapter, self.networks.model)
        for learner in self._learners:  # gradients of somebody else's step would be added to the first
            learner.optimizer.zero_grad(set_to_none=True)
        with self.state.begun(resume=resume), ranges, bar as progress:
            progress.advance(self.state.position.step)
            for learner in self._learners:
                learner.follow_schedule()
            if self.state.position == Position():
                self._evaluate_start(progress)
            while self.state.position.epoch < len(self.epochs) and not self._has_stalled():
                self._epoch(self.epochs[self.state.position.epoch], progress)
            self._load(self._kept())
        self._say_how_it_ended()

    @property
    def _learners(self) -> list[Learner]:
        return [self.student, *([] if self.teacher is None else [self.teacher])]

    def _evaluate_start(self, progress: Progress) -> None:
        """The prepared model as it was passed in: draws nothing from training, and moves no range and no statistic."""
        with evaluated(self.adapter, self.networks.model):
            if not (numbers := self.validation.of_start(self.networks.model)):
                _log.info("Nothing is held out (val_loader): the last epoch is kept, and not the best.")
                if self.own_rate and self.batches.repeat and self.epochs[-1].only_imitates:
                    self.start.weights = self.view.weights()
                return
            row: dict[str, Any] = {"epoch": START, "phase": "start", **numbers}
            value = self.worth(row)
            if value is not None and not math.isnan(value):
                row["best"], self.start.weights = True, self.view.weights()
        self.state.history.append(row)
        progress.line(line_of(row, len(self.epochs), self.picking), _log)

    def _epoch(self, phase: Phase, progress: Progress) -> None:
        position = self.state.position
        if position.step_in_epoch == 0:
            self.augment.prepare(position.epoch, self.networks.teacher, self.networks.model, phase.needs_labels)
            if curvature.is_due(self.adapter, self.networks.model, position.epoch):
                self._refresh_curvature(phase)
        self._switch_to_training(phase)
        started, first = time.perf_counter(), position.samples
        for group in self.batches.epoch(position.epoch, position.step_in_epoch, labels=phase.needs_labels):
            losses = self._step(phase, group)
            progress.update(phase.name, losses, _rate(position.samples - first, started), position.mean("agreement"))
            self._tell("on_step_end", position.step, losses)
            if self.checkpoint_every and position.step % self.checkpoint_every == 0:
                self.state.save()
        row = {"epoch": position.epoch, "phase": phase.name, **position.means(), "lr": self.student.lr}
        row["images_per_second"] = _rate(position.samples - first, started)
        with self.view.shown():
            row |= self.validation(self.networks.model)
            self._remember_if_best(row)
        self.state.history.append(row | self.augment.row())
        self.state.position = position.next_epoch()
        self.state.save()
        if position.epoch == 0 and phase.needs_labels:
            seen = self.processes.gather(self.batches.label_range)
            warn_of_one_class("loader", seen, "the student can learn nothing else")
        progress.line(line_of(self.state.history[-1], len(self.epochs), self.picking), _log)
        self._tell("on_epoch_end", self.state.history[-1])

    def _step(self, phase: Phase, group: Sequence[Batch]) -> dict[str, float]:
        """One optimizer step on one batch, or on several whose gradients add up to that of their union."""
        learners = [self.student, *([self.teacher] if self.teacher is not None and phase.teacher else [])]
        samples, numbers = sum(batch.total for batch in group), []
        for index, batch in enumerate(group):
            with self._gradients_stay_here(learners, index + 1 < len(group)):
                losses = self.objective(phase, batch)
                self.processes.agree()
                with self.processes.waiting():
                    self._backward(losses, batch.weight * self.processes.count / samples)
                    for learner in learners:
                        self.processes.average_buffers(learner.called)
            numbers.append(losses.numbers)
        with self.processes.waiting():
            norms = [learner.clip(self.settings.grad_clip) for learner in learners]
            values = self._finite_values(phase, group, numbers, norms)
        for learner in learners:
            learner.step()
        if self.ema is not None:
            self.ema.update()
        step: dict[str, float] = {}
        for batch, found in zip(group, values, strict=True):
            self.state.position.count(batch.total, found)
            for name, value in found.items():
                step[name] = step.get(name, 0.0) + batch.total / samples * value
        self.state.position.step_in_epoch += len(group)
        self.state.position.step += 1
        step.pop("agreement", None)
        return step

    def _backward(self, losses: Losses, share: float) -> None:
        """``share``: of the batch in the step, times the number of processes, over which gradients are averaged."""
        for loss in (losses.student, losses.teacher):
            if loss is not None:
                self.processes.accelerator.backward(loss if share == 1 else share * loss)

    def _finite_values(
        self,
        phase: Phase,
        group: Sequence[Batch],
        numbers: Sequence[dict[str, torch.Tensor]],
        norms: Sequence[torch.Tensor],
    ) -> list[dict[str, float]]:
        """The numbers of each batch, over all processes. The one place of a step where the host waits for the device."""
        mine = torch.stack([torch.stack([*found.values()]) for found in numbers])
        means = self.processes.weighted_mean(mine, [b.weight for b in group], [b.total for b in group])
        read = torch.cat([means.flatten(), *(wide(norm).reshape(1) for norm in norms)]).tolist()
        names = list(numbers[0])
        values = [dict(zip(names, read[start:], strict=False)) for start in range(0, means.numel(), len(names))]
        self._require_finite(phase, group, values, read[means.numel() :])
        self.gradient_norm = read[means.numel()]
        return values

    def _require_finite(
        self, phase: Phase, group: Sequence[Batch], values: Sequence[dict[str, float]], norms: Sequence[float]
    ) -> None:
        if all(map(math.isfinite, itertools.chain(norms, *(found.values() for found in values)))):
            return
        position = self.state.position
        moment = Moment(
            phase.name,
            position.epoch,
            position.step_in_epoch,
            position.step,
            self.student.peak,
            self.gradient_norm,
            self.state.way_back(),
            rate=self.settings.rate_name,
        )
        for index, (batch, found) in enumerate(zip(group, values, strict=True)):
            here = replace(moment, batch=moment.batch + index)
            require_finite_losses(found, batch.inputs, self.networks.model, here)
        for norm in norms:
            require_finite_gradient(norm, values[-1]["loss"], moment, self.adapter, self.networks.model, group[0].inputs)

    @contextmanager
    def _gradients_stay_here(self, learners: Sequence[Learner], more: bool) -> Iterator[None]:
        """Within the block processes do not average gradients, if there are ``more`` to come before the step."""
        with ExitStack() as stack:
            for learner in learners if more else ():
                stack.enter_context(self.processes.accelerator.no_sync(learner.called))
            yield

    def _refresh_curvature(self, phase: Phase) -> None:
        """On one batch, in eval mode; draws nothing from training."""
        with self.batches.aside(labels=phase.needs_labels) as batches, evaluated(self.adapter, self.networks.model):
            self.objective.refresh_curvature(phase, next(batches))
        self.processes.agree()
        self.processes.average_buffers(self.networks.model)

    def _switch_to_training(self, phase: Phase) -> None:
        self.adapter.freeze_ranges(self.networks.model, False)
        self.adapter.set_mode(self.networks.model, True)
        if self.teacher is not None and phase.teacher:
            self.teacher.called.train()

    def _remember_if_best(self, row: dict[str, Any]) -> None:
        value, start = self.worth(row), start_of(self.state.history)
        if value is None:
            return
        better = value > self.state.best.value
        if better:
            self.state.best = Best(row["epoch"], value, self.view.weights())
        least = self.worth(start) if start is not None and self.start.weights is not None else None
        row["best"] = better and (least is None or value >= least)
        if row["best"]:
            self.start.weights = None

    def _has_stalled(self) -> bool:
        """Whether the last phase has gone on for ``patience`` epochs without a better one. Earlier phases run to their end."""
        if self.settings.patience is None:
            return False
        last = len(self.epochs) - self.epochs[-1].epochs
        return self.state.position.epoch - max(self.state.best.epoch + 1, last) >= self.settings.patience

    def _kept(self) -> dict[str, Any]:
        """The best weights, of an epoch or the start; nothing held out: the last, where it is clearly nearer the teacher."""
        if self.state.best.state is not None:
            return self.state.best.state if self.start.weights is None else self.start.weights
        with self.view.shown():
            last = self.view.weights()
            after = None if self.start.weights is None else self._distance()
        if self.start.weights is None or after is None:
            return last
        with evaluated(self.adapter, self.networks.model):
            load_gathered(self.networks.model, self.start.weights)
            before = self._distance()
        assert before is not None
        if after <= NEARER * before:
            return last
        self.state.history[-1] |= {"eval_loss": after, "start_eval_loss": before}  # which says what was kept
        self.state.save_history()
        return self.start.weights

    def _distance(self) -> float | None:
        """Of the student in eval mode to its teacher, on the same training batches whenever it is asked between two epochs.

        None where eval mode lacks an output that is compared.
        """
        total = samples = 0.0
        with self.batches.aside(augmented=self.batches.has_cache) as batches:  # cached are those that training sees
            for batch in islice(batches, _COMPARED):
                loss = self.objective.distance(self.epochs[-1], self.batches.looked_up(batch))
                if loss is None:
                    return None
                total, samples = total + batch.weight * float(loss), samples + batch.weight
        total, samples = self.processes.sums([total, samples])
        return total / samples

    def _load(self, kept: dict[str, Any]) -> None:
        """Eval mode, frozen ranges, and these weights."""
        model = self.networks.model
        # First, because the state of some toolkits' quantizers says whether their ranges are frozen: freezing remembers which
        # were free, for whoever goes on training.
        self.adapter.freeze_ranges(model, True)
        load_gathered(model, kept)
        self.adapter.set_mode(model, False)
        if self.teacher is not None:
            self.teacher.called.eval()

    def _say_how_it_ended(self) -> None:
        if not self.processes.is_main:
            return
        history = self.state.history
        if (lost := below_start(history, self.picking)) is not None:
            _log.warning(
                "%s Lower %s=%g, or leave training out where nothing is lost without it.",
                lost,
                self.settings.rate_name,
                self.student.peak,
            )
        if (nothing := at_chance(kept_of(history), self.validation.classes)) is not None:
            _log.warning("%s", nothing)

    def _tell(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            if (method := getattr(callback, event, None)) is not None:
                method(*args)


_COMPARED = 32
"""Training batches at most on which the last epoch is compared with the start. A few samples make most of the difference."""


def _rate(samples: int, started: float) -> float:
    return samples / (time.perf_counter() - started)
