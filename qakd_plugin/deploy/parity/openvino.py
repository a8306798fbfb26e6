"""The file in OpenVINO against the trained model.

OpenVINO's kernels settle rounding ties their own way and cannot be told to record codes without being changed, so outputs are
compared. If all codes were ties, its rounding errors would be independent of the student's and as large, each as large as what
rounding its activations changes of the student's own outputs: their difference has twice that power. What it reads wrongly
adds to it.

Of few samples, or where a network enlarges some errors far more than others, that power is itself a matter of chance. A
difference that it does not explain is compared with the student's own outputs when its activations move by up to a third of a
step before they are rounded: each code then differs from the student's as often as that of an independent rounding would. As
large as the largest of several such draws it may be.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..._common.cpu_features import onednn_adds_products_in_16_bits
from ..._common.optional import require
from ...errors import KEEP_FLOAT, ParityError
from ...export_form.modules import ActivationQDQ
from ...tasks.inputs import Inputs, call, named_tensors
from ..canonical.labels import first_quantizer
from .recorded_codes import run_labelled, with_codes
from .report import Agreement, Array, agreement, arrays, as_array, as_float32, largest_deviation, least_agreement
from .tolerances import LABELS, LOGIT_TOLERANCE

_log = logging.getLogger(__name__)

TIES_DB = 10 * math.log10(2)
DRAWS, DITHER = 8, 1 / 3
"""How often activations are moved before they are rounded, and by how many steps at most. A number anywhere between two codes
changes its code with probability DITHER / 2, which makes 1/6 of a step squared: two independent rounding errors of 1/12."""

FEW = 0.01
"""Share of a quantizer's codes that may differ by more than one step before its layer is called the first that differs."""

_OTHER = "Export for target='onnxruntime'."


def check_openvino(file: ir.Model, form: nn.Module, samples: Inputs, references: Sequence[Array]) -> Agreement | None:
    """Run a file in OpenVINO in float32 precision, without rounding that the file does not ask for, and compare outputs.

    Args:
        file: as it will be written.
        form: the export form it came from, which tells what rounding changes.
        samples: tensors that the file takes.
        references: all outputs of the prepared model.

    Returns:
        How they compare; None where OpenVINO is not installed.

    Raises:
        ParityError: an output differs by more than rounding can explain, or OpenVINO cannot load the file; names the layer.
            On a processor without VNNI, whose sums may saturate, the first is a warning: it says nothing of the file.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    outputs = _run(file, samples)
    with torch.no_grad():
        rounded = arrays(call(form, samples))
        with _unrounded(form):
            unrounded = arrays(call(form, samples))
    names = [value.name for value in file.graph.outputs]
    compared = list(zip(names, references, outputs, range(len(names)), strict=True))
    draws: list[list[Array]] = []
    for name, reference, output, index in [one for one in compared if one[1].dtype.kind == "f"] or compared:
        own = rounded[index], unrounded[index]
        if _explained(reference, output, *own):
            continue
        draws = draws or _draws(form, samples)
        moved = [draw[index] for draw in draws]
        if _within_draws(reference, output, rounded[index], moved):
            continue
        layer = _first_difference(file, samples) or name or "output"
        ties = [agreement(*own).sqnr_db - TIES_DB, *(agreement(rounded[index], draw).sqnr_db for draw in moved)]
        found, least = agreement(reference, output), min(ties)
        problem = (
            f"{layer}: OpenVINO computes something else than the prepared model: {found.top1:.0%} of {found.samples} labels "
            f"agree, the signal-to-noise ratio of {name} is {found.sqnr_db:.1f} dB, of which ties settled otherwise leave at "
            f"least {least:.1f} dB."
        )
        if onednn_adds_products_in_16_bits():
            _log.warning(
                "%s This processor has no VNNI, so sums of OpenVINO's integer kernels saturate at 16 bits here. Do not run "
                "the file on one like it: where it runs, compare with ONNX Runtime, or export there.",
                problem,
            )
            break
        raise ParityError(f"{problem} {_OTHER} {KEEP_FLOAT}", layer)
    return least_agreement(references, outputs)


def _explained(reference: Array, output: Array, rounded: Array, unrounded: Array) -> bool:
    """Whether an output differs by no more than if all codes were ties; the last two tell what rounding changes."""
    if largest_deviation([output], [reference]) <= LOGIT_TOLERANCE:
        return True
    if reference.shape != output.shape:
        return False
    if reference.dtype.kind != "f":
        return float((output != reference).mean()) <= max(LABELS, 2 * float((unrounded != rounded).mean()))
    return _power(output, reference) <= 2 * _power(unrounded, rounded)


def _within_draws(reference: Array, output: Array, rounded: Array, draws: Sequence[Array]) -> bool:
    """Whether an output differs by no more than the student's own does where codes are rounded otherwise."""
    if reference.shape != output.shape or reference.dtype.kind != "f":
        return False
    return _power(output, reference) <= max(_power(draw, rounded) for draw in draws)


def _draws(form: nn.Module, samples: Inputs) -> list[list[Array]]:
    """All outputs of the export form, DRAWS times, each with other numbers added to activations before they are rounded."""
    draw = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        assert isinstance(module, ActivationQDQ)
        steps = (2 * torch.rand(args[0].shape, generator=draw) - 1) * DITHER
        return (args[0] + steps * module.scale,)

    handles = [module.register_forward_pre_hook(move) for module in _activation_quantizers(form)]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            return [arrays(call(form, samples)) for _ in range(DRAWS)]
    finally:
        for handle in handles:
            handle.remove()


def _activation_quantizers(form: nn.Module) -> list[ActivationQDQ]:
    return [module for module in form.modules() if isinstance(module, ActivationQDQ)]


def _power(one: Array, other: Array) -> float:
    """Of a difference; equal infinite numbers have none."""
    with np.errstate(invalid="ignore"):
        return float((np.where(one == other, 0.0, one.astype(np.float64) - other) ** 2).sum())


@contextmanager
def _unrounded(form: nn.Module) -> Iterator[None]:
    """Within the block, the activation quantizers of an export form clamp to their ranges and do not round."""

    def clamp(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        assert isinstance(module, ActivationQDQ)
        low, high = ((code - module.zero_point) * module.scale for code in (module.quant_min, module.quant_max))
        return torch.clamp(args[0], low, high)

    handles = [module.register_forward_hook(clamp) for module in _activation_quantizers(form)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(file: ir.Model, samples: Inputs) -> list[Array]:
    openvino = require("openvino", extra="openvino", purpose="compare with OpenVINO")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    try:
        model = core.read_model(ir.serde.serialize_model(file).SerializeToString())
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise ParityError(f"the file: OpenVINO cannot load it: {' '.join(str(error).split())[:300]}. {_OTHER}") from error
    names = [value.name for value in file.graph.inputs]
    results = compiled(dict(zip(names, map(as_array, named_tensors(samples).values()), strict=True)))
    return [as_float32(np.asarray(results[output])) for output in compiled.outputs]


def _first_difference(file: ir.Model, samples: Inputs) -> str | None:
    """The first quantizer whose codes differ from ONNX Runtime's by more than one step in more than a few places."""
    _, expected = run_labelled(file, samples, optimize=False)
    tapped, taps = with_codes(file)
    outputs = _run(tapped, samples)[-len(taps) :] if taps else []
    for (labels, codes), (_, zero_point), array in zip(expected, taps, outputs, strict=True):
        if float((np.abs(array.astype(np.float32) - np.float32(zero_point) - codes) > 1).mean()) > FEW:
            return first_quantizer(labels)
    return None
