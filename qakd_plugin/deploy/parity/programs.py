"""Programs that compute the trained model, and how one is compared with the export form: every tie settled alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ...errors import KEEP_FLOAT, ParityError
from ...tasks.inputs import Inputs, call
from ..canonical.labels import Call
from .imposed_codes import ImposedCodes, imposed_codes
from .layers import LayerOutputs, recorded_outputs, run_layers
from .recorded_codes import Codes, Recorder
from .report import Array, arrays, deviations, largest_deviation
from .tolerances import LOGIT_TOLERANCE

TIE_TOLERANCE = 1e-2
"""How far from a tie, in steps, an activation may be rounded the other way. Float32 sums of a few thousand products differ by
up to about 1e-3 steps between programs; a wrong scale, weight or bias moves values by whole steps."""

FUSED_TIE_TOLERANCE = 0.1
"""The same with fusions on: integer kernels round the bias to a multiple of s_x * s_w, which adds up to a few hundredths."""


@dataclass(frozen=True)
class Program:
    """One way to compute the trained model: what it did with the samples.

    Attributes:
        name: for error messages.
        outputs: all of them, in the order that they have in the file.
        codes: that it chose at its activation quantizers.
        tolerance: how far from a tie, in steps, its codes may differ.
        layer_outputs: what named layers of it output on the samples.
        after_relu: calls of quantizers whose ReLU this program has before them, where the export form may have it after them.
    """

    name: str
    outputs: Sequence[Array]
    codes: Codes
    tolerance: float
    layer_outputs: Callable[[Sequence[str]], LayerOutputs]
    after_relu: Collection[Call] = ()


@dataclass(frozen=True)
class Reference:
    """The export form, which every program is compared with.

    Attributes:
        form: the export form.
        samples: what it is called with, on the CPU.
        output_names: of the file, in order.
        tail: layers after the last quantizers, compared one by one where outputs differ although all codes agree.
        ranges: of the outputs, where ``samples`` are too few to show them.
    """

    form: nn.Module
    samples: Inputs
    output_names: Sequence[str]
    tail: Sequence[str]
    ranges: Sequence[float] | None = None


class InFile:
    """A file in ONNX Runtime, loaded once.

    Args:
        file: the model as it will be written.
        after_relu: of its :class:`Program`.
        fusions: let the runtime optimize the graph.
    """

    def __init__(self, file: ir.Model, after_relu: Collection[Call], *, fusions: bool = False) -> None:
        self.file, self._after_relu, self._fusions = file, after_relu, fusions
        self._recorder = Recorder(file, fusions=fusions)

    def run(self, samples: Inputs, at: str = "") -> Program:
        """What it does with samples; ``at`` says for a message which ones these are."""
        outputs, codes = self._recorder.run(samples)
        return Program(
            name="the exported file in ONNX Runtime" + (" with fusions" if self._fusions else "") + at,
            outputs=outputs,
            codes=codes,
            tolerance=FUSED_TIE_TOLERANCE if self._fusions else TIE_TOLERANCE,
            layer_outputs=lambda names: run_layers(self.file, samples, names),
            after_relu=self._after_relu,
        )


def same(reference: Reference, program: Program) -> tuple[ImposedCodes, float]:
    """Run the reference with a program's codes; raise unless only ties differ and every output agrees.

    Returns:
        What came of the codes, and the largest deviation of any output.
    """
    with (
        imposed_codes(reference.form, program.codes, program.tolerance, program.after_relu) as outcome,
        recorded_outputs(reference.form, reference.tail) as settled,
        torch.no_grad(),
    ):
        expected = arrays(call(reference.form, reference.samples))
    outcome.raise_first(program.name, "its export form")
    for name in outcome.missing:
        if _is_read(reference, name):
            raise ParityError(
                f"{name}: {program.name} lacks this quantizer, so its codes cannot be compared. {KEEP_FLOAT}", name
            )
    found = deviations(program.outputs, expected, ranges=reference.ranges)
    worst = int(np.argmax(found))  # of NaN, too
    if not found[worst] <= LOGIT_TOLERANCE:
        _raise_for_output(reference.output_names[worst], found[worst], program, settled)
    return outcome, found[worst]


def _is_read(reference: Reference, quantizer: str) -> bool:
    """Whether any output depends on what a quantizer outputs: the exporter leaves those out of which none does."""

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.full_like(output, torch.nan)

    with torch.no_grad():
        outputs = arrays(call(reference.form, reference.samples))
        handle = reference.form.get_submodule(quantizer).register_forward_hook(hook)
        try:
            others = arrays(call(reference.form, reference.samples))
        finally:
            handle.remove()
    return any(not np.array_equal(*pair, equal_nan=True) for pair in zip(outputs, others, strict=True))


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
        )
        + f" {KEEP_FLOAT}",
        layer,
    )
