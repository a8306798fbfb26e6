"""The FP16 file against the trained model in float32: what FP16's rounding explains passes, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from ...errors import ParityError
from ...tasks.inputs import Inputs, call
from ..canonical.clamps import quantizers_after_relu
from .imposed_codes import imposed_codes
from .recorded_codes import run_recorded
from .report import arrays, largest_deviation, least_agreement

TIE_TOLERANCE = 0.45
"""How far from a tie, in steps, FP16 may round an activation the other way. A value and its scale are each off by up to 2^-11,
which is 0.12 steps at code 127; sums whose terms cancel add several times that (0.36 steps were seen in a network that was
hardly trained). At 0.5 a file that truncates in the place of rounding would pass."""

LOGIT_TOLERANCE = 1e-2
"""Largest deviation of logits, relative to their range, once ties are settled; and the share of integers that may differ."""


@dataclass(frozen=True)
class Float16Parity:
    """How the FP16 file compares with the float32 one, in ONNX Runtime without fusions.

    Attributes:
        codes: integer activation codes compared.
        ties: activations within :data:`TIE_TOLERANCE` of a tie that FP16 rounds the other way.
        deviation: of the logits, over their range, with all ties settled alike; the largest of all outputs.
        top1: share of samples with the same arg max, ties left as they fall; the smallest of all outputs.
    """

    codes: int
    ties: int
    deviation: float
    top1: float


def check_float16(file: ir.Model, form: nn.Module, samples: Inputs) -> Float16Parity:
    """Run an FP16 file without fusions, and compare it with the export form in float32.

    Args:
        file: from :func:`qakd_plugin.deploy.targets.float16.to_float16`.
        form: the export form it came from.
        samples: tensors that the file takes.

    Raises:
        ParityError: a quantizer's codes differ by more than FP16 explains, or the logits do; names the first.
    """
    program = "the FP16 file in ONNX Runtime"
    logits, codes = run_recorded(file, samples, optimize=False)
    with imposed_codes(form, codes, TIE_TOLERANCE, quantizers_after_relu(file.graph)) as outcome, torch.no_grad():
        settled = arrays(call(form, samples))
    outcome.raise_first(program, "its export form in float32")
    deviation = largest_deviation(logits, settled, LOGIT_TOLERANCE)
    if not deviation <= LOGIT_TOLERANCE:
        raise ParityError(
            f"logits: {program} and its export form in float32 differ by {deviation:.2g} of the logit range although all "
            f"activation codes agree; allowed are {LOGIT_TOLERANCE:g}. Export without float16.",
            "logits",
        )
    with torch.no_grad():
        expected = arrays(call(form, samples))
    return Float16Parity(outcome.compared, outcome.ties, deviation, least_agreement(expected, logits).top1)
