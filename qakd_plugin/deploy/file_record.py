"""What a file says of itself: who prepared it, how it was trained, and what was proven when it was written. Needs no torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from .._common.training_record import TrainingRecord, as_json, from_json, method_of

_log = logging.getLogger(__name__)

PREFIX = "qakd."
"""Of the keys of all metadata that this package writes."""

UNTRAINED = "no training recorded"
"""In the place of a method: calibrated only, as far as is known."""

_LARGEST = 1 << 20
"""Characters of one entry: a history takes some ten thousand."""

_Many = Annotated[int, Ge(0), Le(2**53)]
_Finite = Annotated[float, Ge(-1e300), Le(1e300)]
_open = with_config(ConfigDict(strict=True, extra="allow"))


@_open
class Logits(TypedDict, total=False):
    """Logits of two programs against each other."""

    top1: float
    sqnr_db: float | None
    max_deviation: float
    samples: Annotated[int, Ge(0)]


@_open
class Proof(TypedDict, total=False):
    """``ParityReport.as_dict()``."""

    weight_codes: _Many
    activation_codes: _Many
    ties_runtime: _Many
    ties_toolkit: _Many
    ties_fused: _Many | None
    runtime_deviation: _Finite
    toolkit_deviation: _Finite
    unfused: Logits | None
    fused: Logits | None
    openvino: Logits | None


@_open
class Tuned(TypedDict, total=False):
    """What tuning changed of a file after it was proven, by the names of the trained model; see
    :class:`qakd_plugin.deploy.tuning.Tuning`."""

    runtime: str
    precision: str
    cpu: str
    batch: _Many
    threads: _Many
    plain_ms: _Finite
    tuned_ms: _Finite
    float_layers: list[str]
    unrounded: list[str]
    half_steps: list[str]
    zero_points: list[str]
    blocked: list[str]
    proof: dict[str, Any] | None


@dataclass(frozen=True)
class FileRecord:
    """The history of an exported file.

    Attributes:
        toolkit: that prepared the model.
        weight_bits: of most weight quantizers.
        activation_bits: of most activation quantizers; 32 where there is none.
        target: whose form the file has.
        training: every training of the model that is known; none: calibrated only, or trained and loaded in a way that keeps no
            record.
        parity: what the gate compared; of a tuned file, of the file that it was made from.
        tuning: what was changed of the proven file, and how that was proven; None where it is as it was exported.
    """

    toolkit: str
    weight_bits: Annotated[int, Ge(1), Le(32)]
    activation_bits: Annotated[int, Ge(1), Le(32)]
    target: str
    training: tuple[TrainingRecord, ...] = ()
    parity: Proof | None = None
    tuning: Tuned | None = None

    @property
    def method(self) -> str:
        """By what it was trained: "SQAKD", "QAT, then SQAKD"; "" where no training is recorded."""
        return method_of(self.training)

    def as_metadata(self) -> dict[str, str]:
        """Entries for the metadata of an ONNX file."""
        return {
            f"{PREFIX}method": self.method or UNTRAINED,
            f"{PREFIX}toolkit": self.toolkit,
            f"{PREFIX}bits": f"W{self.weight_bits}A{self.activation_bits}",
            f"{PREFIX}target": self.target,
            f"{PREFIX}parity": json.dumps(finite(self.parity), separators=(",", ":")),
            f"{PREFIX}training": as_json(self.training),
        }


_ADAPTER = TypeAdapter(FileRecord)
_PROOF = TypeAdapter(Proof)
_TUNED = TypeAdapter(Tuned)


def read_record(metadata: Mapping[str, str], name: str) -> FileRecord | None:
    """The record in a file's metadata; None where there is none, or one that cannot be read, which is logged.

    Args:
        metadata: of the file.
        name: of the file, for the message.
    """
    found = {key: metadata.get(PREFIX + key, "") for key in ("toolkit", "bits", "target", "training", "parity", "tuning")}
    if not found["toolkit"] or not found["training"]:
        return None  # of another maker, or of an earlier version
    try:
        if max(map(len, found.values())) > _LARGEST:
            raise ValueError("an entry is too long")
        weight_bits, _, activation_bits = found["bits"].removeprefix("W").partition("A")
        return _ADAPTER.validate_python(
            {
                "toolkit": found["toolkit"],
                "weight_bits": int(weight_bits),
                "activation_bits": int(activation_bits),
                "target": found["target"],
                "training": from_json(found["training"]),
                "parity": _PROOF.validate_json(found["parity"]),
                "tuning": _TUNED.validate_json(found["tuning"]) if found["tuning"] else None,
            }
        )
    except ValueError as error:
        _log.warning(
            "%s: what it says of its training cannot be read, and is left out: %.200s", name, " ".join(str(error).split())
        )
        return None


def finite(value: Any) -> Any:
    """Plain data without NaN and infinite numbers, which JSON does not know: identical outputs have an infinite SQNR."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
