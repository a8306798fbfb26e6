"""``student.safetensors``: the weights of a trained student, and what they were trained as."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._common.files import read_whole, write_atomic
from .._common.tensor_file import pack, unpack
from .._common.torch_file import load_plain
from ..errors import CheckpointError, QakdError
from ..preparation.description import describe

FORMAT, VERSION = "qakd student", "1"
T = TypeVar("T")


@dataclass(frozen=True)
class _Student:
    """What a file holds.

    Attributes:
        state: a state_dict.
        grids: by the name of a quantizer: its kind and its codes; None where the file does not say.
        toolkit: that prepared it; None where the file does not say.
    """

    state: Mapping[str, Any]
    grids: Mapping[str, str] | None = None
    toolkit: str | None = None


def write_student(model: nn.Module, path: Path) -> Path:
    """Write the weights of a trained model, with the facts that a ``state_dict`` does not hold.

    Args:
        model: prepared by a toolkit.
        path: of the safetensors file; it appears whole or not at all.
    """
    state = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    others = [name for name in state if name not in tensors]  # a module's own extra state
    tensors |= {name: _as_bytes(state[name]) for name in others}
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "model": type(model).__name__,
        "toolkit": describe(model).toolkit,
        "quantizers": json.dumps(_grids(model)),
        "module_versions": json.dumps(getattr(state, "_metadata", {})),
        "pickled": json.dumps(others),
    }
    return write_atomic(path, pack(tensors, facts))


def load_student(model: nn.Module, path: Path) -> None:
    """Load the weights of a file into a prepared model.

    Args:
        model: prepared as it was when it was trained.
        path: a file of :func:`write_student`, the ``student.pt`` of earlier versions, or a plain ``state_dict``.

    Raises:
        QakdError: the file cannot be read, is damaged, or does not fit the model; says what differs.
    """
    try:
        student = _read(read_whole(path))
    except (CheckpointError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QakdError(f"--weights: {path}: {reason}. Name the student.safetensors of qakd distill.") from error
    description = describe(model)
    if student.toolkit not in (None, description.toolkit):
        raise QakdError(
            f"--weights: {path} does not fit the prepared model: it was trained with {student.toolkit}, and the recipe "
            f"prepares with {description.toolkit}."
        )
    if student.grids:
        _check_grids(path, student.grids, _grids(model))
    try:
        model.load_state_dict(student.state)
    except Exception as error:  # modules fail in many ways on foreign tensors; all mean the same here
        reason = " ".join(str(error).split())[:300]
        raise QakdError(f"--weights: {path} does not fit the prepared model: {reason}") from error


def _grids(model: nn.Module) -> dict[str, str]:
    """What a state_dict does not say of the quantizers that its scales belong to."""
    return {q.name: f"{q.kind}, codes {q.quant_min}..{q.quant_max}" for q in describe(model).quantizers}


def _check_grids(path: Path, trained: Mapping[str, str], prepared: Mapping[str, str]) -> None:
    for name in sorted(trained.keys() | prepared.keys()):
        before, now = (grids.get(name, "no quantizer") for grids in (trained, prepared))
        if before != now:
            raise QakdError(
                f"--weights: {path} does not fit the prepared model: {name} was trained as {before}, and the recipe prepares "
                f"{now}. Let the recipe prepare what was trained: the same toolkit, bits, quantizers and target."
            )


def _read(data: bytes) -> _Student:
    if data[8:9] == b"{":  # after the eight bytes that say how long the header is
        return _from_tensors(*unpack(data))
    content = load_plain(data)
    if isinstance(content, dict) and content.keys() == {"state_dict", "quantizers"}:  # student.pt; else somebody's own
        return _Student(_by_name(content["state_dict"]), _by_name(content["quantizers"]))
    return _Student(_by_name(content))


def _from_tensors(tensors: dict[str, Tensor], facts: dict[str, str]) -> _Student:
    if not facts:
        return _Student(tensors)
    if (facts.get("format"), facts.get("version")) != (FORMAT, VERSION):
        written = f"{facts.get('format')}, version {facts.get('version')}"
        raise CheckpointError(f"it is a file of another kind ({written}; {FORMAT}, version {VERSION} is read)")
    versions, grids = _facts(facts, "module_versions", dict), _facts(facts, "quantizers", dict)
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    for name in _facts(facts, "pickled", list):
        if not isinstance(name, str) or name not in tensors or tensors[name].dtype != torch.uint8:
            raise CheckpointError(f"it does not hold {name!r}, which its header names")
        state[name] = load_plain(state[name].numpy().tobytes(), intact=True)
    state._metadata = versions  # type: ignore[attr-defined]  # where torch looks for it
    return _Student(state, grids, facts.get("toolkit"))


def _facts(facts: Mapping[str, str], name: str, kind: type[T]) -> T:
    try:
        found = json.loads(facts[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its header does not say {name}") from error
    if not isinstance(found, kind):
        raise CheckpointError(f"its header says {name} in another form")
    return found


def _by_name(content: object) -> Mapping[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"it holds no state_dict ({type(content).__name__})")
    return content


def _as_bytes(value: object) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
