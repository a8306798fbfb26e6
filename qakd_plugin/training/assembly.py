"""Puts a run together: everything that training needs is built, and checked on one batch, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..augment.selector import Augmentation, CMISelector, FixedAugmentation, SelectedAugmentation
from ..errors import QakdError, TrainingError
from ..quantizers.compiled import compiled_kernels
from ..tasks.batches import batch_splitter
from ..tasks.evaluation import picking, value_of
from ..tasks.inputs import Inputs, arguments, require_known, to_device
from ..tasks.outputs import Outputs, frozen_output, named_outputs
from ..toolkits import Adapter
from .autocast import autocast, float32_quantizers
from .batches import Batches
from .checkpoint import CheckpointStore
from .config import Data, Settings
from .curvature import refreshes
from .deployed_view import DeployedView, evaluated
from .distributed.launch import require_batch_norms_run
from .distributed.processes import Processes
from .distributed.sharding import WholeEma, WholeNetwork, WholeOptimizer, require_divisible
from .distributed.shards import require_own_streams, smallest_batch
from .ema import Ema
from .methods import Method, Phase
from .networks import Learner, Networks, placed
from .objective import Objective
from .optimizers import cosine_schedule, quantizer_parameters, scales_alone, student_optimizer, teacher_optimizer
from .outcome import Start
from .preflight import (
    check_against_teacher,
    check_counted,
    check_exportable,
    check_first_batch,
    check_ranges,
    check_smallest_batch,
    check_taught,
    classes_learned,
    first_call_named,
)
from .run_state import RunState, Stateful
from .streams import length_of
from .teacher_cache import TeacherCache
from .trainer import Trainer
from .validation import Validation


@dataclass(frozen=True)
class Lesson:
    """Who learns what from whom.

    Attributes:
        adapter: of the toolkit that prepared ``model``.
        model: the student.
        teacher: that was passed in; None where there is none.
        method: its losses.
        phases: of the method.
    """

    adapter: Adapter
    model: nn.Module
    teacher: nn.Module | None
    method: Method
    phases: Sequence[Phase]

    @property
    def teacher_learns(self) -> bool:
        """Whether some phase trains the teacher."""
        return any(phase.teacher for phase in self.phases)

    @property
    def epochs(self) -> list[Phase]:
        """The phase of each epoch."""
        return [phase for phase in self.phases for _ in range(phase.epochs)]


@contextmanager
def assembled(
    lesson: Lesson,
    data: Data,
    settings: Settings,
    processes: Processes,
    *,
    cache: TeacherCache | None,
    store: CheckpointStore | None,
    checkpoint_every: int | None,
    callbacks: Sequence[object],
    own_rate: bool = False,
) -> Iterator[Trainer]:
    """A trainer that is ready to begin; at the end of the block hooks are off and networks are on the devices they came from.

    Args:
        lesson: its teacher is the run's own copy where it learns too.
        data: to train and to validate with.
        settings: numbers of the run.
        processes: that train together.
        cache: of what the teacher outputs, or None; filled here.
        store: where checkpoints go, or None.
        checkpoint_every: also after so many optimizer steps.
        callbacks: see :class:`~qakd_plugin.training.trainer.Trainer`.
        own_rate: likewise.

    Raises:
        QakdError: processes disagree, or the first batch shows that training cannot begin.
    """
    _require_agreement(processes, data, store, checkpoint_every)
    require_batch_norms_run("prepared_model", lesson.model, processes.device, processes.count)
    if lesson.teacher_learns:
        require_batch_norms_run("teacher", lesson.teacher, processes.device, processes.count)
    if processes.divide:
        _require_divisible(lesson, data, processes)
    computing = partial(autocast, settings.mixed_precision, processes.device)
    augment, adapter = _augmentation(data, processes), lesson.adapter
    places = placed(processes, adapter, lesson.model, lesson.teacher, teacher_learns=lesson.teacher_learns)
    kernels = compiled_kernels(processes.device) if settings.compile_quantizers else nullcontext()
    with (
        scales_alone(adapter, lesson.model, settings.trainable),  # before DDP asks which gradients it is to wait for
        places as (model, teacher),
        float32_quantizers(adapter, model),
        kernels,
    ):
        prepared, lesson = lesson.model, replace(lesson, model=model, teacher=teacher)
        batches = Batches(
            data.loader,
            processes,
            batch_fn=batch_splitter(data.batch_fn, model),
            augment=augment,
            method=lesson.method,
            accumulate=settings.accumulate,
            steps_per_epoch=data.steps_per_epoch,
            cache=cache,
            masks=_masks(lesson.phases),
        )
        validation = Validation(data, teacher, lesson.phases, processes)
        compared = _check_first_batch(lesson, prepared, data, batches, settings, processes, computing)
        processes.agree()
        networks = Networks.of(model, teacher, processes, teacher_learns=lesson.teacher_learns)
        objective = Objective(adapter, networks, lesson.phases, computing)
        try:
            student, mentor = _learners(lesson, networks, settings, batches.steps)
            parts = _parts(networks, student, mentor, processes)
            parts |= {"augmentation": augment, "start": (start := Start())}
            if (ema := None if settings.ema is None else Ema(model, settings.ema)) is not None:
                parts["ema"] = WholeEma(ema, model, keep=processes.is_main) if processes.divide else ema
            if cache is not None and teacher is not None:
                _fill(cache, teacher, compared, batches, processes, computing)
            view = DeployedView(
                adapter,
                model,
                batches,
                processes,
                ema=ema,
                recalibrate_batches=settings.recalibrate_batches,
                autocast=computing,
            )
            yield Trainer(
                adapter=adapter,
                networks=networks,
                processes=processes,
                epochs=lesson.epochs,
                batches=batches,
                augment=augment,
                objective=objective,
                student=student,
                teacher=mentor,
                ema=ema,
                view=view,
                validation=validation,
                worth=partial(value_of, metric=data.metric, monitor=data.monitor),
                picking=partial(picking, metric=data.metric, monitor=data.monitor),
                start=start,
                state=RunState(parts, batches, processes, store),
                settings=settings,
                checkpoint_every=checkpoint_every,
                callbacks=callbacks,
                own_rate=own_rate,
            )
        finally:
            objective.close()


def _require_agreement(processes: Processes, data: Data, store: CheckpointStore | None, checkpoint_every: int | None) -> None:
    """Several processes make their steps and their checkpoints together, or wait for each other for ever."""
    if data.steps_per_epoch is None:
        processes.require_equal("the length of loader", length_of(data.loader))
    elif processes.count > 1 and isinstance(data.loader, DataLoader) and not isinstance(data.loader.dataset, IterableDataset):
        raise QakdError(
            f"steps_per_epoch: each of the {processes.count} processes would read the whole data set. Leave it out: a "
            "DataLoader over a map-style data set is shared out among the processes. A stream is read by each for itself."
        )
    processes.require_equal("steps_per_epoch", data.steps_per_epoch)
    where = None if store is None else str(store.folder)
    processes.require_equal("checkpoint_dir and checkpoint_every", (where, checkpoint_every))
    if store is not None:
        how = f"{processes.count}, with networks divided" if processes.divide else processes.count
        store.fingerprint = {"processes": how, **store.fingerprint}  # named first: loaders differ with it


def _require_divisible(lesson: Lesson, data: Data, processes: Processes) -> None:
    """Raise QakdError where networks cannot be divided, or something reads them in one process alone."""
    for network in (lesson.model, lesson.teacher):
        if network is not None:
            require_divisible(network)
    if data.val_loader is not None:
        length = length_of(data.val_loader)
        if length is None:
            raise QakdError(
                f"val_loader ({type(data.val_loader).__name__}) has no length, and networks that are divided must be called as "
                "often in each process as in the others. Pass a DataLoader over a map-style data set, or a list of batches."
            )
        processes.require_equal("the length of val_loader", length)
    if isinstance(data.augment, CMISelector):
        raise QakdError(
            "augment=CMISelector() ranks with the teacher in one process, and it is divided among all. Rank before, with "
            "qakd.rank_augmentations(teacher, batches), and pass the callable that came first."
        )
    if refreshes(lesson.adapter, lesson.model):
        raise QakdError(
            "EWGS refreshes delta by differentiating twice, and networks that FSDP2 divides cannot be. Set delta yourself, "
            "qakd.use_quantizers(prepared_model, qakd.EWGS(refresh_every=0, delta=...)), or use LSQ."
        )


def _augmentation(data: Data, processes: Processes) -> Augmentation:
    if isinstance(data.augment, CMISelector):
        return SelectedAugmentation(data.augment, data.loader, data.batch_fn, data.input_stats, processes.from_main)
    return FixedAugmentation(data.augment, data.input_stats)


def _masks(phases: Sequence[Phase]) -> bool:
    """Whether masks are read, which targets may hold."""
    matches = [phase.imitation.match or {} for phase in phases if phase.imitation is not None]
    return any(isinstance(matcher.where, str) for match in matches for matcher in match.values())


def _check_first_batch(
    lesson: Lesson,
    prepared: nn.Module,
    data: Data,
    batches: Batches,
    settings: Settings,
    processes: Processes,
    computing: Callable[[], AbstractContextManager[Any]],
) -> tuple[str, ...]:
    """One forward pass of both networks before anything is trained: checks, and lazily made parameters.

    Returns:
        The outputs of the teacher that training reads.
    """
    adapter, model, teacher = lesson.adapter, lesson.model, lesson.teacher
    labels = any(phase.needs_labels for phase in lesson.phases)
    with batches.aside(labels=labels, augmented=False) as some, torch.no_grad():
        first = next(some, None)
        if first is None:
            raise TrainingError("loader is empty: it yielded no batch. Check the data set and drop_last.")
        inputs = first.inputs
        if not batches.repeat:
            require_own_streams(inputs, processes)
        require_known(model, inputs, "prepared_model")
        args, kwargs = arguments(inputs)
        with evaluated(adapter, model):
            with computing(), first_call_named(model, inputs):
                student = named_outputs(model(*args, **kwargs))
                taught = None if teacher is None else named_outputs(frozen_output(teacher, *args, **kwargs))
            check_first_batch(model, student, inputs)
            if labels:
                batches.classes = classes_learned(lesson.phases, student, inputs)
            if data.val_loader is not None and data.metric is None:
                check_counted(lesson.phases, student, inputs)
            if taught is not None:
                check_taught(lesson.phases, student, taught, inputs, first.targets, validated=data.val_loader is not None)
            # What it looks for is done by toolkits whose students cannot be divided.
            if teacher is not None and taught is not None and settings.mixed_precision == "no" and not processes.divide:
                check_against_teacher(adapter, model, teacher, taught, inputs)
            if processes.is_main and not processes.divide:
                check_exportable(adapter, model, inputs)
            adapter.set_mode(model, True)  # with the ranges frozen still
            with computing():
                check_smallest_batch(model, inputs, smallest_batch(data.loader, processes))
                check_ranges(adapter, model, inputs)
        if processes.is_main and processes.divide:
            with evaluated(adapter, prepared):
                check_exportable(adapter, prepared, to_device(inputs, next(prepared.parameters()).device))
    return () if taught is None else _compared(lesson.phases, taught, inputs)


def _compared(phases: Sequence[Phase], taught: Outputs, inputs: Inputs) -> tuple[str, ...]:
    """Outputs of the teacher that training reads: those that are matched, or all where the user's masks may read any."""
    imitation = next((phase.imitation for phase in phases if phase.imitation is not None), None)
    match = {} if imitation is None else imitation.matched(taught, inputs)
    return tuple(taught) if any(callable(matcher.where) for matcher in match.values()) else tuple(match)


def _learners(lesson: Lesson, networks: Networks, settings: Settings, steps: int) -> tuple[Learner, Learner | None]:
    """What trains the student, and what trains the teacher where it learns too; ``steps`` in an epoch."""
    adapter, model = lesson.adapter, lesson.model
    optimizer = student_optimizer(adapter, model, settings)
    schedule = cosine_schedule(optimizer, len(lesson.epochs) * steps, settings.warmup)
    student = Learner(networks.called_student, optimizer, schedule, quantizer_parameters(adapter, model))
    together = sum(phase.epochs for phase in lesson.phases if phase.teacher)
    if networks.teacher is None or networks.called_teacher is None or not together:
        return student, None
    second = teacher_optimizer(networks.teacher, settings)
    return student, Learner(networks.called_teacher, second, cosine_schedule(second, together * steps, settings.warmup))


def _fill(
    cache: TeacherCache,
    teacher: nn.Module,
    names: Sequence[str],
    batches: Batches,
    processes: Processes,
    computing: Callable[[], AbstractContextManager[Any]],
) -> None:
    def outputs(inputs: Inputs) -> Outputs:
        args, kwargs = arguments(inputs)
        with computing():
            found = named_outputs(frozen_output(teacher, *args, **kwargs))
        return {name: found[name].float() if found[name].is_floating_point() else found[name] for name in names}

    cache.require(names)
    with batches.aside() as some:
        cache.fill((batch.inputs for batch in some), outputs, processes)


def _parts(networks: Networks, student: Learner, teacher: Learner | None, processes: Processes) -> dict[str, Stateful]:
    """What checkpoints hold of what learns, by its name there."""

    def of(prefix: str, network: nn.Module, learner: Learner) -> dict[str, Stateful]:
        name = prefix.removesuffix("_") or "student"
        keep, divided = processes.is_main, processes.divide
        return {
            name: WholeNetwork(network, keep=keep) if divided else network,
            f"{prefix}optimizer": WholeOptimizer(learner.optimizer, network, keep=keep) if divided else learner.optimizer,
            f"{prefix}scheduler": learner.schedule,
        }

    parts = of("", networks.model, student)
    if teacher is not None and networks.teacher is not None:
        parts |= of("teacher_", networks.teacher, teacher)
    return parts
