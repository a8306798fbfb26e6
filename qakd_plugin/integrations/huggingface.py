"""A Hugging Face Trainer with this package's losses, for models prepared by ModelOpt."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._common.optional import require
from .._common.training_record import TrainingRecord, record_training
from ..errors import CheckpointError, QakdError
from ..preparation.pretrained import mark_pretrained
from ..tasks.outputs import named_outputs
from ..tasks.task_loss import TaskLoss, check_task_loss
from ..toolkits import adapter_for
from ..training.attached import refuse_features, unwrapped
from ..training.autocast import float32_quantizers
from ..training.config import Settings
from ..training.curvature import warn_of_no_refresh
from ..training.methods import SQAKD, MatchCheck, Method, planned, require_labels, total_loss
from ..training.optimizers import student_optimizer
from ..training.student_file import save
from ..training.teachers import require_teacher, taught_outputs

_library = require("transformers", extra="transformers", purpose="train a prepared model with a Hugging Face Trainer")
_Trainer: Any = _library.Trainer


class DistillationTrainer(_Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose loss is a method's, and whose optimizer has this package's parameter groups.

    Everything else is the Trainer's: data, schedule, logging, checkpoints. ``save_model`` writes student.safetensors as well,
    which :func:`qakd_plugin.load` reads; ``from_pretrained``, which knows nothing of quantizers, refuses the folder, unless
    ModelOpt's ``enable_huggingface_checkpointing`` was called before. The data set yields dictionaries with the names
    of the model's ``forward`` ("pixel_values" with models of transformers), and "labels" where the method reads them.

    Args:
        model: prepared and calibrated by ModelOpt (``mtq.quantize`` or ``qakd_plugin.prepare``).
        args: TrainingArguments. ``learning_rate``, ``weight_decay``, ``adam_*`` set AdamW up; ``optim`` is not read.
        teacher: full-precision network that takes the same inputs; None for QAT. It is left as it was, on the device of
            ``args``.
        method: SQAKD() by default, KD or QAT.
        task_loss: what is learned from labels, as in ``distill``; "model": the model's own loss.
        quantizer_lr: of parameters that belong to quantizers, as a relative change per step.
        **options: as ``transformers.Trainer`` takes them, by name.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: another toolkit did, the method has phases, or it needs a teacher and there is none.
        MissingPackageError: on import: transformers is not installed.
    """

    label_names: list[str]
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        teacher: nn.Module | None = None,
        method: Method | None = None,
        task_loss: TaskLoss | None = None,
        quantizer_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        self.method = SQAKD() if method is None else method
        self._check = MatchCheck()
        self.adapter = adapter_for(model)
        check_task_loss(task_loss)
        phases = planned(self.method, 100, task_loss)
        require_teacher(self.method, phases, teacher)
        refuse_features(self.method, phases, "DistillationTrainer")
        self._require_supported(len(phases))
        warn_of_no_refresh(self.adapter, model, "DistillationTrainer")
        mark_pretrained(model)
        (self.phase,) = phases
        self.quantizer_lr = quantizer_lr
        super().__init__(model, args, **options)
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        # The loss is a mean over the micro-batch, whatever keywords the model takes: let the Trainer divide it.
        self.model_accepts_loss_kwargs = False
        if not self.label_names:  # found by the names in forward's signature, where a plain module has no labels
            self.label_names = ["labels"]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss on a batch; labels go to the loss and not to the model.

        Raises:
            LabelsRequiredError: the method reads labels and the batch holds none.
        """
        labels = inputs.get(self.label_names[0])
        own = {name: value for name, value in inputs.items() if name not in self.label_names}
        if self.phase.needs_labels:
            require_labels(self.method, labels)
        outputs = named_outputs(model(**(inputs if self.phase.calls_with_labels else own)))
        with self.accelerator.autocast():
            other = taught_outputs(self.teacher, self.phase, (), own)
        self._check(self.phase, outputs, other, own, labels)
        loss, _ = total_loss(self.phase.student, outputs, other, labels, own)
        # A dictionary: of anything else the Trainer takes [1:] for the logits.
        shown = {"logits": outputs["logits"]} if "logits" in outputs else outputs
        return (loss, shown) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As the Trainer's, which computes no loss without labels; a method that reads none has one."""
        if self.phase.needs_labels or inputs.get(self.label_names[0]) is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[no-any-return]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        found = tuple(tensor.detach() for tensor in outputs.values())
        return loss.detach(), None if prediction_loss_only else found[0] if len(found) == 1 else found, None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW in the groups of ``distill``, unless an optimizer was passed."""
        if self.optimizer is None:
            settings = Settings(lr=self.args.learning_rate, quantizer_lr=self.quantizer_lr, weight_decay=self.args.weight_decay)
            self.optimizer = student_optimizer(self.adapter, unwrapped(self.model if model is None else model), settings)
            for group in self.optimizer.param_groups:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
                group["eps"] = self.args.adam_epsilon
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; under ``bf16`` quantizers compute in float32."""
        record_training(unwrapped(self.model), TrainingRecord(type(self.method).__name__, "own"))
        with float32_quantizers(self.adapter, unwrapped(self.model)):
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; under ``bf16`` quantizers compute in float32."""
        with float32_quantizers(self.adapter, unwrapped(self.model)):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, and student.safetensors beside it; not in the Trainer's own checkpoints, which it reads itself."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            save(unwrapped(self.model), Path(output_dir or self.args.output_dir) / "student.safetensors")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """With the network's own names of weights: transformers 5 writes those of earlier versions, and does not find them when
        it resumes or puts the best weights back."""
        network = self.model
        if not isinstance(network, _library.PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        network.save_pretrained = partial(network.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del network.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer only logs what it did not restore.

        Raises:
            CheckpointError: it is a weight or a quantizer's number.
        """
        state = self.model.state_dict()
        missing = set(load_result.missing_keys) - set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        found = {tensor.data_ptr() for name, tensor in state.items() if name not in missing and isinstance(tensor, Tensor)}
        tied = {name for name in missing if isinstance(state[name], Tensor) and state[name].data_ptr() in found}
        if lost := [*(missing - tied), *load_result.unexpected_keys]:
            raise CheckpointError(
                f"transformers {_library.__version__} did not restore {len(lost)} tensors of a checkpoint, among them "
                f"{min(lost)}: it holds other names than the student, and was written by another version or for another "
                "student. Start afresh in another output_dir."
            )
        super()._issue_warnings_after_load(load_result)

    def _require_supported(self, phases: int) -> None:
        if self.adapter.name != "modelopt":
            raise QakdError(
                f"model was prepared by {self.adapter.name}, whose modes and ranges transformers.Trainer does not know how to "
                "switch: prepare it with toolkit='modelopt', or train with qakd.distill or qakd.attach."
            )
        if phases != 1:
            raise QakdError(
                f"{type(self.method).__name__} has {phases} phases, and transformers.Trainer has one optimizer and one loss: "
                "train with qakd.distill, or with qakd.attach in a loop of your own."
            )
