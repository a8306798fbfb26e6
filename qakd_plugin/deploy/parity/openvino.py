"""The file in OpenVINO against the trained model.

OpenVINO's kernels settle rounding ties their own way and cannot be told to record codes without being changed, so logits are
compared: what a wrong reading of the file would leave is no signal at all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..._common.optional import require
from ...errors import ParityError
from ...tasks.inputs import Inputs, named_tensors
from ..canonical.labels import first_quantizer
from .recorded_codes import run_labelled, with_codes
from .report import Agreement, Array, agreement, as_array, as_float32, least_agreement

LOWEST_SQNR_DB = 3.0
LOWEST_TOP1 = 0.9
"""A file fails where an output is below both: networks that were never trained, at few bits, keep labels or signal, and a wrong
file neither."""

FEW = 0.01
"""Share of a quantizer's codes that may differ by more than one step before its layer is called the first that differs."""


def check_openvino(file: ir.Model, samples: Inputs, references: Sequence[Array]) -> Agreement | None:
    """Run a file in OpenVINO in float32 precision, without rounding that the file does not ask for, and compare logits.

    Args:
        file: as it will be written.
        samples: tensors that the file takes.
        references: all outputs of the prepared model.

    Returns:
        How they compare; None where OpenVINO is not installed.

    Raises:
        ParityError: agreement and signal-to-noise ratio are both too low, or OpenVINO cannot load the file; names the layer.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    outputs = _run(file, samples)
    found = least_agreement(references, outputs)
    pairs = list(zip(references, outputs, strict=True))
    if any(_is_lost(*pair) for pair in [pair for pair in pairs if pair[0].dtype.kind == "f"] or pairs):
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
    has_labels = reference.dtype.kind != "f" or (reference.ndim > 0 and reference.size > len(reference))
    return not found.sqnr_db >= LOWEST_SQNR_DB and not (has_labels and found.top1 >= LOWEST_TOP1)


def _run(file: ir.Model, samples: Inputs) -> list[Array]:
    openvino = require("openvino", extra="openvino", purpose="compare with OpenVINO")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    try:
        model = core.read_model(ir.serde.serialize_model(file).SerializeToString())
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise ParityError(f"the file: OpenVINO cannot load it: {' '.join(str(error).split())[:300]}") from error
    names = [value.name for value in file.graph.inputs]
    results = compiled(dict(zip(names, map(as_array, named_tensors(samples).values()), strict=True)))
    return [as_float32(np.asarray(results[output])) for output in compiled.outputs]


def _first_difference(file: ir.Model, samples: Inputs) -> str:
    """The first quantizer whose codes differ from ONNX Runtime's by more than one step in more than a few places."""
    _, expected = run_labelled(file, samples, optimize=False)
    tapped, taps = with_codes(file)
    outputs = _run(tapped, samples)[-len(taps) :] if taps else []
    for (labels, codes), (_, zero_point), array in zip(expected, taps, outputs, strict=True):
        if float((np.abs(array.astype(np.float32) - np.float32(zero_point) - codes) > 1).mean()) > FEW:
            return first_quantizer(labels)
    return "logits"
