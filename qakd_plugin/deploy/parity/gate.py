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
  4. where the file is meant for it, ONNX Runtime with all its fusions on computes the export form;
  5. at other sizes, where the file has dynamic dimensions, ONNX Runtime still computes the export form (a size baked into the
     graph is seen here), and what it computes for a sample alone is what it computes for it in a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir
import torch
from torch import nn

from ...tasks.inputs import Inputs, call
from ..canonical.clamps import quantizers_after_relu
from ..canonical.labels import Call
from .layers import LayerOutputs, float_tail_layers, recorded_outputs
from .other_sizes import check_other_sizes
from .programs import TIE_TOLERANCE, InFile, Program, Reference, same
from .recorded_codes import run_prepared
from .report import ParityReport, least_agreement
from .weights import check_weight_codes


def check_parity(
    file: ir.Model,
    form: nn.Module,
    prepared: nn.Module,
    samples: Inputs,
    *,
    fused: bool,
    after_relu: Collection[Call] | None = None,
) -> ParityReport:
    """Run all steps.

    Args:
        file: the model as it will be written.
        form: the export form it came from.
        prepared: the prepared model, in eval mode with frozen ranges.
        samples: what the model is called with, on the CPU.
        fused: also check the file with the runtime's fusions on.
        after_relu: :func:`.clamps.quantizers_after_relu` of the canonical model, where ``file`` is another form of it.

    Raises:
        ParityError: with the name of the first layer, quantizer or output that differs.
        ExportError: ONNX Runtime cannot load or run the file.
    """
    weight_codes = check_weight_codes(file, form, samples)
    after_relu = quantizers_after_relu(file.graph) if after_relu is None else after_relu
    names = [value.name or "" for value in file.graph.outputs]
    reference = Reference(form, samples, names, float_tail_layers(file, form))
    in_file = InFile(file, after_relu)
    plain = in_file.run(samples)
    runtime, runtime_deviation = same(reference, plain)
    trained = _in_toolkit(prepared, form, samples)
    toolkit, toolkit_deviation = same(reference, trained)
    check_other_sizes(in_file, reference, plain)
    expected, found = trained.outputs, plain.outputs
    del trained, plain, in_file  # codes of all activations, and a session
    deployed = InFile(file, after_relu, fusions=True).run(samples) if fused else None
    ties_fused = None if deployed is None else same(reference, deployed)[0].ties
    return ParityReport(
        weight_codes=weight_codes,
        activation_codes=runtime.compared,
        ties_runtime=runtime.ties,
        ties_toolkit=toolkit.ties,
        ties_fused=ties_fused,
        runtime_deviation=runtime_deviation,
        toolkit_deviation=toolkit_deviation,
        unfused=least_agreement(expected, found),
        fused=None if deployed is None else least_agreement(expected, deployed.outputs),
    )


def _in_toolkit(prepared: nn.Module, form: nn.Module, samples: Inputs) -> Program:
    def layer_outputs(names: Sequence[str]) -> LayerOutputs:
        with recorded_outputs(prepared, names) as found, torch.no_grad():
            call(prepared, samples)
        return found

    outputs, codes = run_prepared(prepared, form, samples)
    return Program("the prepared model", outputs, codes, TIE_TOLERANCE, layer_outputs)
