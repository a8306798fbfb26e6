"""What a run is told: its numbers, its data, its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from .._common.arguments import holds, not_negative, positive_whole
from ..augment.data import Stats
from ..augment.selector import CMISelector
from ..errors import QakdError
from ..tasks.batches import BatchFn, default_batch
from ..tasks.metrics import AnyMetric, MetricFn, check_metric, check_monitor, outputs_and_targets
from ..tasks.task_loss import TaskLoss, check_task_loss

MakeOptimizer: TypeAlias = Callable[..., torch.optim.Optimizer]
"""Called with parameter groups and ``lr=``: ``torch.optim.AdamW``, ``partial(torch.optim.SGD, momentum=0.9)``."""

MixedPrecision: TypeAlias = Literal["no", "bf16"]
Trainable: TypeAlias = Literal["all", "scales"]
Resume: TypeAlias = bool | Literal["force"]


@dataclass(frozen=True)
class Settings:
    """Numbers of a run; :func:`qakd_plugin.distill` says what each means, and takes the same names.

    Raises:
        QakdError: a number is out of range; names it.
    """

    lr: float | None = None
    quantizer_lr: float = 1e-3
    activation_quantizer_lr: float | None = None
    teacher_lr: float = 1e-4
    weight_decay: float = 1e-4
    grad_clip: float | None = 1.0
    warmup: float = 0.05
    mixed_precision: MixedPrecision = "no"
    accumulate: int = 1
    ema: float | None = None
    recalibrate_batches: int = 0
    patience: int | None = None
    trainable: Trainable = "all"
    optimizer: MakeOptimizer = field(default=torch.optim.AdamW, repr=False)  # its repr may hold an address
    compile_quantizers: bool = False

    @property
    def rate_name(self) -> str:
        """Of the rate that a run which diverges is to lower."""
        return "quantizer_lr" if self.trainable == "scales" else "lr"

    def __post_init__(self) -> None:
        for name in ("lr", "quantizer_lr", "activation_quantizer_lr", "teacher_lr", "weight_decay", "recalibrate_batches"):
            not_negative(name, getattr(self, name))
        positive_whole("accumulate", self.accumulate)
        positive_whole("patience", self.patience, none=True)
        if self.mixed_precision not in get_args(MixedPrecision):
            raise QakdError(f'mixed_precision={self.mixed_precision!r} is unknown: use "no" or "bf16".')
        if self.trainable not in get_args(Trainable):
            raise QakdError(f'trainable={self.trainable!r} is unknown: use "all" or "scales".')
        if self.trainable == "scales" and self.lr is not None:
            raise QakdError(
                f'lr={self.lr} is the rate of weights, which trainable="scales" leaves as they are: pass quantizer_lr=, and '
                "leave lr out."
            )
        if self.trainable == "scales" and self.recalibrate_batches:
            raise QakdError(
                f"recalibrate_batches={self.recalibrate_batches} moves the statistics of BatchNorm, which "
                'trainable="scales" leaves as they are: leave one of them out.'
            )
        if self.compile_quantizers not in (True, False):
            raise QakdError(f"compile_quantizers={self.compile_quantizers!r} must be True or False.")
        if not holds(lambda: 0 <= self.warmup < 1):
            raise QakdError(f"warmup={self.warmup!r} must be a share of all steps, not a number of them: 0.05, or 0 for none.")
        if self.grad_clip is not None and not holds(lambda: cast(float, self.grad_clip) > 0):
            raise QakdError(f"grad_clip={self.grad_clip!r} must be positive, or None for no clipping.")
        if self.ema is not None and not holds(lambda: 0 < cast(float, self.ema) < 1):
            raise QakdError(f"ema={self.ema!r} must lie between 0 and 1, e.g. 0.999, or be None.")


@dataclass(frozen=True)
class Data:
    """What is trained and validated with.

    Attributes:
        loader: training batches.
        val_loader: held-out batches, or None.
        batch_fn: splits a batch.
        augment: of training batches: a callable, a selector, or None.
        input_stats: (mean, std) of normalised images.
        task_loss: what is learned from labels; None for cross-entropy.
        metric: what is counted on ``val_loader``; None for accuracy.
        metric_fn: what the metric takes of outputs and targets.
        monitor: which of its numbers picks the best epoch.
        steps_per_epoch: optimizer steps in an epoch; None: the whole loader.
    """

    loader: Iterable[Any]
    val_loader: Iterable[Any] | None = None
    batch_fn: BatchFn = default_batch
    augment: Callable[[Tensor], Tensor] | CMISelector | None = None
    input_stats: Stats | None = None
    task_loss: TaskLoss | None = None
    metric: AnyMetric | None = None
    metric_fn: MetricFn = outputs_and_targets
    monitor: str | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        positive_whole("steps_per_epoch", self.steps_per_epoch, none=True)
        check_task_loss(self.task_loss)
        if self.metric is not None:
            check_metric(self.metric)
            check_monitor(self.metric, self.monitor)
        elif self.monitor is not None:
            raise QakdError(
                f"monitor={self.monitor!r} is one of the numbers of metric=, which is missing. Pass one, or leave it out."
            )


@dataclass(frozen=True)
class Checkpoints:
    """Where a run is saved, how often, and whether it goes on from there.

    Attributes:
        folder: None for nowhere.
        every: also after so many optimizer steps.
        resume: from the newest whole checkpoint; "force": of another run, too.

    Raises:
        QakdError: the others make no sense without a folder.
    """

    folder: Path | None = None
    every: int | None = None
    resume: Resume = False

    def __post_init__(self) -> None:
        positive_whole("checkpoint_every", self.every, none=True)
        if self.resume not in (True, False, "force"):
            raise QakdError(f'resume={self.resume!r} is unknown: use True, False, or "force" to go on after a change.')
        if self.folder is None and (self.resume or self.every):
            raise QakdError("resume and checkpoint_every need checkpoint_dir: say where checkpoints are.")

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None, every: int | None, resume: Resume) -> Checkpoints:
        """From what users pass."""
        return cls(None if folder is None else Path(folder), every, resume)
