"""Configurations: YAML files, and flags of the command line over them, as typed dataclasses.

Quantizer, method and numbers are the package's own dataclasses; which of several is meant says its name:
``quantizer: {LSQ: {}}``, ``method: {SQAKD: {temperature: 4.0}}``.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from qakd_plugin import EWGS, KD, LSQ, PACT, QAT, QKD, SQAKD, DoReFa
from qakd_plugin.errors import QakdError
from qakd_plugin.training.config import MakeOptimizer, Settings


@dataclass(frozen=True)
class Data:
    """Which images. ``held_out`` training images pick the best epoch; the test set is looked at once, at the end."""

    name: Literal["cifar10", "cifar100", "tiny_imagenet", "imagenet"]
    batch_size: int
    held_out: int
    root: str = "data"
    image_size: int = 224
    workers: int = 4


@dataclass(frozen=True)
class Teacher:
    """The full-precision network: ``weights``, a file with its state_dict, or so many epochs of SGD and a cosine."""

    weights: str | None = None
    epochs: int = 200
    lr: float = 0.1
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Student:
    """Arguments of ``qakd.prepare``."""

    toolkit: str = "modelopt"
    weight_bits: int = 4
    activation_bits: int = 4
    keep: tuple[str, ...] = ()
    calibration_batches: int = 8


@dataclass(frozen=True)
class SGD:
    momentum: float = 0.9
    nesterov: bool = True

    @property
    def make(self) -> MakeOptimizer:
        return partial(torch.optim.SGD, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class Adam:
    """With weight decay as a part of the gradient (not AdamW), as in the SQAKD paper's code."""

    @property
    def make(self) -> MakeOptimizer:
        return torch.optim.Adam


@dataclass(frozen=True)
class Schedule:
    """Warm-up in steps of the optimizer (None: ``settings.warmup``, a share of all steps), then half a cosine down to 0."""

    epochs: int
    warmup_iterations: int | None = None


@dataclass(frozen=True)
class Config:
    """One run. ``published``: the paper's top-1 accuracies in percent, by "W4A4 LSQ SQAKD" or "FP"; only printed."""

    network: str
    data: Data
    student: Student
    quantizer: LSQ | PACT | DoReFa | EWGS
    method: SQAKD | QKD | KD | QAT
    optimizer: SGD | Adam
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)
    teacher: Teacher = field(default_factory=Teacher)
    seed: int = 0
    published: dict[str, float] = field(default_factory=dict)


def read_config(path: Path, flags: Sequence[str] = ()) -> Config:
    """Read a YAML file; flags such as ``--student.weight_bits 3`` or ``--quantizer '{PACT: {}}'`` replace what it says.

    Raises:
        QakdError: the file cannot be read, a key is unknown or missing, or a value has the wrong type; names the key.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise QakdError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise QakdError(f"{path}: expected sections and values, got {values!r}.")
    for flag, text in _pairs(flags):
        *sections, key = flag.removeprefix("--").split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise QakdError(f"{flag}: {section!r} holds a value, no section, in {path}.")
        place[key] = yaml.safe_load(text)
    return build(Config, values, path.name)


def build(kind: Any, value: Any, where: str) -> Any:
    """``value``, which came out of YAML, as ``kind``: a dataclass, one of several, or a plain type.

    Raises:
        QakdError: it is not; ``where`` says which key.
    """
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(get_args(kind), value, where)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise QakdError(f"{where}: {value!r} is unknown: use one of {list(get_args(kind))}.")
        return value
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(build(get_args(kind)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {build(str, key, where): build(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    hint = " YAML reads 1e-4 as text: write 1.0e-4." if kind is float and isinstance(value, str) else ""
    raise QakdError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r} ({type(value).__name__}).{hint}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    known = {entry.name: entry for entry in fields(kind) if entry.init}
    if not isinstance(value, dict):
        raise QakdError(f"{where}: expected a section with {sorted(known)}, got {value!r}.")
    for key in value:
        if key not in known:
            raise QakdError(f"{where}: unknown key {key!r}; {kind.__name__} has {sorted(known)}.")
    for name, entry in known.items():
        if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
            raise QakdError(f"{where}: {name!r} is missing.")
    return kind(**{key: build(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _one_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    named = {kind.__name__: kind for kind in kinds if is_dataclass(kind)}
    if not named:
        (kind,) = (kind for kind in kinds if kind is not type(None))
        return build(kind, value, where)
    if not (isinstance(value, dict) and len(value) == 1 and next(iter(value)) in named):
        raise QakdError(
            f"{where}: expected one of {sorted(named)} with its numbers, e.g. {{{min(named)}: {{}}}}, got {value!r}."
        )
    ((name, numbers),) = value.items()
    return build(named[name], numbers, f"{where}.{name}")


def _pairs(flags: Sequence[str]) -> list[tuple[str, str]]:
    if len(flags) % 2 or any(not flag.startswith("--") for flag in flags[::2]):
        raise QakdError(f"flags come in pairs, --section.key VALUE; got {' '.join(flags)!r}.")
    return list(zip(flags[::2], flags[1::2], strict=True))
