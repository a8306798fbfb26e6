"""``attach``: the same losses in somebody's own training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_map_only

from .._common.device import make_tensors_on
from .._common.training_record import TrainingRecord, record_training
from ..errors import QakdError
from ..tasks.inputs import device_of_network, forward_names
from ..tasks.outputs import Outputs, named_outputs
from ..tasks.task_loss import TaskLoss, check_task_loss
from ..toolkits import adapter_for
from .autocast import float32_hooks
from .curvature import warn_of_no_refresh
from .features import FeatureTaps
from .methods import SQAKD, MatchCheck, Method, Phase, planned, require_labels, total_loss
from .preflight import check_separate
from .teachers import one_teacher, require_teacher, taught_outputs


@dataclass(frozen=True)
class _Seen:
    """What the hook saw of the last batch."""

    student: Outputs
    teacher: Outputs | None
    inputs: Any


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments by the names that forward gives them, as masks are named; one tensor alone stays one."""
    if len(args) == 1 and not kwargs:
        return args[0]
    names, _ = forward_names(module)
    return dict(zip(names, args, strict=False)) | kwargs


class Attached:
    """Losses of a method on a prepared model, collected by a forward hook on its root.

    The root is the only module whose hooks fire with every toolkit. While attached, quantizers see float32 under autocast. Made
    by :func:`attach`; detach it with :meth:`detach` or by leaving the ``with`` block.

    Attributes:
        method: whose losses these are.
        teacher: the network that teaches.
        parts: terms of the last loss by name, unweighted and detached.
    """

    def __init__(self, prepared_model: nn.Module, teacher: nn.Module | None, method: Method, phases: Sequence[Phase]) -> None:
        self.method = method
        self.teacher = teacher
        self.parts: dict[str, Tensor] = {}
        self._phases = list(phases)
        self._index = 0
        self._batch: _Seen | None = None
        self._recorded = False
        self._check = MatchCheck()
        self._root, self._model = prepared_model, unwrapped(prepared_model)
        self._adapter = adapter_for(self._model)
        wanted = next((phase.features for phase in phases if phase.features is not None), None)
        self._taps = None
        if wanted is not None and teacher is not None:  # first: it refuses unknown layers, and no hook may be left
            self._taps = FeatureTaps(self._adapter, self._model, unwrapped(teacher), wanted)
        # On the wrapper where there is one: DistributedDataParallel hands on its own output, with its own backward pass.
        self._handles = [
            prepared_model.register_forward_hook(self._collect, with_kwargs=True),
            *float32_hooks(self._adapter, self._model),
        ]
        self._adapter.freeze_ranges(self._model, False)  # here already, for loops that have their own way into training mode

    @property
    def phase(self) -> Phase:
        """The phase whose losses :meth:`loss` puts together."""
        return self._phases[self._index]

    def next_phase(self) -> Phase:
        """Go on to the next phase and return it.

        Raises:
            QakdError: this was the last one.
        """
        if self._index + 1 == len(self._phases):
            raise QakdError(f"{self.phase.name!r} is the last phase of {type(self.method).__name__}: leave this call out.")
        self._index += 1
        self._batch = None
        return self.phase

    def train(self) -> None:
        """Student in training mode as its toolkit wants it (PT2E forbids ``.train()``), and its ranges free to follow."""
        self._adapter.freeze_ranges(self._model, False)
        self._adapter.set_mode(self._model, True)

    def eval(self, copy: nn.Module | None = None) -> None:
        """Student in eval mode with frozen ranges: for validation, and at the end.

        Args:
            copy: of the student, such as a moving average of its weights, that is meant in its place; ``copy.eval()`` alone
                leaves the ranges of FX and PT2E free.
        """
        model = self._model if copy is None else unwrapped(copy)
        self._adapter.set_mode(model, False)
        self._adapter.freeze_ranges(model, True)

    def loss(self, labels: Any = None) -> Tensor:
        """The student's loss on the last batch: a scalar to call ``backward`` on.

        It is a mean over the batch: divide it by the number of micro-batches that share one step of the optimizer.

        Args:
            labels: (N,) or (N, C), or what ``task_loss`` and masks take, where the phase reads them.

        Raises:
            LabelsRequiredError: labels are needed and missing; names the method.
            QakdError: the model has not been called in training since the last loss.
        """
        seen = self._last()
        if any(term.needs_labels for term in self.phase.student):
            require_labels(self.method, labels)
        self._check(self.phase, seen.student, seen.teacher, seen.inputs, labels)
        loss, self.parts = total_loss(self.phase.student, seen.student, seen.teacher, labels, seen.inputs)
        if self._taps is not None and self.phase.features is not None:
            loss = self._taps.added(loss, self.parts)
        if not self.phase.teacher:
            self._batch = None
        if not self._recorded:
            record_training(self._model, TrainingRecord(type(self.method).__name__, "own"))
            self._recorded = True
        return loss

    def teacher_loss(self, labels: Any = None) -> Tensor:
        """The teacher's loss on the last batch, while it learns too; call it after :meth:`loss`.

        Raises:
            QakdError: the teacher is frozen in this phase, or none of its parameters requires a gradient.
        """
        if not self.phase.teacher:
            raise QakdError(f"the teacher is frozen in phase {self.phase.name!r}: call kd.loss() alone here.")
        seen = self._last()
        if seen.teacher is None or not any(tensor.requires_grad for tensor in seen.teacher.values()):
            raise QakdError(
                f"the teacher learns in phase {self.phase.name!r}, but none of its parameters requires a gradient. Call "
                "teacher.requires_grad_(True) before the phase."
            )
        if any(term.needs_labels for term in self.phase.teacher):
            require_labels(self.method, labels)
        loss, _ = total_loss(self.phase.teacher, seen.teacher, seen.student, labels, seen.inputs)
        self._batch = None
        return loss

    def detach(self) -> None:
        """Remove the hooks. Nothing of them is left on the model."""
        for handle in self._handles:
            handle.remove()
        if self._taps is not None:
            self._taps.remove()
        self._batch = None  # it holds the graph of the last forward pass

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, _: object) -> Attached:
        """A copy of the model that is made meanwhile holds this handle, which is deaf to it, and not a second teacher."""
        return self

    def _collect(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not self._root or not torch.is_grad_enabled():
            return
        student = named_outputs(output)
        other = None
        if self.phase.needs_teacher and student:
            # Wrappers move their inputs themselves; a hook sees them where the caller left them.
            device = next(iter(student.values())).device
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
            other = taught_outputs(self.teacher, self.phase, args, kwargs)
        self._batch = _Seen(student, other, _inputs(module, args, kwargs))

    def _last(self) -> _Seen:
        if self._batch is None:
            raise QakdError(
                "call prepared_model(x) with gradients enabled before kd.loss(): there is no batch to take a loss on."
            )
        return self._batch


def attach(
    prepared_model: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | None,
    method: Method | None = None,
    *,
    task_loss: TaskLoss | None = None,
) -> Attached:
    """Register a method's losses on a prepared model, for use in a loop of your own.

    Example::

        with qakd.attach(prepared_model, teacher, method=qakd.SQAKD(temperature=4.0)) as kd:
            kd.train()
            for x, y in loader:
                prepared_model(x)
                kd.loss().backward()
                optimizer.step(); optimizer.zero_grad()
            kd.eval()

    Such a loop takes no turns with other threads: prepare, distill or export there before it or after it, or in another
    process. While torch traces a model, calls of any other one fail.

    Args:
        prepared_model: prepared by a supported toolkit; or DistributedDataParallel, or what ``torch.compile`` returns, around
            one: then call the wrapper in your loop. Attach after ``use_quantizers``, which exchanges quantizers.
        teacher: full-precision network, compiled or not, or several, of which the mean logits teach; None for methods that need
            none. While it is frozen it runs in eval mode and without gradients, and its own mode is put back after each call.
            While it learns, its mode, its optimizer and, in data parallel training, its wrapper are yours.
        method: SQAKD() by default.
        task_loss: what is learned from labels, as in ``distill``. With "model" call the model with its labels yourself; its
            ``loss`` is taken.

    Returns:
        The handle; a context manager that detaches at the end.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: the method needs a teacher and there is none, or the teacher shares tensors with the model.
    """
    method = SQAKD() if method is None else method
    check_task_loss(task_loss)
    phases = planned(method, 100, task_loss)  # how many epochs each has is up to the caller's loop
    adapter = adapter_for(unwrapped(prepared_model))
    teacher = one_teacher(teacher)
    require_teacher(method, phases, teacher)
    if teacher is not None:
        check_separate(prepared_model, teacher)
    warn_of_no_refresh(adapter, unwrapped(prepared_model), "a loop of your own")
    make_tensors_on(unwrapped(prepared_model), device_of_network(prepared_model))
    return Attached(prepared_model, teacher, method, phases)


def unwrapped(model: nn.Module) -> nn.Module:
    """The prepared model inside DistributedDataParallel, DataParallel and ``torch.compile``, in any order."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def refuse_features(method: Method, phases: Sequence[Phase], bridge: str) -> None:
    """Raise QakdError where a method compares features, which a bridge to another library does not pick up."""
    if any(phase.features for phase in phases):
        raise QakdError(
            f"{type(method).__name__}(features=...): {bridge} compares logits only. Use qakd.distill or qakd.attach, or leave "
            "features out."
        )
