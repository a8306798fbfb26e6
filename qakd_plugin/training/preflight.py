"""Checks before the first training step. Each message says what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._common.module_mode import buffers_kept
from .._common.precision import dtype_name
from ..errors import NotPreparedError, QakdError, TrainingError, UnsupportedQuantizerError
from ..preparation.feasibility import export_problems
from ..tasks.inputs import HALF, Inputs, call, doubled, dtypes_named, first_samples, named_tensors, precision_of, sample_count
from ..tasks.matchers import KL
from ..tasks.matching import check_match, default_match
from ..tasks.outputs import Outputs, listed, named_outputs
from ..toolkits import Adapter
from .divergence import blame, misfit, require_finite_input
from .methods import Phase, Supervision

_log = logging.getLogger(__name__)


def check_quantizers(adapter: Adapter, model: nn.Module) -> None:
    """At least one weight quantizer; ranges calibrated, finite and positive.

    Raises:
        NotPreparedError: names the quantizer.
    """
    quantizers = adapter.quantizers(model)
    roles = [quantizer.role for quantizer in quantizers]
    if "weight" not in roles:
        raise NotPreparedError(
            f"prepared_model ({type(model).__name__}, {adapter.name}) has no enabled weight quantizer: there is nothing to "
            "train for. Enable weight quantization in the toolkit's configuration, or use qakd_plugin.prepare."
        )
    if "activation" not in roles:
        _log.warning(
            "prepared_model quantizes weights only (%d quantizers, none for activations): layers will compute in floating "
            "point. If that is not meant, look at the configuration: prepare_qat_fx, for one, silently drops symmetric "
            "activations without backend_config=get_tensorrt_backend_config().",
            len(quantizers),
        )
    for quantizer in quantizers:
        try:
            scale = adapter.qparams(quantizer).scale
        except UnsupportedQuantizerError as problem:
            if quantizer.role != "activation":
                raise
            _log.warning("%s It can be trained with, but not exported.", problem)
            continue
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise NotPreparedError(
                f"{quantizer.fqn}: its scale must be finite and positive, got "
                f"{float(scale.min()):.3g}..{float(scale.max()):.3g}. "
                "Calibrate again on real batches."
            )


def check_trainable(adapter: Adapter, model: nn.Module) -> None:
    """Some weight must require a gradient, not only parameters of quantizers.

    Raises:
        TrainingError: otherwise, or the weights are in half precision.
    """
    if (dtype := precision_of(model)) in HALF:
        raise TrainingError(
            f"prepared_model holds {dtype} weights, in which steps of training are lost to rounding and "
            'codes do not lie on their grid: call prepared_model.float(), and pass mixed_precision="bf16" for speed.'
        )
    of_quantizers = {id(p) for quantizer in adapter.quantizers(model) for p in quantizer.module.parameters()}
    if not any(p.requires_grad for p in model.parameters() if id(p) not in of_quantizers):
        raise TrainingError(
            f"none of prepared_model's weights requires a gradient ({type(model).__name__}): it looks like a copy of a frozen "
            "teacher. Call prepared_model.requires_grad_(True) before distill."
        )


def check_first_batch(student: nn.Module, outputs: Outputs, inputs: Inputs) -> None:
    """Input and outputs of the student are finite.

    Raises:
        TrainingError: names the input or the first layer with a NaN.
    """
    require_finite_input(inputs, 0)
    for name, tensor in outputs.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"prepared_model outputs NaN or infinite values ({name}) on the first batch. {blame(student, inputs)}"
            )


def check_smallest_batch(student: nn.Module, inputs: Inputs, smallest: int | None) -> None:
    """No BatchNorm that is trained gets a single value per channel: of it no variance can be taken.

    Args:
        student: in training mode; it is called in it, without gradients, and its buffers are put back.
        inputs: of any batch.
        smallest: samples in the smallest batch; None: not known.

    Raises:
        TrainingError: otherwise.
    """
    if smallest != 1:
        return
    if sample_count(inputs) == 1:  # torch itself would refuse it, by no name
        inputs = doubled(inputs)
    with buffers_kept(student), torch.no_grad(), _NoSingleValues(sample_count(inputs)):
        call(student, inputs)


def check_ranges(adapter: Adapter, student: nn.Module, inputs: Inputs) -> None:
    """Warn where running statistics of BatchNorms do not fit the data, and ranges that were calibrated with them neither.

    Args:
        adapter: of the student's toolkit.
        student: in training mode, with frozen ranges.
        inputs: of a batch.
    """
    if problem := misfit(adapter, student, inputs):
        _log.warning("%s", problem)


class _NoSingleValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses normalization over a batch in which each sample has one value per channel."""

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples = samples

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "batch_norm" in name and "backward" not in name and "no_training" not in name:
            x, trained = args[0], next((argument for argument in args[5:6] if isinstance(argument, bool)), True)
            if trained and x.dim() > 1 and len(x) == self.samples and x.numel() == len(x) * x.shape[1]:
                raise TrainingError(
                    f"loader: its smallest batch is one sample, and a BatchNorm over {x.shape[1]} channels would get a single "
                    "value of each, which has no variance. Pass drop_last=True to the DataLoader, or another batch_size."
                )
        return func(*args, **(kwargs or {}))


def check_taught(
    phases: Sequence[Phase], student: Outputs, teacher: Outputs, inputs: Inputs, targets: Any, *, validated: bool
) -> None:
    """What is compared can be compared: in eval mode, as far as outputs are there in it; the first step sees the rest.

    Args:
        phases: of the run.
        student: outputs in eval mode.
        teacher: likewise.
        inputs: of the batch.
        targets: likewise.
        validated: whether a split is held out, for which all must be there in eval mode.

    Raises:
        QakdError: see :func:`~qakd_plugin.tasks.matching.check_match`.
    """
    imitation = next((phase.imitation for phase in phases if phase.imitation is not None), None)
    if imitation is None:
        return
    match = imitation.matched(student, inputs)
    learns = any(phase.teacher for phase in phases)  # a frozen teacher is compared in eval mode always
    here = {
        name: matcher for name, matcher in match.items() if validated or (name in student and (name in teacher or not learns))
    }
    check_match(here, student, teacher, inputs, targets)


def check_counted(phases: Sequence[Phase], student: Outputs, inputs: Inputs) -> None:
    """What is counted on held-out batches, where there is no metric of the user's, can be read in one way.

    Args:
        phases: one that compares outputs says which.
        student: outputs in eval mode.
        inputs: of the batch.

    Raises:
        QakdError: more than one reading is possible; shows the line to write.
    """
    if any(phase.imitation is not None for phase in phases):
        return
    try:
        default_match(student, inputs)
    except QakdError as problem:
        raise QakdError(
            f"val_loader: the network outputs {listed(student)}; what is counted can be read in more than one way, and the "
            "method compares none of them with a teacher. Pass metric=..., metric_fn=lambda outputs, targets: (outputs[...], "
            "targets), or leave val_loader out."
        ) from problem


@contextmanager
def first_call_named(student: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Within the block, what a network raises on its first batch says which batch that was.

    Raises:
        QakdError: inputs are of another type than the network computes in.
        TrainingError: of another shape than it takes, mostly.
    """
    try:
        with dtypes_named(student, inputs, "loader"):
            yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, QakdError | torch.OutOfMemoryError):
            raise
        shapes = ", ".join(f"{name!r} {tuple(x.shape)} {dtype_name(x.dtype)}" for name, x in named_tensors(inputs).items())
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"loader: the networks cannot compute its first batch, {shapes}: {reason}. Yield what they were trained on, or "
            "pass batch_fn=lambda batch: (inputs, targets)."
        ) from error


def classes_learned(phases: Sequence[Phase], student: Outputs, inputs: Inputs) -> int | None:
    """Between how many classes the default loss of labels chooses; None where labels are not class indices, or not read so."""
    defaults = [term for phase in phases for term in phase.student if isinstance(term, Supervision) and term.task_loss is None]
    if not defaults:
        return None
    try:
        ((name, matcher),) = default_match(student, inputs).items()
    except QakdError:  # in eval mode; the first step says whether it is so in training
        return None
    return student[name].shape[matcher.dim] if isinstance(matcher, KL) else None


@torch.no_grad()
def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Student and teacher must not hold the same tensors, or training one trains the other.

    Raises:
        QakdError: they do; names a parameter.
    """
    trained = {place: name for name, p in student.named_parameters() if p.requires_grad and (place := _place(p))}
    for name, parameter in teacher.named_parameters():
        if (place := _place(parameter)) in trained:
            raise QakdError(
                f"teacher: its {name!r} is the same tensor as {trained[place]!r} of prepared_model, so that "
                "training would change the teacher. Prepare a copy: copy.deepcopy(model) goes into torch.export.export, "
                "mtq.quantize, quantize_ or prepare_qat_fx, which work in place or share tensors."
            )


def _place(parameter: Tensor) -> int:
    """Where it lies in memory, of a sharded one what this process holds; 0 where that is nothing."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.data_ptr() if local.numel() else 0


def check_precision(teacher: nn.Module, *, learns: bool) -> None:
    """Say in what a teacher in half precision computes; refuse one that learns.

    Raises:
        TrainingError: steps of its training would be lost to rounding.
    """
    dtype = precision_of(teacher)
    if dtype in HALF and learns:
        raise TrainingError(
            f"teacher learns too, and holds {dtype} weights, in which its steps are lost: pass teacher.float()."
        )
    if dtype in HALF:
        _log.info(
            "The teacher computes in %s, as its weights are: its float inputs are converted, and it is not changed.", dtype
        )


def check_against_teacher(adapter: Adapter, student: nn.Module, teacher: nn.Module, taught: Outputs, inputs: Inputs) -> None:
    """Warn where the student without fake quantization is not the teacher although it has all its weights.

    This catches what a toolkit changes silently: ``prepare_qat_pt2e`` sets the eps of every BatchNorm to 1e-5.

    Args:
        adapter: of the student's toolkit.
        student: in eval mode with frozen ranges.
        teacher: any network; one with other weights is not compared.
        taught: its outputs for ``inputs`` in eval mode.
        inputs: of a batch.
    """
    if not _has_weights_of(student, teacher):
        return
    adapter.set_fake_quant(student, False)
    try:
        unquantized = named_outputs(call(student, inputs))
    finally:
        adapter.set_fake_quant(student, True)
    both = [(unquantized[name], expected) for name, expected in taught.items() if name in unquantized]
    deviation = max((_deviation(*pair) for pair in both), default=0.0)
    if deviation > _SAME_NETWORK:
        _log.warning(
            "With fake quantization off, prepared_model is not the teacher although all weights are equal: outputs differ by "
            "%.2g of their range. Preparing changed the network. prepare_qat_pt2e does so where a BatchNorm has another eps "
            "than 1e-5 (add eps - 1e-5 to its running_var before torch.export, or use qakd_plugin.prepare); else look for "
            "operators that the toolkit replaced.",
            deviation,
        )


def _deviation(own: Tensor, expected: Tensor) -> float:
    """The largest difference over the range of the second; 0 where they cannot be compared."""
    if own.shape != expected.shape or not expected.is_floating_point() or not expected.numel():
        return 0.0
    return float((own - expected).abs().max()) / (float(expected.max() - expected.min()) or 1.0)


_SAME_NETWORK = 1e-3
"""Logits of one network computed in two orders differ by about 1e-6 of their range."""


def _has_weights_of(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether each weight of the teacher with more than one dimension is one of the student's, value by value."""
    own: dict[torch.Size, list[Tensor]] = {}
    for parameter in student.parameters():
        own.setdefault(parameter.shape, []).append(parameter)
    weights = [parameter for parameter in teacher.parameters() if parameter.ndim > 1]
    return bool(weights) and all(any(torch.equal(weight, p) for p in own.get(weight.shape, [])) for weight in weights)


@torch.no_grad()
def check_exportable(adapter: Adapter, student: nn.Module, inputs: Inputs) -> None:
    """Warn, before the first epoch and not after the last, of targets that cannot take the model.

    Args:
        adapter: of the student's toolkit.
        student: in eval mode.
        inputs: of a batch; two samples of it are enough.
    """
    for reason, targets in export_problems(adapter, student, first_samples(inputs, 2)).items():
        _log.warning("prepared_model cannot be exported for %s: %s", " and ".join(targets), reason)
