"""This package's losses as criteria of ``modelopt.torch.distill``.

Order matters: ``mtq.quantize`` first, ``mtd.convert`` after it, and ``mtd.export`` before saving and exporting. The other way
round ``mtq.quantize`` quantizes the teacher as well, because ``mtd.convert`` makes it a part of the student.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .._common.optional import require
from .._common.training_record import TrainingRecord, record_training
from ..errors import QakdError
from ..tasks.matchers import Match
from ..tasks.outputs import named_outputs
from ..toolkits import adapter_for
from ..training.attached import refuse_features
from ..training.methods import KD, SQAKD, Imitation, MatchCheck, Method, Phase, planned, total_loss


class _Recording:
    """A forward hook of a criterion: at its first loss that trains the student, the student remembers the method."""

    def __init__(self, student: nn.Module, method: str) -> None:
        self._student, self._method, self._recorded = student, method, False

    def __call__(self, _criterion: nn.Module, _outputs: object, loss: Tensor) -> None:
        if loss.requires_grad and not self._recorded:
            record_training(self._student, TrainingRecord(self._method, "own"))
            self._recorded = True


class KLCriterion(_Loss):
    """``T^2 KL(teacher || student)``, or what ``match`` says, the mean over the batch: number and gradient as in ``distill``.

    ModelOpt's own ``LogitsDistillationLoss`` computes in the type of the logits; this one in float64.

    Args:
        temperature: softens both predictions.
        match: as in :class:`~qakd_plugin.SQAKD`; None where exactly one reading is possible. A criterion sees outputs alone:
            ``where`` cannot be the name of a mask.

    Raises:
        QakdError: the temperature is not positive, or ``match`` names a mask.
    """

    def __init__(self, temperature: float = 4.0, match: Match | None = None) -> None:
        super().__init__()
        self.temperature = SQAKD(temperature, match=match).temperature  # which checks both
        for name, matcher in (match or {}).items():
            if matcher.where is not None:
                raise QakdError(
                    f"match: where={matcher.where!r} of {name!r} reads inputs, and a criterion of mtd.convert sees outputs "
                    "alone. Train with qakd.distill or qakd.attach, or leave where out."
                )
        self._imitation, self._check = Imitation(temperature, match=match), MatchCheck()

    def forward(self, student: Any, teacher: Any) -> Tensor:
        """The loss of the student's output; no gradient flows into the teacher's.

        Args:
            student: what it outputs: logits, or any tree of tensors.
            teacher: likewise.

        Returns:
            A scalar.

        Raises:
            QakdError: what is compared can be read in more than one way, or cannot be compared.
        """
        phase = Phase("distill", 1, (self._imitation,))
        own, other = named_outputs(student), named_outputs(teacher)
        self._check(phase, own, other, (), None)
        return total_loss(phase.student, own, other, None, ())[0]


def kd_loss_config(prepared_model: nn.Module, teacher: nn.Module, method: Method | None = None) -> dict[str, Any]:
    """The configuration of ModelOpt's mode ``"kd_loss"`` that trains with a method of this package.

    Example::

        config = kd_loss_config(prepared_model, teacher, qakd.SQAKD())
        model = mtd.convert(prepared_model, mode=[("kd_loss", config)])

    For KD, pass the cross-entropy of the labels: ``model.compute_kd_loss(student_loss=cross_entropy(logits, y))``.

    Args:
        prepared_model: quantized already, by ``mtq.quantize`` or ``qakd_plugin.prepare``.
        teacher: full-precision network. ``mtd.convert`` makes it a part of the student and switches off its gradients.
        method: SQAKD() by default, or KD.

    Returns:
        ``teacher_model``, ``criterion`` and ``loss_balancer``.

    Raises:
        NotPreparedError: the model has not been quantized yet.
        MissingPackageError: ModelOpt is not installed.
        QakdError: another toolkit prepared the model, or the method has phases, or none with a teacher.
    """
    distill = require("modelopt.torch.distill", extra="modelopt", purpose="convert a model with mtd.convert")
    toolkit = adapter_for(prepared_model).name
    if toolkit != "modelopt":
        raise QakdError(f"mtd.convert takes models of ModelOpt, and prepared_model was prepared by {toolkit}: use qakd.attach.")
    method = SQAKD() if method is None else method
    refuse_features(method, planned(method, 1, None), "a criterion of mtd.convert")
    if isinstance(method, SQAKD):
        alpha = None
    elif isinstance(method, KD):
        alpha = float(method.alpha)
    else:
        raise QakdError(
            f"method={type(method).__name__}() cannot be expressed as a criterion of mtd.convert, which knows one phase with a "
            "frozen teacher: use SQAKD or KD, or train with qakd.distill or qakd.attach."
        )
    balancer = None if alpha is None else distill.StaticLossBalancer(alpha)
    criterion = KLCriterion(method.temperature, method.match)
    # What mtd.convert returns and what mtd.export gives back are this same object, in another class.
    criterion.register_forward_hook(_Recording(prepared_model, type(method).__name__))
    return {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer}
