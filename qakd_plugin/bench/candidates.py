"""What is measured: files and modules, and what a report calls them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES, MODULE_RUNTIMES
from .file_facts import quantized_bits, record_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Candidate:
    """What to measure, and what a report should call it.

    Attributes:
        path: ONNX file, engine, or OpenVINO's own .xml with its .bin; or a float ``torch.nn.Module``, a yardstick for "torch"
            and "torch.compile".
        method: what the row is called: "FP32", "PTQ", "QAT", "SQAKD". Reports take what it was trained by from the file itself.
        model: name of the network. Rows are compared with rows of the same model.
        toolkit: that prepared it.
        weight_bits: 32 for float.
        activation_bits: 32 for float.
        runtime: only measured there; None: in all runtimes asked for.
    """

    path: str | os.PathLike[str] | nn.Module
    method: str = ""
    model: str = ""
    toolkit: str | None = None
    weight_bits: int = 32
    activation_bits: int = 32
    runtime: str | None = None

    @property
    def file(self) -> Path | None:
        """The file; None for a torch module."""
        return None if _is_module(self.path) else Path(self.path)  # type: ignore[arg-type]

    @property
    def existing(self) -> Path:
        """The file of what is known to be one."""
        assert self.file is not None
        return self.file

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.method or type(self.path).__name__}" if self.file is None else self.file.name

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Those that can take it."""
        if self.file is None:
            return MODULE_RUNTIMES
        return {".engine": ("tensorrt",), ".xml": ("openvino",)}.get(self.file.suffix, FILE_RUNTIMES)


def candidate_from_path(model: str | os.PathLike[str] | nn.Module) -> Candidate:
    """A candidate of what was given without one: its file's name stands for the method, and the model has no name.

    Toolkit and bits are those that the file's record says, where it has one and is quantized. Else its bits are those that its
    graph shows (:func:`.file_facts.quantized_bits`): W8A8 wherever activations are quantized.
    """
    if _is_module(model):
        return Candidate(model, method="FP32")
    if not isinstance(model, str | os.PathLike):
        raise QakdError(f"models: expected paths of files and torch modules, got {type(model).__name__}.")
    path = Path(model)
    if not path.is_file():
        return Candidate(path, method=path.stem)
    bits, record = quantized_bits(path), record_of(path)
    if record is None or bits == (32, 32):
        return Candidate(path, path.stem, weight_bits=bits[0], activation_bits=bits[1])
    return Candidate(path, path.stem, "", record.toolkit, record.weight_bits, record.activation_bits)


def _is_module(model: Any) -> bool:
    """Whether it is a torch module; torch has been imported by whoever made one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)
