"""A LightningModule that trains a prepared model with this package's losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._common.module_copy import copied
from .._common.optional import require
from .._common.training_record import TrainingRecord, record_training
from ..errors import QakdError
from ..tasks.batches import BatchFn, batch_splitter, default_batch
from ..tasks.evaluation import evaluate
from ..tasks.inputs import Inputs, arguments, call, sample_count
from ..tasks.outputs import named_outputs
from ..tasks.task_loss import TaskLoss, check_task_loss, with_targets
from ..toolkits import adapter_for
from ..training.attached import refuse_features
from ..training.autocast import float32_hooks
from ..training.config import Settings
from ..training.curvature import warn_of_no_refresh
from ..training.methods import SQAKD, MatchCheck, Method, Phase, planned, require_labels, total_loss
from ..training.optimizers import (
    clip_gradients,
    cosine_schedule,
    quantizer_parameters,
    student_optimizer,
    teacher_optimizer,
)
from ..training.teachers import require_teacher, taught_outputs

_library = require("lightning", extra="lightning", purpose="train a prepared model as a LightningModule")
_LightningModule: Any = _library.LightningModule


class DistillationModule(_LightningModule):  # type: ignore[misc]
    """Student, teacher and method as a LightningModule; epochs, data, logging and checkpoints are the Trainer's.

    Phases follow the Trainer's ``max_epochs`` as they follow ``distill``'s ``epochs``. Ranges are frozen while Lightning
    validates, tests or predicts, and at the end. A frozen teacher is no part of the module: neither its parameters nor
    checkpoints hold it. A method that trains the teacher (QKD) trains a copy, ``teacher``, which checkpoints do hold, and
    switches to manual optimization: Lightning then takes neither ``accumulate_grad_batches`` nor ``gradient_clip_val``.

    Subclasses that override a hook call ``super()``.

    Args:
        prepared_model: prepared and calibrated by a supported toolkit; trained in place.
        teacher: full-precision network; None for methods that need none.
        method: SQAKD() by default.
        settings: learning rates, weight decay, ``grad_clip`` and ``warmup``, as ``distill`` takes them. The others are not
            read: precision, accumulation, averages and early stop are the Trainer's.
        batch_fn: splits a batch into (inputs, targets or None).
        task_loss: what is learned from labels, as in ``distill``.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: the method needs a teacher and there is none.
        MissingPackageError: on import: Lightning is not installed.
    """

    def __init__(
        self,
        prepared_model: nn.Module,
        teacher: nn.Module | None,
        method: Method | None = None,
        settings: Settings | None = None,
        batch_fn: BatchFn = default_batch,
        task_loss: TaskLoss | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter_for(prepared_model)
        self.method = SQAKD() if method is None else method
        self.settings = Settings() if settings is None else settings
        if self.settings.trainable != "all":
            raise QakdError(
                f'DistillationModule trains all weights: trainable="{self.settings.trainable}" is for qakd.distill.'
            )
        self.batch_fn = batch_fn
        self._split = batch_splitter(batch_fn, prepared_model)
        self.student = prepared_model
        check_task_loss(task_loss)
        self.task_loss = task_loss
        phases = self._phases(100)  # only what they learn from; how long they are says the Trainer
        self._match = next((phase.imitation.match for phase in phases if phase.imitation is not None), None)
        require_teacher(self.method, phases, teacher)
        refuse_features(self.method, phases, "DistillationModule")
        warn_of_no_refresh(self.adapter, prepared_model, "DistillationModule")
        learns = any(phase.teacher for phase in phases)
        self.automatic_optimization = not learns
        if learns and teacher is not None:
            self.teacher: nn.Module | None = copied(teacher).requires_grad_(True)
        else:  # past nn.Module, which would make it a submodule
            self.__dict__["teacher"] = teacher
        self._epochs: list[Phase] = []
        self._phase: Phase | None = None
        self._check = MatchCheck()
        self._was_training = False
        self._float32: list[Any] = []

    def _phases(self, epochs: int) -> tuple[Phase, ...]:
        return planned(self.method, epochs, self.task_loss)

    # -- modes and ranges

    def train(self, mode: bool = True) -> DistillationModule:
        """Student as its toolkit wants it done; the teacher trains only in a phase in which it learns."""
        self.training = mode
        self.adapter.set_mode(self.student, mode)
        for name, child in self.named_children():
            if name != "student":
                child.train(mode and (name != "teacher" or bool(self._phase and self._phase.teacher)))
        return self

    def on_validation_model_eval(self) -> None:
        self._was_training = self.training
        self.train(False)
        self.adapter.freeze_ranges(self.student, True)

    on_test_model_eval = on_validation_model_eval
    on_predict_model_eval = on_validation_model_eval

    def on_validation_epoch_end(self) -> None:
        # Not later: callbacks save checkpoints next, and the state of some toolkits says whether ranges are frozen.
        if self._was_training:
            self.adapter.freeze_ranges(self.student, False)

    def on_validation_model_train(self) -> None:
        # Not Lightning's own: it sets flags of modules one by one, and a graph of PT2E is not told.
        self.train(self._was_training)

    on_test_model_train = on_validation_model_train

    # -- start and end

    def setup(self, stage: str) -> None:
        self._float32 = float32_hooks(self.adapter, self.student)
        if self.teacher is not None:
            self.teacher.to(self.device)
        if stage == "fit":
            self._epochs = self._plan()

    def teardown(self, stage: str) -> None:
        for handle in self._float32:
            handle.remove()

    def on_train_start(self) -> None:
        record_training(self.student, TrainingRecord(type(self.method).__name__, "own"))

    def on_train_epoch_start(self) -> None:
        self._phase = self._epochs[self.current_epoch]
        self.adapter.freeze_ranges(self.student, False)
        self.train(True)

    def on_train_end(self) -> None:
        self.finish()

    def finish(self) -> None:
        """Student in eval mode with frozen ranges, as at the end of training: before export, after a checkpoint was loaded."""
        self.adapter.freeze_ranges(self.student, True)
        self.train(False)

    def _plan(self) -> list[Phase]:
        """The phase of each epoch."""
        count = self.trainer.max_epochs
        if not count or count < 1:
            raise QakdError(f"Trainer(max_epochs={count}) does not say how long phases are: pass a positive max_epochs.")
        epochs = [phase for phase in self._phases(count) for _ in range(phase.epochs)]
        if len(epochs) != count:
            raise QakdError(
                f"{type(self.method).__name__} counts {len(epochs)} epochs itself: pass Trainer(max_epochs={len(epochs)}) in "
                f"the place of {count}, or give its phases as fractions."
            )
        return epochs

    # -- optimizers

    def configure_optimizers(self) -> Any:
        """AdamW in the groups of ``distill``, with its schedule per step; and one for a teacher that learns."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise QakdError("train_dataloaders: no length is known, which the schedule needs. Pass a map-style data set.")
        self._of_quantizers = quantizer_parameters(self.adapter, self.student)
        optimizer = student_optimizer(self.adapter, self.student, self.settings)
        schedule = cosine_schedule(optimizer, int(steps), self.settings.warmup)
        if self.automatic_optimization:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        assert self.teacher is not None
        together = sum(bool(phase.teacher) for phase in self._epochs) * int(steps) // len(self._epochs)
        second = teacher_optimizer(self.teacher, self.settings)
        return [optimizer, second], [schedule, cosine_schedule(second, together, self.settings.warmup)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.settings.grad_clip is not None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            # In the order of the network and not of the groups, as distill: a norm's last bit depends on it.
            parameters = [parameter for parameter in self.parameters() if id(parameter) in held]
            clip_gradients(parameters, self._of_quantizers, self.settings.grad_clip)

    # -- steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student outputs."""
        return self.student(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        phase = self._phase
        assert phase is not None
        inputs, targets = self._split(batch)
        if phase.needs_labels:
            require_labels(self.method, targets)
        student = named_outputs(call(self.student, self._called_with(phase, self.student, inputs, targets)))
        taught = self._called_with(phase, self.teacher, inputs, targets) if phase.teacher else inputs
        other = taught_outputs(self.teacher, phase, *arguments(taught))
        self._check(phase, student, other, inputs, targets)
        loss, parts = total_loss(phase.student, student, other, targets, inputs)
        self.log_dict({"train_loss": loss.detach(), **{f"train_{name}": value for name, value in parts.items()}})
        if self.automatic_optimization:
            return loss
        teacher_loss = None
        if phase.teacher:
            assert other is not None
            teacher_loss, _ = total_loss(phase.teacher, other, student, targets, inputs)
            self.log("train_teacher_loss", teacher_loss.detach())
        self._step_by_hand(loss, teacher_loss)
        return None

    @staticmethod
    def _called_with(phase: Phase, network: Any, inputs: Inputs, targets: Any) -> Inputs:
        return with_targets(network, inputs, targets) if phase.calls_with_labels else inputs

    def _step_by_hand(self, loss: Tensor, teacher_loss: Tensor | None) -> None:
        """One step of the student, and one of the teacher where it learns."""
        # One backward pass: each loss has the other network's logits detached, and data parallel training wants all
        # gradients before the first step.
        self.manual_backward(loss if teacher_loss is None else loss + teacher_loss)
        count = 1 if teacher_loss is None else 2
        for optimizer, schedule in list(zip(self.optimizers(), self.lr_schedulers(), strict=True))[:count]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return call(self, self._split(batch)[0])

    def _evaluate(self, name: str, batch: Any) -> None:
        """Log accuracy where there are labels, and how often student and teacher agree."""
        inputs, targets = self._split(batch)
        if self.teacher is None and (not isinstance(targets, Tensor) or targets.is_floating_point()):
            return  # nothing to compare with
        found = evaluate(self.student, self.teacher, [(inputs, targets)], lambda pair: pair, self.device, match=self._match)
        for key, value in found.items():
            if not key.startswith("val_teacher_"):
                self.log(f"{name}_{key.removeprefix('val_')}", value, batch_size=sample_count(inputs), sync_dist=True)
