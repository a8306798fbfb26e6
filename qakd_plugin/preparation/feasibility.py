"""Whether a prepared model could be exported, asked before it is trained."""

from __future__ import annotations

from torch import Tensor, nn

from ..deploy.canonical.write import trace
from ..errors import QakdError
from ..placement.targets import TARGETS
from ..toolkits import Adapter
from .description import target_problem


def export_problems(adapter: Adapter, model: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """Reasons why ``export_onnx`` would fail, each with the targets it holds for; empty where nothing speaks against it.

    Quantizers are looked at for every target, the export form is built, and torch.export traces it; ONNX is not written.

    Args:
        adapter: of the toolkit.
        model: the prepared model, in eval mode.
        example: float32 (N, ...).
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
