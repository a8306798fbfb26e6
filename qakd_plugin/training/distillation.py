"""``distill``: one call on a prepared model."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec

from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import AdamW

from .._common.arguments import positive_whole
from .._common.console import say
from .._common.history import kept_of
from .._common.module_copy import copied, uncompiled
from .._common.one_at_a_time import one_at_a_time
from .._common.training_record import TrainingRecord, record_training
from ..augment.data import Stats
from ..augment.selector import CMISelector
from ..errors import QakdError
from ..preparation.description import describe
from ..tasks.batches import BatchFn, default_batch
from ..tasks.metrics import AnyMetric, MetricFn, outputs_and_targets
from ..tasks.task_loss import TaskLoss, check_task_loss
from ..toolkits import adapter_for
from .assembly import Lesson, assembled
from .checkpoint import CheckpointStore
from .config import Checkpoints, Data, MakeOptimizer, MixedPrecision, Resume, Settings, Trainable
from .data_facts import data_facts, hidden_state
from .distributed.launch import require_whole
from .distributed.processes import Processes
from .fingerprint import fingerprint
from .methods import SQAKD, Method, left_out, planned
from .optimizers import optimizer_name, require_scales, with_rate
from .preflight import check_precision, check_quantizers, check_separate, check_trainable
from .streams import is_walked_once, length_of
from .teacher_cache import TeacherCache
from .teachers import one_teacher, require_teacher
from .tracking import Tracking
from .trainer import Trainer

_log = logging.getLogger(__name__)
P = ParamSpec("P")


@dataclass(frozen=True)
class DistillResult:
    """What a run leaves.

    Attributes:
        model: the prepared model that was passed in, trained: best weights loaded, ranges frozen, in eval mode.
        history: one row per epoch: phase, losses by name, learning rate, throughput, metrics on the held-out split, and whether
            they were the best so far. With ``val_loader`` the first row is of the prepared model before training: epoch -1,
            phase "start".
        metrics: the row of the weights that were kept, of an epoch or of the start (epoch -1).
        teacher: the network that taught: the one passed in, or its trained copy where the method trains it.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    teacher: nn.Module | None


def _one_way_to_set(function: Callable[P, DistillResult]) -> Callable[P, DistillResult]:
    """Refuse ``settings=`` together with a keyword that it holds: which of them counts?"""

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> DistillResult:
        twice = [part.name for part in fields(Settings) if part.name in options]
        if options.get("settings") is not None and twice:
            raise QakdError(f"settings= holds {', '.join(twice)} already: pass them in it, Settings({twice[0]}=...), or alone.")
        return function(*args, **options)

    return checked


@one_at_a_time
@_one_way_to_set
def distill(
    prepared_model: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    loader: Iterable[Any],
    *,
    method: Method | None = None,
    epochs: int = 10,
    steps_per_epoch: int | None = None,
    val_loader: Iterable[Any] | None = None,
    augment: Callable[[Tensor], Tensor] | CMISelector | None = None,
    input_stats: Stats | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: Resume = False,
    seed: int | None = None,
    mixed_precision: MixedPrecision = "no",
    compile_quantizers: bool = False,
    callbacks: Sequence[object] = (),
    batch_fn: BatchFn = default_batch,
    lr: float | None = None,
    quantizer_lr: float = 1e-3,
    activation_quantizer_lr: float | None = None,
    teacher_lr: float = 1e-4,
    weight_decay: float = 1e-4,
    grad_clip: float | None = 1.0,
    warmup: float = 0.05,
    accumulate: int = 1,
    ema: float | None = None,
    recalibrate_batches: int = 0,
    patience: int | None = None,
    trainable: Trainable = "all",
    cache_teacher: str | os.PathLike[str] | None = None,
    trackers: Sequence[Any] | None = None,
    optimizer: MakeOptimizer = AdamW,
    task_loss: TaskLoss | None = None,
    metric: AnyMetric | None = None,
    metric_fn: MetricFn = outputs_and_targets,
    monitor: str | None = None,
    settings: Settings | None = None,
) -> DistillResult:
    """Train a model that a quantization toolkit has prepared, with the losses of a distillation method.

    The model is trained in place, with AdamW by default, and a cosine schedule. Labels are read only if the method needs them.

    Launched with torchrun or ``accelerate launch``, processes train together: each takes its share of the batches, no sample is
    lost or counts twice, and all return the same model. A joined batch gives the weights that one process gives, to float
    tolerance, in networks without BatchNorm in training: BatchNorm normalizes with each process's share, as it does in any data
    parallel training, and its statistics are averaged after each step. See docs/training.md. Launched with ``accelerate launch
    --use_fsdp --fsdp_version 2`` each process trains a part of both networks, and whole ones come back: see docs/scale.md.

    Args:
        prepared_model: prepared and calibrated by ModelOpt, torchao (PT2E, QATConfig) or torch.ao (FX, eager).
        teacher: full-precision network with the same classes, larger or not; or several, of which the mean logits teach. It is
            left as it was, bit for bit, in its own mode; a method that trains the teacher trains a copy, which
            ``result.teacher`` holds. None for methods that need none.
        loader: training batches; x, (x, y), a dict, or anything ``batch_fn`` splits. x is a tensor, (N, C, H, W)
            for images; a mapping's entries go in by keyword.
        method: SQAKD() by default; QKD, KD, QAT.
        epochs: passes over ``loader``.
        steps_per_epoch: optimizer steps in an epoch, for a loader without a length or an end; each epoch goes on where the one
            before ended. A resumed run asks the loader's ``state_dict``; one without reads again what was given out, and drops
            it. None: the whole loader.
        val_loader: held-out batches that pick the best epoch, by accuracy where they have labels, else by agreement with the
            teacher. The prepared model is counted first, and kept where no epoch is as good; a warning says so. Without them
            the last epoch is kept; but the prepared model, with a warning, where ``lr`` is not given and a student that learns
            from its teacher alone ends at more than 75 % of its first distance to it, in eval mode, on up to 32 training
            batches (not of a stream). Never the split that is reported.
        augment: callable on a batch of images in [0, 1]; both networks see what it returns. Or ``CMISelector(...)``, which
            ranks augmentations with the teacher before training, and trains with the best.
        input_stats: (mean, std) per channel when the loader yields normalised images, so that ``augment`` sees [0, 1].
        checkpoint_dir: full state after every epoch, and ``history.jsonl``. Of a run of its own, unless ``resume`` is given.
        checkpoint_every: and after every so many optimizer steps.
        resume: go on bit-identically from the newest whole checkpoint; an empty directory starts afresh. With more ``epochs``
            than before a run of one phase is prolonged: its schedule goes on as that of the longer run. What else changed since
            is refused by name; "force" goes on all the same, with other numbers.
        seed: of torch, numpy and random, set before anything is drawn; each further process takes the next number.
        mixed_precision: "no" or "bf16"; quantizers compute in float32 either way.
        compile_quantizers: learned quantizers run in kernels of torch.compile: one pass over memory in each direction, and no
            output of theirs is kept. Meant for GPUs. Compiling takes time before the first step, once on a machine. Outputs and
            gradients of inputs are the same bits, sums for scales are added up in another order.
        callbacks: objects; ``on_step_end(step, losses)`` and ``on_epoch_end(row)`` are called where they exist.
        batch_fn: splits a batch into (inputs, targets or None); inputs are a tensor, a tuple of positional arguments or a
            mapping of keywords. The default takes what forward knows by name; labels, label, targets, target or y are targets.
        lr: peak learning rate of the weights. None: chosen by the fewest bits of a quantizer and the optimizer, and logged, see
            docs/choosing.md, "The rate".
        quantizer_lr: of parameters that belong to quantizers, as a relative change per step; they get no weight decay.
        activation_quantizer_lr: of those of activations, where it differs.
        teacher_lr: of a teacher that learns too.
        weight_decay: of weights with more than one dimension.
        grad_clip: largest gradient norm; None for none.
        warmup: share of all steps with a rising learning rate.
        accumulate: batches per optimizer step; gradients are those of their union.
        ema: decay of a moving average of all weights, e.g. 0.999, which is evaluated and kept in their place. None for none.
        recalibrate_batches: training batches that refresh the statistics of BatchNorm before each evaluation; 32 forget nearly
            all of the past. Worth it with ``ema`` and at 2 to 4 bits.
        patience: stop after so many epochs of the last phase without a better one on ``val_loader``. None never stops.
        trainable: "all", or "scales": parameters of quantizers alone, at ``quantizer_lr``; weights, biases, norms and
            statistics of BatchNorm stay as they are, bit for bit.
        cache_teacher: file for what the teacher outputs (all that is matched), computed in one pass before training, for data
            that look the same in every epoch (no augmentation, or one seeded by sample). Read again by later runs; refused when
            teacher or data changed.
        trackers: names or trackers of accelerate ("wandb", "mlflow", ...) that get the history's numbers. None: TensorBoard in
            ``checkpoint_dir``, where it is installed.
        optimizer: an optimizer's class, or a ``functools.partial`` of one, called with parameter groups and ``lr=``. Rates of
            quantizers are relative changes per step with Adam's step only.
        task_loss: what is learned from labels: a callable(outputs, targets) that returns a scalar or (N,), e.g. an nn.Module
            loss; outputs are a tensor where there is one, else a dict by path. "model": the network's own loss. None:
            cross-entropy.
        metric: of torchmetrics, counted on ``val_loader`` for student and teacher in the place of accuracy.
        metric_fn: callable(outputs, targets) that returns what ``metric.update`` takes; None: the output and the targets.
        monitor: which of the metric's numbers picks the best epoch, in the metric's own direction; needed where it has several.
        settings: ``lr`` to ``trainable``, ``mixed_precision``, ``compile_quantizers`` and ``optimizer`` as one object; then
            none of them is passed by itself.

    Returns:
        The model, the history, final metrics.

    Raises:
        NotPreparedError: no toolkit prepared the model, or a range was never calibrated; names it.
        LabelsRequiredError: the method needs labels and the loader yields none.
        TrainingError: an input, a loss or a gradient is not finite (names batch and layer), or no weight requires a gradient.
        CheckpointError: a checkpoint belongs to another run, cannot be written, or is there though ``resume`` is False.
        QakdError: another argument is wrong; names it.
    """
    prepared_model = uncompiled(prepared_model)
    lesson = _lesson(prepared_model, one_teacher(teacher), SQAKD() if method is None else method, epochs, task_loss)
    settings = settings or Settings(
        lr=lr,
        quantizer_lr=quantizer_lr,
        activation_quantizer_lr=activation_quantizer_lr,
        teacher_lr=teacher_lr,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        warmup=warmup,
        mixed_precision=mixed_precision,
        compile_quantizers=compile_quantizers,
        accumulate=accumulate,
        ema=ema,
        recalibrate_batches=recalibrate_batches,
        patience=patience,
        trainable=trainable,
        optimizer=optimizer,
    )
    own_rate, settings = settings.lr is None, with_rate(settings, lesson.adapter, prepared_model)
    data = Data(loader, val_loader, batch_fn, augment, input_stats, task_loss, metric, metric_fn, monitor, steps_per_epoch)
    checkpoints = Checkpoints.of(checkpoint_dir, checkpoint_every, resume)
    _check(lesson, data, settings, cache_teacher)
    lesson = _with_own_teacher(lesson)
    run = _run(lesson, data, settings, checkpoints, seed, cache_teacher, trackers, callbacks, own_rate=own_rate)
    with run as trainer:
        try:
            trainer.train(resume=resume)
        except BaseException:
            if not trainer.processes.divide:  # the weights that it leaves are trained as well
                _record(trainer, lesson, kept=None)
            raise
    history = trainer.state.history
    result = DistillResult(lesson.model, history, dict(kept_of(history)), lesson.teacher)
    _record(trainer, lesson, kept=result.metrics["epoch"])
    return result


def _lesson(model: nn.Module, teacher: nn.Module | None, method: Method, epochs: int, task_loss: TaskLoss | None) -> Lesson:
    """Both networks and the method, which fit together."""
    require_whole("prepared_model", model)
    adapter = adapter_for(model)
    positive_whole("epochs", epochs)
    check_task_loss(task_loss)
    phases = planned(method, epochs, task_loss)
    require_whole("teacher", teacher)
    require_teacher(method, phases, teacher)
    if teacher is not None:
        check_separate(model, teacher)
        check_precision(teacher, learns=any(phase.teacher for phase in phases))
    check_quantizers(adapter, model)
    check_trainable(adapter, model)
    missing, fewest = left_out(method, phases)
    if missing:
        _log.warning(
            "%s leaves out %s in %d epochs: phases end at whole epochs. Train for at least %d, or give the phases in epochs.",
            type(method).__name__,
            " and ".join(missing),
            epochs,
            fewest,
        )
    return Lesson(adapter, model, teacher, method, phases)


def _check(lesson: Lesson, data: Data, settings: Settings, cache_teacher: str | os.PathLike[str] | None) -> None:
    """Raise QakdError where options do not fit the lesson or each other."""
    _check_loader(data, cache_teacher)
    if settings.trainable == "scales":
        require_scales(lesson.adapter, lesson.model)
    if settings.patience is not None and data.val_loader is None:
        raise QakdError("patience needs val_loader: held-out batches say whether an epoch is better.")
    if isinstance(data.augment, CMISelector) and lesson.teacher is None:
        raise QakdError("augment=CMISelector() ranks augmentations with the teacher: pass a teacher, or another augment.")
    if cache_teacher is not None:
        _check_cache(lesson, data, cache_teacher)
    quantizers = lesson.adapter.quantizers(lesson.model)
    if settings.compile_quantizers and not any(lesson.adapter.learned(quantizer) for quantizer in quantizers):
        raise QakdError(
            "compile_quantizers=True is for learned quantizers, and the prepared model has none. Call "
            "qakd.use_quantizers(prepared_model, qakd.LSQ()) first, or leave it out."
        )


def _check_loader(data: Data, cache_teacher: str | os.PathLike[str] | None) -> None:
    length, name = length_of(data.loader), type(data.loader).__name__
    if length == 0:
        raise QakdError("loader is empty: it holds no batch. Check the data set, the batch size and drop_last.")
    if length is None and data.steps_per_epoch is None:
        raise QakdError(
            f"loader ({name}) has no length, which the schedule needs. Pass steps_per_epoch=, how many optimizer steps make an "
            "epoch, or a DataLoader over a map-style data set."
        )
    if data.steps_per_epoch is None and not is_walked_once(data.loader):
        return
    if cache_teacher is not None:
        raise QakdError("cache_teacher needs data that can be walked again from the beginning. Leave out cache_teacher.")
    if isinstance(data.augment, CMISelector):
        raise QakdError(
            "augment=CMISelector() looks at the training data over and over, which a stream cannot give. Rank before, with "
            "qakd.rank_augmentations(teacher, batches) and a list of some batches, and pass the callable that came first."
        )


def _check_cache(lesson: Lesson, data: Data, path: str | os.PathLike[str]) -> None:
    name = type(lesson.method).__name__
    if lesson.teacher is None or not any(phase.needs_teacher for phase in lesson.phases):
        raise QakdError(f"cache_teacher={str(path)!r}, but {name} needs no teacher. Leave it out.")
    if lesson.teacher_learns:
        raise QakdError(f"cache_teacher: the teacher of {name} learns too, so its outputs change. Leave it out.")
    if any(phase.features for phase in lesson.phases):
        raise QakdError("cache_teacher holds outputs only; features need the teacher's forward pass. Leave one of them out.")
    if isinstance(data.augment, CMISelector):
        raise QakdError("cache_teacher needs images that look the same in every epoch; augment=CMISelector() draws new ones.")


@contextmanager
def _run(
    lesson: Lesson,
    data: Data,
    settings: Settings,
    checkpoints: Checkpoints,
    seed: int | None,
    cache_teacher: str | os.PathLike[str] | None,
    trackers: Sequence[Any] | None,
    callbacks: Sequence[object],
    *,
    own_rate: bool,
) -> Iterator[Trainer]:
    """Processes, seeds, files and trackers, and the trainer that uses them."""
    with Processes() as processes:
        _announce(lesson, processes)
        if seed is not None:
            set_seed(seed + processes.index)  # processes augment different images: not with the same draws
        store = _store(lesson, data, settings, checkpoints, seed)
        if store is not None:
            processes.on_main(store.require_writable)
        tracking = _tracking(lesson, settings, checkpoints, trackers)
        trainer = assembled(
            lesson,
            data,
            settings,
            processes,
            cache=_cache(lesson, settings, cache_teacher),
            store=store,
            checkpoint_every=checkpoints.every,
            callbacks=(*callbacks, tracking),
            own_rate=own_rate,
        )
        with tracking, trainer as ready:
            yield ready


def _announce(lesson: Lesson, processes: Processes) -> None:
    summary = describe(lesson.model).summary()
    _log.info("%s", summary)
    if processes.is_main:
        say(summary)


def _cache(lesson: Lesson, settings: Settings, path: str | os.PathLike[str] | None) -> TeacherCache | None:
    if path is None or lesson.teacher is None:
        return None
    return TeacherCache(path, lesson.teacher, settings.mixed_precision)


def _store(
    lesson: Lesson, data: Data, settings: Settings, checkpoints: Checkpoints, seed: int | None
) -> CheckpointStore | None:
    if checkpoints.folder is None:
        return None
    seen = data_facts(data.loader)
    facts = fingerprint(
        lesson.adapter, lesson.model, lesson.teacher, lesson.method, data, seen, len(lesson.epochs), settings, seed
    )
    if len(lesson.phases) > 1:  # a longer run would have had other phases so far
        facts["phases"] = [[phase.name, phase.epochs] for phase in lesson.phases]
    return CheckpointStore(checkpoints.folder, facts, hidden_state(data.loader, seen))


def _tracking(lesson: Lesson, settings: Settings, checkpoints: Checkpoints, trackers: Sequence[Any] | None) -> Tracking:
    run = {"toolkit": lesson.adapter.name, "method": repr(lesson.method), "epochs": len(lesson.epochs)}
    numbers = vars(settings) | {"optimizer": optimizer_name(settings.optimizer)}
    return Tracking(trackers, checkpoints.folder, run | numbers)


def _with_own_teacher(lesson: Lesson) -> Lesson:
    """A teacher that learns is a copy: the one that was passed in stays as it is."""
    if not lesson.teacher_learns or lesson.teacher is None:
        return lesson
    return replace(lesson, teacher=copied(lesson.teacher).requires_grad_(True))


def _record(trainer: Trainer, lesson: Lesson, kept: int | None) -> None:
    if trainer.state.position.step:
        name = type(lesson.method).__name__
        record_training(lesson.model, TrainingRecord.of_distill(name, trainer.state.history, kept))
