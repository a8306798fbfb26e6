"""Proof that a file computes what was trained.

Comparing logits alone cannot tell a wrong export from a rounding tie: two correct programs sum a convolution in different
orders, an activation that falls on a tie is rounded the other way in one of them, and the difference spreads. So ties are made
explicit. One program is run and its integer codes are recorded at every quantizer; the other is run with the same codes
*imposed*, and every place where it would have chosen another code must lie on a tie. With all ties settled alike, logits must
agree closely: every output, where a model has several.

The steps:
  1. the integer weight codes of the file are those of the trained model, up to the sign BatchNorm folding gives a channel;
  2. ONNX Runtime without fusions computes the export form;
  3. the export form computes the prepared model;
  4. where the file is meant for it, ONNX Runtime with all its fusions on computes the export form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...errors import ParityError
from ..canonical.clamps import quantizers_after_relu
from .imposed_codes import ImposedCodes, imposed_codes
from .layers import LayerOutputs, float_tail_layers, recorded_outputs, run_layers
from .recorded_codes import Codes, run_prepared, run_recorded
from .report import Array, ParityReport, arrays, deviations, largest_deviation, least_agreement
from .weights import check_weight_codes

TIE_TOLERANCE = 1e-2
"""How far from a tie, in steps, an activation may be rounded the other way. Float32 sums of a few thousand products differ by
up to about 1e-3 steps between programs; a wrong scale, weight or bias moves values by whole steps."""

FUSED_TIE_TOLERANCE = 0.1
"""The same with fusions on: integer kernels round the bias to a multiple of s_x * s_w, which adds up to a few hundredths."""

LOGIT_TOLERANCE = 1e-4
"""Largest deviation of logits, relative to their range, once ties are settled; of each output, where there are several."""


@dataclass(frozen=True)
class Program:
    """One way to compute the trained model: what it did with the samples.

    Attributes:
        name: for error messages.
        outputs: all of them, in the order that they have in the file.
        codes: that it chose at its activation quantizers.
        tolerance: how far from a tie, in steps, its codes may differ.
        layer_outputs: what named layers of it output on the samples.
        after_relu: quantizers whose ReLU this program has before them, where the export form may have it after them.
    """

    name: str
    outputs: Sequence[Array]
    codes: Codes
    tolerance: float
    layer_outputs: Callable[[Sequence[str]], LayerOutputs]
    after_relu: Collection[str] = ()


@dataclass(frozen=True)
class Reference:
    """The export form, which every program is compared with.

    Attributes:
        form: the export form.
        samples: float32 (N, ...) inputs.
        output_names: of the file, in order.
        tail: layers after the last quantizers, compared one by one where outputs differ although all codes agree.
    """

    form: nn.Module
    samples: Tensor
    output_names: Sequence[str]
    tail: Sequence[str]


def check_parity(
    file: ir.Model,
    form: nn.Module,
    prepared: nn.Module,
    samples: Tensor,
    *,
    fused: bool,
    after_relu: Collection[str] | None = None,
) -> ParityReport:
    """Run all steps.

    Args:
        file: the model as it will be written.
        form: the export form it came from.
        prepared: the prepared model, in eval mode with frozen ranges.
        samples: float32 (N, ...) inputs.
        fused: also check the file with the runtime's fusions on.
        after_relu: :func:`.clamps.quantizers_after_relu` of the canonical model, where ``file`` is another form of it.

    Raises:
        ParityError: with the name of the first layer, quantizer or output that differs.
        ExportError: ONNX Runtime cannot load or run the file.
    """
    weight_codes = check_weight_codes(file, form)
    after_relu = quantizers_after_relu(file.graph) if after_relu is None else after_relu
    names = [value.name or "" for value in file.graph.outputs]
    reference = Reference(form, samples, names, float_tail_layers(file, form))
    plain = _in_file(file, samples, after_relu, fusions=False)
    runtime, runtime_deviation = _same(reference, plain)
    trained = _in_toolkit(prepared, form, samples)
    toolkit, toolkit_deviation = _same(reference, trained)
    deployed = _in_file(file, samples, after_relu, fusions=True) if fused else None
    ties_fused = None if deployed is None else _same(reference, deployed)[0].ties
    return ParityReport(
        weight_codes=weight_codes,
        activation_codes=runtime.compared,
        ties_runtime=runtime.ties,
        ties_toolkit=toolkit.ties,
        ties_fused=ties_fused,
        runtime_deviation=runtime_deviation,
        toolkit_deviation=toolkit_deviation,
        unfused=least_agreement(trained.outputs, plain.outputs),
        fused=None if deployed is None else least_agreement(trained.outputs, deployed.outputs),
    )


def _in_file(file: ir.Model, samples: Tensor, after_relu: Collection[str], *, fusions: bool) -> Program:
    outputs, codes = run_recorded(file, samples, optimize=fusions)
    return Program(
        name="the exported file in ONNX Runtime" + (" with fusions" if fusions else ""),
        outputs=outputs,
        codes=codes,
        tolerance=FUSED_TIE_TOLERANCE if fusions else TIE_TOLERANCE,
        layer_outputs=lambda names: run_layers(file, samples, names),
        after_relu=after_relu,
    )


def _in_toolkit(prepared: nn.Module, form: nn.Module, samples: Tensor) -> Program:
    def layer_outputs(names: Sequence[str]) -> LayerOutputs:
        with recorded_outputs(prepared, names) as found, torch.no_grad():
            prepared(samples)
        return found

    outputs, codes = run_prepared(prepared, form, samples)
    return Program("the prepared model", outputs, codes, TIE_TOLERANCE, layer_outputs)


def _same(reference: Reference, program: Program) -> tuple[ImposedCodes, float]:
    """Run the reference with a program's codes; raise unless only ties differ and every output agrees.

    Returns:
        What came of the codes, and the largest deviation of any output.
    """
    with (
        imposed_codes(reference.form, program.codes, program.tolerance, program.after_relu) as outcome,
        recorded_outputs(reference.form, reference.tail) as settled,
        torch.no_grad(),
    ):
        expected = arrays(reference.form(reference.samples))
    outcome.raise_first(program.name, "its export form")
    found = deviations(program.outputs, expected)
    worst = int(np.argmax(found))  # of NaN, too
    if not found[worst] <= LOGIT_TOLERANCE:
        _raise_for_output(reference.output_names[worst], found[worst], program, settled)
    return outcome, found[worst]


def _raise_for_output(output: str, deviation: float, program: Program, settled: LayerOutputs) -> NoReturn:
    """Name the first of the ``settled`` layers that computes something else, or else the output.

    Raises:
        ParityError: always.
    """
    others = program.layer_outputs(list(settled))
    differ = [
        name
        for name, expected in settled.items()
        if name in others and not largest_deviation([others[name]], [expected]) <= LOGIT_TOLERANCE
    ]
    layer = differ[0] if differ else output
    raise ParityError(
        f"{layer}: {program.name} and its export form differ by {deviation:.2g} of the range of {output} although all "
        f"activation codes agree; allowed are {LOGIT_TOLERANCE:g}. "
        + (
            "It is the first layer after the last quantizer that computes something else."
            if differ
            else "What comes after the last quantizer computes something else."
        ),
        layer,
    )
