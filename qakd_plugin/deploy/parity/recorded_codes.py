"""Which integer codes a program chose, at every call of every activation quantizer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...errors import KEEP_FLOAT, ParityError
from ...export_form.modules import ActivationQDQ
from ...tasks.inputs import Inputs, call
from ..canonical.graph import activation_quantizers, copied, scalar
from ..canonical.labels import Call, calls_in, first_quantizer, labels_of
from .onnxruntime import Session
from .report import Array, arrays

Codes = dict[str, list[Array]]
"""Integer codes, as floats, of every call of every activation quantizer, by name."""


class Recorder:
    """A file, loaded once, that also tells the codes of its activation quantizers.

    Fused kernels output the codes that their quantizer would have, so reading them does not undo a fusion.

    Args:
        file: any.
        fusions: let the runtime optimize the graph.
    """

    def __init__(self, file: ir.Model, *, fusions: bool) -> None:
        tapped, self._taps = with_codes(file)
        self._session = Session(tapped, fusions=fusions)

    def run(self, samples: Inputs) -> tuple[list[Array], Codes]:
        """Outputs, and the integer codes of every activation quantizer, by its calls."""
        outputs, recorded = self.run_labelled(samples)
        by_call: dict[Call, Array] = {}
        for labels, array in recorded:
            for made in calls_in(labels):
                assert made not in by_call, f"two nodes carry out {made}"
                by_call[made] = array
        codes: Codes = {}
        for made in sorted(by_call):
            codes.setdefault(made.quantizer, []).append(by_call[made])
        return outputs, codes

    def run_labelled(self, samples: Inputs) -> tuple[list[Array], list[tuple[str, Array]]]:
        """As :meth:`run`, for files from which quantizers were dropped too: codes with their labels, in order."""
        found = self._session.run(samples)
        count = len(found) - len(self._taps)
        return found[:count], [
            (labels, codes.astype(np.float32) - np.float32(zero))
            for (labels, zero), codes in zip(self._taps, found[count:], strict=True)
        ]


def run_recorded(file: ir.Model, samples: Inputs, *, optimize: bool) -> tuple[list[Array], Codes]:
    """Load a file, with or without the runtime's fusions, and :meth:`Recorder.run` it once."""
    return Recorder(file, fusions=optimize).run(samples)


def run_labelled(file: ir.Model, samples: Inputs, *, optimize: bool) -> tuple[list[Array], list[tuple[str, Array]]]:
    """Likewise :meth:`Recorder.run_labelled`."""
    return Recorder(file, fusions=optimize).run_labelled(samples)


def run_prepared(prepared: nn.Module, form: nn.Module, samples: Inputs) -> tuple[list[Array], Codes]:
    """Outputs of the prepared model, and the codes of its activation quantizers under the export form's names."""
    codes: Codes = {}

    def hook(name: str, quantizer: ActivationQDQ) -> object:
        def record(module: nn.Module, args: object, output: Tensor) -> None:
            codes.setdefault(name, []).append(torch.round(output / quantizer.scale).numpy())

        return record

    handles = []
    seen: set[int] = set()
    for name, quantizer in form.named_modules():
        if isinstance(quantizer, ActivationQDQ) and id(quantizer) not in seen:
            seen.add(id(quantizer))
            source = prepared.get_submodule(quantizer.source)
            handles.append(source.register_forward_hook(hook(name, quantizer)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            outputs = arrays(call(prepared, samples))
    finally:
        for handle in handles:
            handle.remove()
    return outputs, codes


def with_codes(file: ir.Model) -> tuple[ir.Model, list[tuple[str, float]]]:
    """A copy that also outputs the codes of every activation quantizer, and their labels and zero points."""
    tapped = copied(file)
    taps: list[tuple[str, float]] = []
    for node in activation_quantizers(tapped.graph):
        if not (labels := labels_of(node)):
            continue
        value = node.outputs[0]
        clip = next((use.node for use in value.uses() if use.node.name == f"{node.name}/Clip"), None)  # its own range
        value = value if clip is None else clip.outputs[0]
        value.dtype = value.dtype or ir.DataType.INT8
        tapped.graph.outputs.append(value)
        taps.append((labels, scalar(node.inputs[2] if len(node.inputs) > 2 else None, 0.0)))
    return tapped, taps


def check_same_bits(file: ir.Model, rewritten: ir.Model, samples: Inputs) -> None:
    """Run a file and a rewrite of it, without fusions: not one bit may differ. Quantizers may have been dropped, and may stand
    before a reshape that they stood after.

    Raises:
        ParityError: names the first quantizer whose codes differ, or the output.
    """
    (outputs, codes), (others, kept) = (run_labelled(one, samples, optimize=False) for one in (file, rewritten))
    known = {labels: array.ravel() for labels, array in codes}
    pairs = [(first_quantizer(labels), known.get(labels), array.ravel()) for labels, array in kept]
    names = [value.name or "output" for value in file.graph.outputs]
    pairs += zip(names, outputs, others, strict=True)
    for name, expected, array in pairs:
        if expected is None or not np.array_equal(expected, array):
            raise ParityError(
                f"{name}: the file computes other numbers than before it was rewritten for its target. {KEEP_FLOAT}", name
            )
