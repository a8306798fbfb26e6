"""``distill``: one call on a prepared model."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import AdamW

from .._common.console import say
from ..augment.data import Stats
from ..augment.selector import Augmentation, CMISelector, FixedAugmentation, SelectedAugmentation
from ..errors import QakdError, UnsupportedQuantizerError
from ..preparation.description import describe
from ..tasks.batches import BatchFn, default_batch
from ..toolkits import Adapter, Quantizer, adapter_for
from .attached import require_teacher
from .autocast import float32_quantizers
from .checkpoint import CheckpointStore
from .distributed.processes import Processes, process_index, require_whole
from .methods import SQAKD, Method, Phase
from .optimizers import MakeOptimizer, Settings, optimizer_name
from .preflight import check_quantizers, check_separate, check_trainable
from .teacher_cache import TeacherCache
from .teachers import one_teacher
from .tracking import Tracking
from .trainer import Trainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillResult:
    """What a run leaves.

    Attributes:
        model: the prepared model that was passed in, trained: best weights loaded, ranges frozen, in eval mode.
        history: one row per epoch: phase, losses by name, learning rate, throughput, metrics on the held-out split.
        metrics: of the epoch whose weights were kept.
        teacher: the network that taught: the one passed in, or its trained copy where the method trains it.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    teacher: nn.Module | None


def distill(
    prepared_model: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    loader: Iterable[Any],
    *,
    method: Method | None = None,
    epochs: int = 10,
    val_loader: Iterable[Any] | None = None,
    augment: Callable[[Tensor], Tensor] | CMISelector | None = None,
    input_stats: Stats | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    seed: int | None = None,
    mixed_precision: str = "no",
    callbacks: Sequence[object] = (),
    batch_fn: BatchFn = default_batch,
    lr: float = 1e-3,
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
    cache_teacher: str | os.PathLike[str] | None = None,
    trackers: Sequence[Any] | None = None,
    optimizer: MakeOptimizer = AdamW,
) -> DistillResult:
    """Train a model that a quantization toolkit has prepared, with the losses of a distillation method.

    The model is trained in place, with AdamW by default, and a cosine schedule. Labels are read only if the method needs them.

    Launched with torchrun or ``accelerate launch``, processes train together: each takes its share of the batches, no sample is
    lost or counts twice, and all return the same model. A joined batch gives the weights that one process gives, to float
    tolerance, in networks without BatchNorm in training: BatchNorm normalizes with each process's share, as it does in any data
    parallel training, and its statistics are averaged after each step. See docs/training.md.

    Args:
        prepared_model: prepared and calibrated by ModelOpt, torchao (PT2E, QATConfig) or torch.ao (FX, eager).
        teacher: full-precision network with the same classes, larger or not; or several, of which the mean logits teach. It is
            left as it was, bit for bit, in its own mode; a method that trains the teacher trains a copy, which
            ``result.teacher`` holds. None for methods that need none.
        loader: training batches with a length; x, (x, y), a dict, or anything ``batch_fn`` splits. x is float (N, C, H, W).
        method: SQAKD() by default; QKD, KD, QAT.
        epochs: passes over ``loader``.
        val_loader: held-out batches that pick the best epoch, by accuracy where they have labels, else by agreement with the
            teacher. Never the split that is reported.
        augment: callable on a batch of images in [0, 1]; both networks see what it returns. Or ``CMISelector(...)``, which
            ranks augmentations with the teacher before training, and trains with the best.
        input_stats: (mean, std) per channel when the loader yields normalised images, so that ``augment`` sees [0, 1].
        checkpoint_dir: full state after every epoch, and ``history.jsonl``. Of a run of its own, unless ``resume`` is given.
        checkpoint_every: and after every so many optimizer steps.
        resume: go on bit-identically from the newest whole checkpoint; an empty directory starts afresh.
        seed: of torch, numpy and random, set before anything is drawn; each further process takes the next number.
        mixed_precision: "no" or "bf16"; quantizers compute in float32 either way.
        callbacks: objects; ``on_step_end(step, losses)`` and ``on_epoch_end(row)`` are called where they exist.
        batch_fn: splits a batch into (images, labels or None).
        lr: peak learning rate of the weights. 2 and 3 bits bear far more than 8 and need it: see docs/choosing.md, "Quantizer".
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
        cache_teacher: file for the teacher's logits, computed in one pass before training, for data that look the same in every
            epoch (no augmentation, or one seeded by sample). Read again by later runs; refused when teacher or data changed.
        trackers: names or trackers of accelerate ("wandb", "mlflow", ...) that get the history's numbers. None: TensorBoard in
            ``checkpoint_dir``, where it is installed.
        optimizer: an optimizer's class, or a ``functools.partial`` of one, called with parameter groups and ``lr=``. Rates of
            quantizers are relative changes per step with Adam's step only.

    Returns:
        The model, the history, final metrics.

    Raises:
        NotPreparedError: no toolkit prepared the model, or a range was never calibrated; names it.
        LabelsRequiredError: the method needs labels and the loader yields none.
        TrainingError: an input, a loss or a gradient is not finite (names batch and layer), or no weight requires a gradient.
        CheckpointError: a checkpoint belongs to another run, cannot be written, or is there though ``resume`` is False.
        QakdError: another argument is wrong; names it.
    """
    require_whole("prepared_model", prepared_model)
    adapter = adapter_for(prepared_model)
    method = SQAKD() if method is None else method
    phases = method.phases(_positive_int("epochs", epochs))
    settings = Settings(
        lr=lr,
        quantizer_lr=quantizer_lr,
        activation_quantizer_lr=activation_quantizer_lr,
        teacher_lr=teacher_lr,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        warmup=warmup,
        mixed_precision=_precision(mixed_precision),
        accumulate=_positive_int("accumulate", accumulate),
        ema=ema,
        recalibrate_batches=recalibrate_batches,
        patience=patience,
        optimizer=optimizer,
    )
    if patience is not None and val_loader is None:
        raise QakdError("patience needs val_loader: held-out batches say whether an epoch is better.")
    teacher = one_teacher(teacher)
    require_whole("teacher", teacher)
    require_teacher(method, phases, teacher)
    if teacher is not None:
        check_separate(prepared_model, teacher)
    _require_length(loader)
    check_quantizers(adapter, prepared_model)
    check_trainable(adapter, prepared_model)
    summary = describe(prepared_model).summary()
    _log.info("%s", summary)
    index = process_index()
    if index == 0:
        say(summary)
    if seed is not None:
        set_seed(seed + index)  # processes augment different images: not with the same draws
    store = None
    if checkpoint_dir is not None:
        store = CheckpointStore(
            Path(checkpoint_dir), _fingerprint(adapter, prepared_model, method, loader, epochs, settings, augment)
        )
    elif resume or checkpoint_every:
        raise QakdError("resume and checkpoint_every need checkpoint_dir: say where checkpoints are.")
    learns = any(phase.teacher for phase in phases)
    if isinstance(augment, CMISelector):
        _check_selector(teacher, cache_teacher)
    cache = _teacher_cache(cache_teacher, teacher, method, phases, settings.mixed_precision)
    network = copy.deepcopy(teacher).requires_grad_(True) if learns and teacher is not None else teacher
    processes = Processes()
    tracking = Tracking(
        trackers,
        None if checkpoint_dir is None else Path(checkpoint_dir),
        {"toolkit": adapter.name, "method": repr(method), "epochs": epochs}
        | vars(settings)
        | {"optimizer": optimizer_name(optimizer)},
    )
    with tracking, float32_quantizers(adapter, prepared_model):
        trainer = Trainer(
            adapter,
            prepared_model,
            network,
            processes=processes,
            method=method,
            phases=phases,
            loader=loader,
            val_loader=val_loader,
            batch_fn=batch_fn,
            augment=_augmentation(augment, loader, batch_fn, input_stats),
            settings=settings,
            cache=cache,
            store=store,
            checkpoint_every=checkpoint_every,
            callbacks=(*callbacks, tracking),
        )
        trainer.run(resume=resume)
    kept = trainer.history[trainer.best.epoch] if trainer.best.epoch >= 0 else trainer.history[-1]
    return DistillResult(prepared_model, trainer.history, kept, network)


def _augmentation(
    augment: Callable[[Tensor], Tensor] | CMISelector | None,
    loader: Iterable[Any],
    batch_fn: BatchFn,
    input_stats: Stats | None,
) -> Augmentation:
    if isinstance(augment, CMISelector):
        return SelectedAugmentation(augment, loader, batch_fn, input_stats)
    return FixedAugmentation(augment, input_stats)


def _check_selector(teacher: nn.Module | None, cache_teacher: object) -> None:
    if teacher is None:
        raise QakdError(
            "augment=CMISelector() asks the teacher which augmentation is best: pass a teacher, or another augment."
        )
    if cache_teacher is not None:
        raise QakdError("cache_teacher needs images that look the same in every epoch; augment=CMISelector() draws new ones.")


def _fingerprint(
    adapter: Adapter, model: nn.Module, method: Method, loader: Iterable[Any], epochs: int, settings: Settings, augment: object
) -> dict[str, Any]:
    return {
        "toolkit": adapter.name,
        "method": repr(method),
        "epochs": epochs,
        "settings": repr(settings),
        "optimizer": optimizer_name(settings.optimizer),
        "augmentation": getattr(augment, "__qualname__", type(augment).__qualname__),  # its repr may hold an address
        "quantizers": [_quantizer_line(adapter, quantizer) for quantizer in adapter.quantizers(model)],
        "parameters": [f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters()],
        "loader length": len(loader),  # type: ignore[arg-type]
    }


def _quantizer_line(adapter: Adapter, quantizer: Quantizer) -> str:
    """Which quantizer it is; its numbers change in training."""
    rule = adapter.learned(quantizer)
    try:
        qparams = adapter.qparams(quantizer)
        codes = f", codes {qparams.quant_min}..{qparams.quant_max}"
    except UnsupportedQuantizerError:  # a form that can be trained with, if not exported
        codes = ""
    return f"{quantizer.fqn} {quantizer.role}{codes}{'' if rule is None else f', {rule.method}'}"


def _teacher_cache(
    path: str | os.PathLike[str] | None, teacher: nn.Module | None, method: Method, phases: Sequence[Phase], precision: str
) -> TeacherCache | None:
    if path is None:
        return None
    name = type(method).__name__
    if teacher is None or not any(phase.needs_teacher for phase in phases):
        raise QakdError(f"cache_teacher={str(path)!r}, but {name} asks no teacher. Leave it out.")
    if any(phase.teacher for phase in phases):
        raise QakdError(f"cache_teacher: the teacher of {name} learns too, so its logits change. Leave it out.")
    if any(phase.features for phase in phases):
        raise QakdError("cache_teacher holds logits only; features need the teacher's forward pass. Leave one of them out.")
    return TeacherCache(path, teacher, precision)


def _require_length(loader: Iterable[Any]) -> None:
    if not isinstance(loader, Sized):
        raise QakdError(
            f"loader ({type(loader).__name__}) has no length, which the schedule needs. Pass a DataLoader over a map-style "
            "data set, or a list of batches."
        )
    if len(loader) == 0:
        raise QakdError("loader is empty: it holds no batch. Check the data set, the batch size and drop_last.")


def _precision(value: str) -> str:
    if value not in {"no", "bf16"}:
        raise QakdError(f'mixed_precision={value!r} is unknown: use "no" or "bf16".')
    return value


def _positive_int(name: str, value: int) -> int:
    if not (isinstance(value, int) and value > 0):
        raise QakdError(f"{name}={value!r} must be a positive whole number.")
    return value
