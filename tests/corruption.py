"""Seeded damage to files, and a child process that reads what may bring a native parser down."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

Damage = Callable[[bytes, random.Random], bytes]


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def emptied(data: bytes, chance: random.Random) -> bytes:
    return b""


def bits_flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 30))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def bits_flipped_in_front(data: bytes, chance: random.Random) -> bytes:
    """Where formats keep their headers."""
    changed = bytearray(data)
    changed[chance.randrange(min(64, len(data)))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def bytes_replaced(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    size = min(chance.choice((1, 8, 200)), len(data) - start)
    return data[:start] + chance.randbytes(size) + data[start + size :]


def lengths_made_huge(data: bytes, chance: random.Random) -> bytes:
    """Runs of set bits: in protobuf, lengths and sizes of up to 2^63."""
    start = chance.randrange(len(data))
    return data[:start] + b"\xff" * chance.choice((3, 5, 8)) + b"\x7f" + data[start:]


def parts_swapped(data: bytes, chance: random.Random) -> bytes:
    a, b, c = sorted(chance.randrange(len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def part_repeated(data: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:b] + data[a:b] + data[b:]


BYTES: tuple[Damage, ...] = (
    truncated, emptied, bits_flipped, bits_flipped, bits_flipped_in_front, bytes_replaced, lengths_made_huge, parts_swapped,
    part_repeated,
)  # fmt: skip

_NUMBERS = (0, -1, 1, 3, 7, 255, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63))


def field_changed(data: bytes, chance: random.Random) -> bytes:
    """A file that parses, with one field of one node, weight or input that makes no sense."""
    model = onnx.ModelProto.FromString(data)
    graph = model.graph
    node, tensor, value = chance.choice(graph.node), chance.choice(graph.initializer), chance.choice(graph.input)
    change = chance.randrange(15)
    if change == 0 and node.attribute:
        attribute = chance.choice(node.attribute)
        attribute.i = chance.choice(_NUMBERS)
        for index in range(len(attribute.ints)):
            attribute.ints[index] = chance.choice((attribute.ints[index], chance.choice(_NUMBERS)))
    elif change == 1 and node.attribute:
        attribute = chance.choice(node.attribute)
        attribute.ints.extend([chance.choice(_NUMBERS)] * chance.choice((1, 100)))
    elif change == 2 and node.attribute:
        chance.choice(node.attribute).type = chance.randrange(15)
    elif change == 3 and node.attribute:
        del node.attribute[chance.randrange(len(node.attribute))]
    elif change == 4:
        node.input[chance.randrange(len(node.input))] = chance.choice(("", "none", node.output[0], tensor.name, value.name))
    elif change == 5:
        del node.input[chance.randrange(len(node.input)) :]
    elif change == 6:
        node.op_type = chance.choice(("Gemm", "Loop", "If", "MaxPool", "Reshape", "Concat", "GridSample", "Einsum", "TopK", ""))
    elif change == 7:
        node.output[0] = chance.choice((value.name, tensor.name, chance.choice(graph.node).output[0]))
    elif change == 8:
        tensor.data_type = chance.randrange(30)
    elif change == 9:
        tensor.dims[:] = chance.choice(([], [0], [-1], [2**31, 2**31, 4], [*tensor.dims, 1], [*tensor.dims, 2], [2**62]))
    elif change == 10:
        tensor.raw_data = chance.choice((b"", tensor.raw_data[:-1], tensor.raw_data * 2, b"\xff" * len(tensor.raw_data)))
    elif change == 11:
        kind = value.type.tensor_type
        kind.shape.dim[chance.randrange(len(kind.shape.dim))].dim_value = chance.choice(_NUMBERS)
    elif change == 12:
        value.type.tensor_type.elem_type = chance.randrange(30)
    elif change == 13:
        model.opset_import[0].version = chance.choice(_NUMBERS)
    else:
        first, second = (chance.randrange(len(graph.node)) for _ in range(2))
        copied = onnx.NodeProto.FromString(graph.node[first].SerializeToString())
        graph.node[first].CopyFrom(graph.node[second])
        graph.node[second].CopyFrom(copied)
    return bytes(model.SerializeToString())


ONNX: tuple[Damage, ...] = (*BYTES, *[field_changed] * 9)

_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "<script>", "\ud800", [], {}, [[]],
    {"": {}}, ["SM86"],
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON document with every key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def value_replaced(data: bytes, chance: random.Random) -> bytes:
    document = json.loads(data)
    container, key = chance.choice(_places(document))
    container[key] = chance.choice(_STRANGE)
    return json.dumps(document).encode()


def values_swapped(data: bytes, chance: random.Random) -> bytes:
    document = json.loads(data)
    container = chance.choice([container for container, _ in _places(document) if len(container) > 1])
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    a, b = chance.sample(keys, 2)
    container[a], container[b] = container[b], container[a]
    return json.dumps(document).encode()


def value_removed(data: bytes, chance: random.Random) -> bytes:
    document = json.loads(data)
    container, key = chance.choice(_places(document))
    del container[key]
    return json.dumps(document).encode()


def nested_deeply(data: bytes, chance: random.Random) -> bytes:
    depth = chance.choice((500, 5_000, 200_000))
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
    nest = (opening * depth + "1" + closing * depth).encode()
    return chance.choice((nest, data.rstrip()[:-1] + b', "deep": ' + nest + b"}"))


JSON: tuple[Damage, ...] = (
    *BYTES,
    value_replaced,
    value_replaced,
    values_swapped,
    values_swapped,
    value_removed,
    nested_deeply,
)


class Reader:
    """Calls ``read(path)`` in one child process, which is started anew when it dies.

    Args:
        read: returns None, or raises; importable.
        limit: seconds that a call may take before the child is ended.
    """

    def __init__(self, read: Callable[[Path], None], limit: float) -> None:
        self._read, self._limit = read, limit
        self._process: Any = None

    def __call__(self, path: Path) -> tuple[str, str]:
        """Name of the exception's class and its message; "" where nothing was raised, "crash" or "hang" of the child."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, self._read), daemon=True)
            self._process.start()
            other.close()
            self._pipe.recv()  # the child is ready: its imports do not count
        started = time.monotonic()
        self._pipe.send(path)
        try:
            answer: tuple[str, str] = self._pipe.recv() if self._pipe.poll(self._limit) else ("hang", f"{self._limit} s")
        except EOFError:
            self._process.join()
            answer = ("crash", f"exit code {self._process.exitcode} after {time.monotonic() - started:.1f} s")
        if answer[0] in ("hang", "crash"):
            self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(pipe: Any, read: Callable[[Path], None]) -> None:
    pipe.send("ready")
    while True:
        path = pipe.recv()
        try:
            read(path)
            answer = ("", "")
        except Exception as error:  # what it is, is the parent's business  # noqa: BLE001
            answer = (" ".join(base.__name__ for base in type(error).__mro__), str(error))
        pipe.send(answer)
