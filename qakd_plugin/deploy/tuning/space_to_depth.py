"""A convolution of few channels with a stride of two, as one of four times the channels without a stride. The same integers.

ONNX Runtime copies what each output reads into a row of a matrix, pixel after pixel, and where a pixel has three channels that
copy takes longer than the product. Blocks of two by two pixels become the channels of one, and each output reads fewer and
longer pieces:

    Q -> DQ -> Conv(k x k, stride 2)
becomes
    Q -> SpaceToDepth(2) -> DQ -> Conv(ceil((k + 1) / 2), stride 1)

with the same weights in other places, and zeros beside them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..canonical.graph import (
    constant,
    copied,
    dequantizer_before,
    initializer,
    is_stored,
    kernel_shape,
    only_consumer,
    producer,
)
from ..canonical.graph import stored_codes as codes_of

_MOST_CHANNELS = 4


class _Places(NamedTuple):
    """Along one dimension: in which block the weights of a kernel lie, at which pixel of it, and how the blocks are padded."""

    blocks: list[int]
    pixels: list[int]
    pads: tuple[int, int]


def blockable_layers(model: ir.Model) -> tuple[str, ...]:
    """Names of the convolutions that can be rewritten: ungrouped, of few channels, of codes that nobody else reads."""
    return tuple(node.name or "" for node in model.graph if node.name and node.op_type == "Conv" and _places(node) is not None)


def in_blocks(model: ir.Model, layers: Collection[str]) -> ir.Model:
    """A copy in which some convolutions read blocks of pixels."""
    model = copied(model)
    graph = model.graph
    for conv in [node for node in graph if node.name in layers]:
        places = _places(conv)
        source, weight = producer(conv.inputs[0], "DequantizeLinear"), producer(conv.inputs[1], "DequantizeLinear")
        assert places is not None
        assert source is not None
        assert weight is not None
        blocked = ir.node("SpaceToDepth", [source.inputs[0]], {"blocksize": 2}, name=f"{conv.name}/SpaceToDepth")
        blocked.outputs[0].name, blocked.outputs[0].dtype = f"{blocked.name}:out", ir.DataType.UINT8
        graph.insert_before(source, blocked)
        source.replace_input_with(0, blocked.outputs[0])
        source.outputs[0].shape = None
        codes = _moved(codes_of(weight), *places)
        weight.replace_input_with(0, initializer(graph, f"{conv.name}/blocks", codes))
        weight.outputs[0].shape = None
        conv.attributes.add(ir.AttrInt64s("kernel_shape", codes.shape[2:]))
        conv.attributes.add(ir.AttrInt64s("strides", [1, 1]))
        conv.attributes.add(ir.AttrInt64s("pads", [*(place.pads[0] for place in places), *(place.pads[1] for place in places)]))
    common.RemoveUnusedNodesPass()(model)
    return model


def _moved(codes: np.ndarray, rows: _Places, columns: _Places) -> np.ndarray:
    out, channels = codes.shape[:2]
    sizes = [max(place.blocks) - min(place.blocks) + 1 for place in (rows, columns)]
    moved = np.zeros((out, 4 * channels, *sizes), dtype=codes.dtype)
    for row, (block, pixel) in enumerate(zip(rows.blocks, rows.pixels, strict=True)):
        for column, (other, beside) in enumerate(zip(columns.blocks, columns.pixels, strict=True)):
            first = (2 * pixel + beside) * channels
            place = (block - min(rows.blocks), other - min(columns.blocks))
            moved[:, first : first + channels, place[0], place[1]] = codes[:, :, row, column]
    return moved


def _places(conv: ir.Node) -> tuple[_Places, _Places] | None:
    """Of both dimensions; None where a convolution cannot be rewritten."""
    source, weight = producer(conv.inputs[0], "DequantizeLinear"), producer(conv.inputs[1], "DequantizeLinear")
    shape = None if source is None else _shape(source.inputs[0])
    if (
        source is None
        or source is not dequantizer_before(conv.inputs[0])
        or weight is None
        or not is_stored(weight)
        or shape is None
        or len(shape) != 4
        or only_consumer(source.outputs[0]) is not conv
        or only_consumer(weight.outputs[0]) is not conv
        or len(source.inputs) < 3
        or (zero := constant(source.inputs[2])) is None
        or zero.dtype != np.uint8
        or conv.attributes.get_int("group", 1) != 1
        or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        or list(conv.attributes.get_ints("strides", [])) != [2, 2]
        or set(conv.attributes.get_ints("dilations", [1])) != {1}
        or codes_of(weight).shape[1] > _MOST_CHANNELS
    ):
        return None
    pads = list(conv.attributes.get_ints("pads", [0, 0, 0, 0]))
    found = [
        _along(size, kernel, pads[axis], pads[axis + 2])
        for axis, (size, kernel) in enumerate(zip(list(shape)[2:], kernel_shape(conv), strict=True))
    ]
    rows, columns = found
    return None if rows is None or columns is None else (rows, columns)


def _shape(codes: ir.Value | None) -> ir.Shape | None:
    """Of codes, or else of what they are made of: files say it of their inputs."""
    quantize = producer(codes, "QuantizeLinear")
    if codes is None or codes.shape is not None or quantize is None or quantize.inputs[0] is None:
        return None if codes is None else codes.shape
    return quantize.inputs[0].shape


def _along(size: object, kernel: int, before: int, after: int) -> _Places | None:
    """None where the size is not known or odd, and where a kernel has nothing to gain."""
    if not isinstance(size, int) or size % 2 or kernel < 2:
        return None
    blocks, pixels = ([divmod(index - before, 2)[part] for index in range(kernel)] for part in (0, 1))
    outputs = (size + before + after - kernel) // 2 + 1
    pads = -min(blocks), outputs - size // 2 + max(blocks)
    return _Places(blocks, pixels, pads) if min(pads) >= 0 else None
