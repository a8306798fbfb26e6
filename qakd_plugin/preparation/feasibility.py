"""Whether a prepared model can be exported: what each target takes, asked before training and before exporting."""

from __future__ import annotations

from torch import nn

from ..errors import QakdError
from ..export_form.tracing import trace
from ..placement.targets import TARGETS
from ..quantizers.qparams import QParams
from ..tasks.inputs import Inputs
from ..toolkits import Adapter, Quantizer


def target_problem(quantizer: Quantizer, qparams: QParams, target: str) -> str | None:
    """Why ``target`` cannot take a quantizer, or None."""
    if quantizer.role == "weight" and not qparams.symmetric:
        return "asymmetric weights: every target needs zero point 0"
    if quantizer.role == "activation" and qparams.scale.numel() != 1:
        return "activations need one scale per tensor"
    if target == "tensorrt" and not qparams.symmetric:
        zero_point = int(qparams.zero_point.flatten()[0])
        return f"asymmetric (zero point {zero_point}): TensorRT takes zero point 0 only"
    if target == "tensorrt" and qparams.quant_max > 127:
        return f"codes up to {qparams.quant_max} do not fit TensorRT's signed 8 bits"
    return None


def export_problems(adapter: Adapter, model: nn.Module, example: Inputs) -> dict[str, list[str]]:
    """Reasons why ``export_onnx`` would fail, each with the targets it holds for; empty where nothing speaks against it.

    Quantizers are looked at for every target, the export form is built, and torch.export traces it; ONNX is not written.

    Args:
        adapter: of the toolkit.
        model: the prepared model, in eval mode.
        example: what it is called with.
    """
    everywhere: list[str] = list(TARGETS)
    problems: dict[str, list[str]] = {}
    try:
        for quantizer in adapter.quantizers(model):
            qparams = adapter.qparams(quantizer)
            for target in everywhere:
                if reason := target_problem(quantizer, qparams, target):
                    problems.setdefault(f"{quantizer.fqn}: {reason}", []).append(target)
        if not problems:
            trace(adapter.export_form(model), example)
    except QakdError as error:
        problems[str(error)] = everywhere
    return problems
