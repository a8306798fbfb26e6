"""The file in OpenVINO against the trained model.

OpenVINO's kernels settle rounding ties their own way and cannot be told to record codes without being changed, so logits are
compared: what a wrong reading of the file would leave is no signal at all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ..._common.optional import require
from ...errors import ParityError
from .recorded_codes import run_labelled, with_codes
from .report import Agreement, Array, agreement, least_agreement

LOWEST_SQNR_DB = 3.0
LOWEST_TOP1 = 0.9
"""A file fails where an output is below both: networks that were never trained, at few bits, keep labels or signal, and a wrong
file neither."""

FEW = 0.01
"""Share of a quantizer's codes that may differ by more than one step before its layer is called the first that differs."""


def check_openvino(file: ir.Model, samples: Tensor, references: Sequence[Array]) -> Agreement | None:
    """Run a file in OpenVINO in float32 precision, without rounding that the file does not ask for, and compare logits.

    Args:
        file: as it will be written.
        samples: float32 (N, ...) inputs.
        references: all outputs of the prepared model, float32 (N, ...).

    Returns:
        How they compare; None where OpenVINO is not installed.

    Raises:
        ParityError: agreement and signal-to-noise ratio are both too low, or OpenVINO cannot load the file; names the layer.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    outputs = _run(file, samples)
    found = least_agreement(references, outputs)
    if any(_is_lost(*pair) for pair in zip(references, outputs, strict=True)):
        layer = _first_difference(file, samples)
        raise ParityError(
            f"{layer}: OpenVINO computes something else than the prepared model: {found.top1:.0%} of {found.samples} labels "
            f"agree, signal-to-noise ratio {found.sqnr_db:.1f} dB; asked for are {LOWEST_TOP1:.0%} or {LOWEST_SQNR_DB} dB. "
            "If the model is not trained yet, train it first; otherwise raise this layer's number of bits.",
            layer,
        )
    return found


def _is_lost(reference: Array, output: Array) -> bool:
    found = agreement(reference, output)
    has_labels = reference.size > len(reference)
    return not found.sqnr_db >= LOWEST_SQNR_DB and not (has_labels and found.top1 >= LOWEST_TOP1)


def _run(file: ir.Model, samples: Tensor) -> list[Array]:
    openvino = require("openvino", extra="openvino", purpose="compare with OpenVINO")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    try:
        model = core.read_model(ir.serde.serialize_model(file).SerializeToString())
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise ParityError(f"the file: OpenVINO cannot load it: {' '.join(str(error).split())[:300]}") from error
    results = compiled([samples.numpy()])
    return [np.asarray(results[output], dtype=np.float32) for output in compiled.outputs]


def _first_difference(file: ir.Model, samples: Tensor) -> str:
    """The first quantizer whose codes differ from ONNX Runtime's by more than one step in more than a few places."""
    _, expected = run_labelled(file, samples, optimize=False)
    tapped, taps = with_codes(file)
    outputs = _run(tapped, samples)[-len(taps) :] if taps else []
    for (labels, codes), (_, zero_point), array in zip(expected, taps, outputs, strict=True):
        if float((np.abs(array - np.float32(zero_point) - codes) > 1).mean()) > FEW:
            return labels.partition(",")[0].partition("#")[0]
    return "logits"
