"""Configurations: YAML files, and flags of the command line over them, as typed dataclasses.

Quantizer, method and numbers are the package's own dataclasses; which of several is meant says its name:
``quantizer: LSQ``, ``method: {class_path: SQAKD, init_args: {temperature: 4.0}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import get_loader

from qakd_plugin import EWGS, KD, LSQ, PACT, QAT, QKD, SQAKD, DoReFa
from qakd_plugin.cli.yaml_objects import Builder, load_yaml
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
    """Read a YAML file; flags such as ``--student.weight_bits 3`` or ``--quantizer PACT`` replace what it says.

    Raises:
        QakdError: the file cannot be read, a key is unknown or missing, or a value has the wrong type; names the key.
    """
    values = load_yaml(path)
    if len(flags) % 2 or any(not flag.startswith("--") for flag in flags[::2]):
        raise QakdError(f"flags come in pairs, --section.key VALUE; got {' '.join(flags)!r}.")
    for flag, text in zip(flags[::2], flags[1::2], strict=True):
        *sections, key = flag.removeprefix("--").split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise QakdError(f"{flag}: {section!r} holds a value, no section, in {path}.")
        place[key] = get_loader("yaml")(text)
    config: Config = Builder().build(values, Config, path.name)
    return config
