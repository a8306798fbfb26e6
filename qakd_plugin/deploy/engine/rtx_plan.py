"""What a TensorRT-RTX plan computes in which precision, read from the file itself.

A plan holds its compiled program as readable text: declarations such as ``tensor={ ... name="x" ... type=int8 }`` and
operators such as ``corrltn={ name="layer1.0.conv1/Conv" ... input={"x" "w" ...} ... layers="[ONNX Layer: ...]"``. No driver
is needed to read it, unlike for the engine inspector. The format is undocumented: whatever does not look as expected means
"unknown", never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["convolution", "matmul"]

_CONVOLUTIONS = (b"corrltn", b"conv", b"depthwise_conv", b"deconv", b"dgrad")
_MATMULS = (b"fully_connected", b"matmul", b"gemm", b"batch_matmul", b"bmm", b"mmm")
_TENSOR = re.compile(rb'^ *(?:sub_)?tensor=\{([^\n]*?)\bname="([^"\n]*)"[^\n]*?\btype=(\w+)', re.M)
_LIST = rb'=\{((?:"[^"\n]*"|[^"}\n])*)\}'  # names may hold braces themselves
# The list of ONNX layers is separated by control characters, and may hold line ends.
_OPERATOR = re.compile(
    rb"^ *(" + b"|".join((*_CONVOLUTIONS, *_MATMULS)) + rb')=\{ name="([^"\n]*)"[^\n]*?\binput' + _LIST +
    rb'(?:[^\n]*?\blayers="([^"]*)")?',
    re.M,
)  # fmt: skip
_STEP = re.compile(rb"^ *\w+=\{ name=[^\n]*", re.M)
_PROGRAM = re.compile(rb"^ *inputs" + _LIST, re.M)
_INPUTS = re.compile(rb"\binput(?:_args)?" + _LIST)
_OUTPUTS = re.compile(rb"\boutput(?:_args)?" + _LIST)
_NAME = re.compile(rb'"([^"]*)"')
_PAYLOAD = re.compile(rb"\bconst_payload_size=(\d+)")
_ONNX_LAYER = re.compile(rb"\[ONNX Layer: ([^\x1e\x1f\n]*)\]")
_DECLARATION = re.compile(rb"=\{ ")
_MARGIN = 1 << 16
_SIZES = ("int64", "int32", "bool")
"""Types of what steers a program: dynamic sizes and conditions."""


@dataclass(frozen=True)
class PlanLayer:
    """One convolution or matrix product.

    Attributes:
        name: its name in the plan.
        kind: "convolution" or "matmul".
        inputs: types of its data and its weight as it consumes them: "int8", "half", "float", ...; "unknown" for a layer
            that the plan does not show.
        onnx_layers: names of the ONNX nodes it was made from.
        stored: type in which the plan stores its weight: "int4", "int8", "half", ...; 4-bit codes are cast to 8 bits, or
            multiplied with their scales, on their way to the layer. None where the second operand is an activation, or what
            it comes from is not shown.
    """

    name: str
    kind: Kind
    inputs: tuple[str, str]
    onnx_layers: tuple[str, ...] = ()
    stored: str | None = None

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
    plan = _program(plan)
    declared = _TENSOR.findall(plan)
    types = {name: kind.decode() for _, name, kind in declared}
    constants = {
        name: (int(size[1]), kind.decode()) for fields, name, kind in declared if (size := _PAYLOAD.search(fields)) is not None
    }
    sources = _sources(plan)
    layers = []
    for operator, name, inputs, onnx_layers in _OPERATOR.findall(plan):
        operands = _NAME.findall(inputs)[:2]
        kinds = [types.get(operand, "unknown") for operand in operands]
        if len(kinds) < 2 or "unknown" in kinds:
            return None
        kind: Kind = "convolution" if operator in _CONVOLUTIONS else "matmul"
        made_from = tuple(_text(layer) for layer in _ONNX_LAYER.findall(onnx_layers))
        stored = _stored(operands[1], sources, constants, types)
        layers.append(PlanLayer(_text(name), kind, (kinds[0], kinds[1]), made_from, stored))
    if not layers:
        return None
    return PlanContents(tuple(layers), sum(kind == "int4" for _, kind in constants.values()))


def count(layers: Iterable[PlanLayer], kind: Kind) -> dict[str, int]:
    """How many layers of a kind there are, and how many consume integers on both sides."""
    chosen = [layer for layer in layers if layer.kind == kind]
    return {"total": len(chosen), "int8": sum(layer.integer for layer in chosen)}


def _program(plan: bytes) -> bytes:
    """What surrounds declarations: most of a plan are weights, and searching those for whole lines takes seconds."""
    view, parts, begin, end = memoryview(plan), [], 0, 0
    for match in _DECLARATION.finditer(plan):
        if match.start() - _MARGIN > end:
            parts.append(bytes(view[begin:end]))
            begin = match.start() - _MARGIN
        end = match.end() + _MARGIN
    return b"\n".join([*parts, bytes(view[begin:end])])


def _sources(plan: bytes) -> dict[bytes, list[bytes]]:
    """Names of what each value is made from."""
    sources: dict[bytes, list[bytes]] = {}
    fused = []
    for step in _STEP.findall(plan):
        inputs, outputs = _INPUTS.search(step), _OUTPUTS.search(step)
        if inputs is None or outputs is None:
            continue
        given = _NAME.findall(inputs[1])
        if step.lstrip().startswith(b"runtime_fusion="):
            fused.append(given)
        for output in _NAME.findall(outputs[1]):
            sources.setdefault(output, []).extend(given)
    # A fused product is a program of its own, in the order of the calls, which may rename what it is given.
    programs = [_NAME.findall(names) for names in _PROGRAM.findall(plan)[1:]]
    if len(programs) == len(fused):
        for given, taken in zip(fused, programs, strict=True):
            for outer, inner in zip(given, taken, strict=False):
                if outer != inner:
                    sources.setdefault(inner, []).append(outer)
    return sources


def _stored(
    operand: bytes,
    sources: Mapping[bytes, list[bytes]],
    constants: Mapping[bytes, tuple[int, str]],
    types: Mapping[bytes, str],
) -> str | None:
    """Type of the largest constant that an operand is made from, if it is made from constants alone."""
    found: list[tuple[int, str]] = []
    seen, todo = set[bytes](), [operand]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in constants:
            found.append(constants[name])
        elif name in sources:
            todo += sources[name]
        elif types.get(name) not in _SIZES:
            return None
    return max(found)[1] if found else None


def _text(name: bytes) -> str:
    return name.decode(errors="replace")
