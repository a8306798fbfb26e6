"""What single layers output: how a difference that no quantizer shows is traced to its layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
from torch import Tensor, nn

from ...export_form.modules import ActivationQDQ, StoredWeight
from ...tasks.inputs import Inputs
from ..canonical.graph import activation_quantizers, copied
from .onnxruntime import run
from .report import Array, as_array, as_float32

LayerOutputs = dict[str, Array]
"""What layers output, by name."""


def float_tail_layers(file: ir.Model, form: nn.Module) -> list[str]:
    """Names of the export form's innermost modules that the file computes after its last quantizers."""
    quantized: set[ir.Node] = set()
    waiting = list(activation_quantizers(file.graph))
    while waiting:
        node = waiting.pop()
        if node not in quantized:
            quantized.add(node)
            waiting += [source for value in node.inputs if value is not None and (source := value.producer()) is not None]
    modules = dict(form.named_modules())
    found = dict.fromkeys(_layer_name(node) for node in file.graph if node not in quantized)
    names = [name for name in found if name in modules and not isinstance(modules[name], ActivationQDQ | StoredWeight)]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


@contextmanager
def recorded_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[LayerOutputs]:
    """Within the block, remember what named layers output at their last call, in the order of these calls."""
    outputs: LayerOutputs = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.pop(name, None)
            outputs[name] = as_float32(as_array(output))

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: record(name, output))
        for name in names
        if name in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def run_layers(file: ir.Model, samples: Inputs, names: Sequence[str]) -> LayerOutputs:
    """What the file computes at the end of each named layer, without fusions."""
    tapped = copied(file)
    last = {_layer_name(node): node.outputs[0] for node in tapped.graph if _layer_name(node) in names}
    if not last:
        return {}
    for value in last.values():
        if not value.is_graph_output():
            value.dtype = value.dtype or ir.DataType.FLOAT
            tapped.graph.outputs.append(value)
    found = run(tapped, samples, fusions=False, names=[value.name or "" for value in last.values()])
    return dict(zip(last, found, strict=True))


def _layer_name(node: ir.Node) -> str:
    return (node.name or "").partition("/")[0]
