"""What a TensorRT-RTX plan computes in which precision, read from the file itself.

A plan holds its compiled program as readable text: declarations such as ``tensor={ ... name="x" ... type=int8 }`` and operators
such as ``corrltn={ name="layer1.0.conv1/Conv" ... input={"x" "w" ...} ...``. No driver is needed to read it, unlike for the
engine inspector. The format is undocumented: whatever does not look as expected means "unknown", never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_CONVOLUTIONS = (b"corrltn", b"conv", b"depthwise_conv", b"deconv", b"dgrad")
_MATMULS = (b"fully_connected", b"matmul", b"gemm", b"batch_matmul", b"bmm", b"mmm")
_TENSOR = re.compile(rb'^ *(?:sub_)?tensor=\{[^\n]*?\bname="([^"\n]*)"[^\n]*?\btype=(\w+)', re.M)
_OPERATOR = re.compile(
    rb"^ *(" + b"|".join((*_CONVOLUTIONS, *_MATMULS)) + rb')=\{ name="([^"\n]*)"[^\n]*?\binput=\{([^}\n]*)\}', re.M
)
_NAME = re.compile(rb'"([^"]*)"')


@dataclass(frozen=True)
class PlanLayer:
    """One convolution or matrix product: ``inputs`` are the types of its data and its weight, "int8", "int4", "half",
    "float"."""

    name: str
    kind: str
    inputs: tuple[str, str]

    @property
    def integer(self) -> bool:
        return all(kind.startswith(("int8", "int4")) for kind in self.inputs)


def read_plan(plan: bytes) -> list[PlanLayer] | None:
    """Convolutions and matrix products of a plan, in execution order; None where the format cannot be read."""
    types = {name: kind.decode() for name, kind in _TENSOR.findall(plan)}
    layers = []
    for operator, name, inputs in _OPERATOR.findall(plan):
        operands = [types.get(operand, "unknown") for operand in _NAME.findall(inputs)[:2]]
        if len(operands) < 2 or "unknown" in operands:
            return None
        kind = "convolution" if operator in _CONVOLUTIONS else "matmul"
        layers.append(PlanLayer(name.decode(errors="replace"), kind, (operands[0], operands[1])))
    return layers or None


def count(layers: Iterable[PlanLayer], kind: str) -> dict[str, int]:
    """How many layers of a kind there are, and how many consume integers on both sides."""
    chosen = [layer for layer in layers if layer.kind == kind]
    return {"total": len(chosen), "int8": sum(layer.integer for layer in chosen)}
