"""This package's losses as criteria of ``modelopt.torch.distill``.

Order matters: ``mtq.quantize`` first, ``mtd.convert`` after it, and ``mtd.export`` before saving and exporting. The other way
round ``mtq.quantize`` quantizes the teacher as well, because ``mtd.convert`` makes it a part of the student.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .._common.optional import require
from ..errors import QakdError
from ..losses import kl_divergence
from ..tasks.outputs import logits_of
from ..toolkits import adapter_for
from ..training.attached import refuse_features
from ..training.methods import KD, SQAKD, Method


class KLCriterion(_Loss):
    """``T^2 KL(teacher || student)``, the mean over the batch: the same number and gradient as ``losses.kl_divergence``.

    ModelOpt's own ``LogitsDistillationLoss`` computes in the type of the logits; this one in float64.

    Args:
        temperature: softens both predictions.

    Raises:
        QakdError: the temperature is not positive.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = SQAKD(temperature).temperature  # which checks it

    def forward(self, student: Any, teacher: Any) -> Tensor:
        """The loss of the student's output; no gradient flows into the teacher's.

        Args:
            student: logits (N, C), or an output that holds them under ``logits``.
            teacher: likewise.

        Returns:
            A scalar.

        Raises:
            QakdError: one of them holds no logits.
        """
        own, other = logits_of(student, "the student"), logits_of(teacher, "the teacher")
        return kl_divergence(own, other.detach(), self.temperature).mean()


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
    refuse_features(method, method.phases(1), "a criterion of mtd.convert")
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
    return {"teacher_model": teacher, "criterion": KLCriterion(method.temperature), "loss_balancer": balancer}
