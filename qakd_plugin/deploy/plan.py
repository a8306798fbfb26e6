"""What a TensorRT-RTX plan computes in which precision, read from the file itself.

A plan holds its compiled program as readable text: declarations such as ``tensor={ ... name="x" ... type=int8 }`` and
operators such as ``corrltn={ name="layer1.0.conv1/Conv" ... input={"x" "w" ...} ... layers="[ONNX Layer: ...]"``. No driver
is needed to read it, unlike for the engine inspector. The format is undocumented: whatever does not look as expected means
"unknown", never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["convolution", "matmul"]

_CONVOLUTIONS = (b"corrltn", b"conv", b"depthwise_conv", b"deconv", b"dgrad")
_MATMULS = (b"fully_connected", b"matmul", b"gemm", b"batch_matmul", b"bmm", b"mmm")
_TENSOR = re.compile(rb'^ *(?:sub_)?tensor=\{([^\n]*?)\bname="([^"\n]*)"[^\n]*?\btype=(\w+)', re.M)
# The list of ONNX layers is separated by control characters, and may hold line ends.
_OPERATOR = re.compile(
    rb"^ *(" + b"|".join((*_CONVOLUTIONS, *_MATMULS)) + rb')=\{ name="([^"\n]*)"[^\n]*?\binput=\{([^}\n]*)\}'
    rb'(?:[^\n]*?\blayers="([^"]*)")?',
    re.M,
)
_NAME = re.compile(rb'"([^"]*)"')
_ONNX_LAYER = re.compile(rb"\[ONNX Layer: ([^\x1e\x1f\n]*)\]")


@dataclass(frozen=True)
class PlanLayer:
    """One convolution or matrix product.

    Attributes:
        name: its name in the plan.
        kind: "convolution" or "matmul".
        inputs: types of its data and its weight as it consumes them: "int8", "half", "float", ...; "unknown" for a layer
            that the plan does not show.
        onnx_layers: names of the ONNX nodes it was made from.
    """

    name: str
    kind: Kind
    inputs: tuple[str, str]
    onnx_layers: tuple[str, ...] = ()

    @property
    def integer(self) -> bool:
        return all(kind.startswith(("int8", "int4")) for kind in self.inputs)


@dataclass(frozen=True)
class PlanContents:
    """What could be read.

    Attributes:
        layers: convolutions and matrix products, in the order of the plan.
        int4_weights: number of constants that the plan stores in 4 bits.
    """

    layers: tuple[PlanLayer, ...]
    int4_weights: int


def read_plan(plan: bytes) -> PlanContents | None:
    """Convolutions and matrix products of a plan; None where the format cannot be read."""
    declared = _TENSOR.findall(plan)
    types = {name: kind.decode() for _, name, kind in declared}
    layers = []
    for operator, name, inputs, sources in _OPERATOR.findall(plan):
        operands = [types.get(operand, "unknown") for operand in _NAME.findall(inputs)[:2]]
        if len(operands) < 2 or "unknown" in operands:
            return None
        kind: Kind = "convolution" if operator in _CONVOLUTIONS else "matmul"
        made_from = tuple(_text(source) for source in _ONNX_LAYER.findall(sources))
        layers.append(PlanLayer(_text(name), kind, (operands[0], operands[1]), made_from))
    if not layers:
        return None
    constants = {name for fields, name, kind in declared if kind == b"int4" and b"const_payload_size=" in fields}
    return PlanContents(tuple(layers), len(constants))


def count(layers: Iterable[PlanLayer], kind: Kind) -> dict[str, int]:
    """How many layers of a kind there are, and how many consume integers on both sides."""
    chosen = [layer for layer in layers if layer.kind == kind]
    return {"total": len(chosen), "int8": sum(layer.integer for layer in chosen)}


def _text(name: bytes) -> str:
    return name.decode(errors="replace")
