"""How two programs with the same quantizers are compared, so that a test holds on every processor.

Processors, kernels and numbers of threads add in different orders, so sums differ in their last bits. A value on a rounding
tie then gets the neighbouring code, which is just as right, and what follows differs by more than rounding does. How often
that changes a label is chance: above all for a network that was never trained, whose logits lie close together. So labels are
not counted. Either codes are compared, and each that differs must lie on a tie; or logits are, and what ties change must not
exceed what rounding to these codes has changed itself.
"""

from __future__ import annotations

import copy
import math
import os

import openvino
import torch
from torch import Tensor, nn

from qakd_plugin.deploy.parity.gate import _in_toolkit
from qakd_plugin.deploy.parity.programs import Reference, same
from qakd_plugin.deploy.parity.report import Array, ParityReport, arrays, least_agreement
from qakd_plugin.toolkits import adapter_for

RARE = 1e-3
"""Share of codes that may lie on a tie. Sums of float32 differ by up to 1e-3 steps (see TIE_TOLERANCE), mostly by 1e-5, and
values are spread over a step: some 1e-5 of them are that near to a tie. A scale or a bias that is wrong by a hundredth of a
step would move a hundredth of all codes."""


def require_same_but_for_ties(form: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Require that a prepared model computes what an export form does: the parity gate's step 3, for any two that should agree.

    Args:
        form: whose quantizers are named as those of ``model``; of this model, or of another that should compute the same.
        model: prepared, in eval mode with frozen ranges.
        images: float32 (N, ...).

    Raises:
        ParityError: a code differs that does not lie on a tie, or logits differ with all ties settled alike.
        AssertionError: codes on ties are not rare.
    """
    program = _in_toolkit(model, form, images)
    names = [f"output {index}" for index in range(len(program.outputs))]
    outcome, _ = same(Reference(form, images, names, tail=()), program)
    assert outcome.ties <= RARE * outcome.compared, f"{outcome.ties} ties in {outcome.compared} codes"


def ties_are_rare(proof: ParityReport) -> bool:
    """Whether the codes that were rounded the other way, all on ties, are few."""
    return proof.ties_runtime + proof.ties_toolkit <= RARE * proof.activation_codes


@torch.no_grad()
def tolerated_sqnr_db(student: nn.Module, images: Tensor) -> float:
    """The least signal-to-noise ratio of two programs that compute the same student, in dB.

    A code on a tie is half a step off whichever way it is rounded, and what follows it is rounded anew. If all codes were,
    the two programs would have rounding errors that are independent of each other, each as large as the student's against
    itself with quantizers off; their difference has twice that power, which is 3 dB. A wrong scale, weight or bias adds to it.

    Args:
        student: prepared, in eval mode; left as it is. Of several outputs, the noisiest counts.
        images: float32 (N, ...).
    """
    student = copy.deepcopy(student)
    adapter = adapter_for(student)
    adapter.freeze_ranges(student, True)
    quantized = arrays(student(images))
    adapter.set_fake_quant(student, False)
    return least_agreement(arrays(student(images)), quantized).sqnr_db - 10 * math.log10(2)


AS_WRITTEN = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "LP_TRANSFORMS_MODE": "NO"}
"""OpenVINO computes what a file says, in float32: without bfloat16, without activations that it quantizes itself, and without
its integer kernels. Sums of these saturate in 16 bits on processors without VNNI, and their results may lie further from the
file than rounding noise on others, too; export_onnx has a gate of its own for them."""


def run_openvino_as_written(path: str | os.PathLike[str], images: Tensor) -> list[Array]:
    """All outputs of a file as OpenVINO reads it: what can be compared on every processor."""
    compiled = openvino.Core().compile_model(os.fspath(path), "CPU", AS_WRITTEN)
    results = compiled([images.numpy()])
    return [results[output] for output in compiled.outputs]


@torch.no_grad()
def openvino_sqnr_db(path: str | os.PathLike[str], student: nn.Module, images: Tensor) -> float:
    """Of a file as OpenVINO reads it, against the student it was exported from."""
    return least_agreement(arrays(student(images)), run_openvino_as_written(path, images)).sqnr_db


def decided(logits: Tensor, deviation: float) -> Tensor:
    """Samples whose label no program may change, as a mask.

    Args:
        logits: (N, classes).
        deviation: the largest difference between programs, over the range of all logits.
    """
    first, second = logits.topk(2, 1).values.unbind(1)
    return first - second > 2 * deviation * (logits.max() - logits.min())
