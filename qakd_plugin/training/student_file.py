"""``save`` and ``load``: the weights of a trained student in one file, and what they were trained as."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._common.files import read_whole, write_atomic
from .._common.tensor_file import pack, unpack
from .._common.torch_file import load_plain
from .._common.training_record import TrainingRecord, as_json, from_json, set_training_records, training_records
from ..errors import CheckpointError, NotPreparedError, QakdError
from ..preparation.again import learned_rules, prepare_again
from ..preparation.description import describe
from ..preparation.recorded import recorded
from ..toolkits import adapter_for

FORMAT, VERSION = "qakd student", "1"
T = TypeVar("T")


@dataclass(frozen=True)
class _Student:
    """What a file holds.

    Attributes:
        state: a state_dict.
        grids: by the name of a quantizer: its kind and its codes; None where the file does not say.
        toolkit: that prepared it; None where the file does not say.
        training: how it was trained; nothing where the file does not say.
        preparation: arguments of ``prepare``; None where it did not prepare the model.
        rules: what each learned quantizer computes, by its name.
    """

    state: Mapping[str, Any]
    grids: Mapping[str, str] | None = None
    toolkit: str | None = None
    training: tuple[TrainingRecord, ...] = ()
    preparation: Mapping[str, Any] | None = None
    rules: Mapping[str, Any] = field(default_factory=dict)


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a prepared model, trained or calibrated, to one safetensors file: weights, quantizers and their grids.

    The file holds tensors and plain text, never code, and shows when it is damaged. :func:`load` reads it.

    Args:
        model: prepared by a toolkit.
        path: of the file, ``student.safetensors``; it appears whole or not at all.

    Returns:
        The path.

    Raises:
        NotPreparedError: no toolkit prepared the model.
        QakdError: the file cannot be written.
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
        "training": as_json(training_records(model)),
        "rules": json.dumps({name: rule.as_dict() for name, rule in learned_rules(model).items()}),
        "module_versions": json.dumps(getattr(state, "_metadata", {})),
        "pickled": json.dumps(others),
    }
    if (preparation := recorded(model)) is not None:
        facts["preparation"] = json.dumps(preparation.as_dict())
    return write_atomic(path, pack(tensors, facts))


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The student of a file of :func:`save`: its weights, quantizers and grids, in eval mode.

        student = qakd.load("student.safetensors", torchvision.models.resnet18(num_classes=10))

    Args:
        path: a file of :func:`save` (``qakd distill`` writes one), the ``student.pt`` of earlier versions, or a plain
            ``state_dict``.
        model: the float network, of any weights, where :func:`qakd_plugin.prepare` prepared the student: it is not changed. Or
            a network that is prepared as the student was, which is loaded in place.

    Returns:
        The prepared model, on the device of ``model``.

    Raises:
        QakdError: the file cannot be read, is damaged, does not say how the float network is to be prepared, or does not fit
            the network; says what differs.
    """
    try:
        student = _read(read_whole(path))
    except (CheckpointError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QakdError(
            f"{path}: {reason}. Name a file of qakd_plugin.save, such as qakd distill's student.safetensors."
        ) from error
    try:
        adapter_for(model)
    except NotPreparedError:
        model = _prepared(path, student, model)
    description = describe(model)
    if student.toolkit not in (None, description.toolkit):
        raise QakdError(
            f"{path} does not fit the prepared model: it was trained with {student.toolkit}, and the model is prepared with "
            f"{description.toolkit}. Prepare it with {student.toolkit}, or pass the float model."
        )
    if student.grids:
        _check_grids(path, student.grids, _grids(model))
    try:
        model.load_state_dict(student.state)
    except Exception as error:  # modules fail in many ways on foreign tensors; all mean the same here
        reason = " ".join(str(error).split())[:300]
        raise QakdError(f"{path} does not fit the prepared model: {reason}. Prepare it as for training.") from error
    set_training_records(model, student.training)
    adapter_for(model).set_mode(model, False)
    return model


def _prepared(path: str | os.PathLike[str], student: _Student, network: nn.Module) -> nn.Module:
    if student.preparation is None:
        toolkit = "" if student.toolkit is None else f" ({student.toolkit})"
        raise QakdError(
            f"{path}: model is a float network, and the file does not say how it was prepared{toolkit}: it was not by "
            f"qakd_plugin.prepare. Prepare it as for training, and pass that: qakd_plugin.load({os.fspath(path)!r}, prepared)."
        )
    try:
        return prepare_again(network, student.preparation, student.rules)
    except QakdError as error:
        raise QakdError(f"{path}: {error}") from error


def _grids(model: nn.Module) -> dict[str, str]:
    """What a state_dict does not say of the quantizers that its scales belong to."""
    return {q.name: f"{q.kind}, codes {q.quant_min}..{q.quant_max}" for q in describe(model).quantizers}


def _check_grids(path: str | os.PathLike[str], trained: Mapping[str, str], prepared: Mapping[str, str]) -> None:
    for name in sorted(trained.keys() | prepared.keys()):
        before, now = (grids.get(name, "no quantizer") for grids in (trained, prepared))
        if before != now:
            raise QakdError(
                f"{path} does not fit the prepared model: {name} was trained as {before}, and the model is prepared with "
                f"{now}. Prepare what was trained: the same toolkit, bits, quantizers and target."
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
    versions, grids = _fact(facts, "module_versions", dict), _fact(facts, "quantizers", dict)
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    for name in _fact(facts, "pickled", list):
        if not isinstance(name, str) or name not in tensors or tensors[name].dtype != torch.uint8:
            raise CheckpointError(f"it does not hold {name!r}, which its header names")
        state[name] = load_plain(state[name].numpy().tobytes(), intact=True)
    state._metadata = versions  # type: ignore[attr-defined]  # where torch looks for it
    preparation = _fact(facts, "preparation", dict) if "preparation" in facts else None
    rules = _fact(facts, "rules", dict) if "rules" in facts else {}
    return _Student(state, grids, facts.get("toolkit"), _training(facts), preparation, rules)


def _fact(facts: Mapping[str, str], name: str, kind: type[T]) -> T:
    try:
        found = json.loads(facts[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its header does not say {name}") from error
    if not isinstance(found, kind):
        raise CheckpointError(f"its header says {name} in another form")
    return found


def _training(facts: Mapping[str, str]) -> tuple[TrainingRecord, ...]:
    try:
        return from_json(facts.get("training", "[]"))
    except ValueError as error:
        raise CheckpointError("its header says training in another form") from error


def _by_name(content: object) -> Mapping[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"it holds no state_dict ({type(content).__name__})")
    return content


def _as_bytes(value: object) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
