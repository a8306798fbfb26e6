"""Labels: how a QuantizeLinear says which calls of which quantizers of the trained model it carries out.

The first call of ``layer.input_qdq`` is labelled with its name, later ones ``layer.input_qdq#1`` and so on; a node that carries
out several has their labels side by side, separated by commas. Names may hold both characters, which are escaped then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import unquote

import onnx_ir as ir

from .graph import QUANTIZER_KEY

_ESCAPED = str.maketrans({character: f"%{ord(character):02X}" for character in "%,#"})


class Call(NamedTuple):
    """A call of a quantizer: its dotted name in the export form, and how many calls of it came before."""

    quantizer: str
    number: int

    def __str__(self) -> str:
        name = escaped(self.quantizer)
        return f"{name}#{self.number}" if self.number else name


def escaped(name: str) -> str:
    """A quantizer's name as a label holds it."""
    return name.translate(_ESCAPED)


def calls_in(labels: str) -> Iterator[Call]:
    """What some labels stand for."""
    for label in filter(None, labels.split(",")):
        name, _, number = label.partition("#")
        yield Call(unquote(name), int(number or 0))


def labels_of(quantize: ir.Node) -> str:
    """The labels of a QuantizeLinear; empty where it has none."""
    return quantize.metadata_props.get(QUANTIZER_KEY, "")


def set_labels(quantize: ir.Node, labels: Iterable[str]) -> None:
    """Give a QuantizeLinear all of some labels."""
    quantize.metadata_props[QUANTIZER_KEY] = ",".join(filter(None, labels))


def first_quantizer(labels: str) -> str:
    """The name of the first quantizer of some labels, for messages."""
    return next(calls_in(labels)).quantizer
