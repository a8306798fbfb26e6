"""What files say of their own history: by what they were trained, with which curve, and what was proven of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..bench.rows import Row
from ..deploy.file_record import UNTRAINED, Tuned

_NAMED = {"PTQ": "", "QAT": "QAT", "KD": "KD", "SQAKD": "SQAKD", "QKD": "QKD"}
"""What a row's ``method`` says by itself, of a file without a record: names that whoever called ``benchmark`` gave it."""


def trained_by(row: Row) -> str | None:
    """The method that a row's model was trained by, as its file's record says; "" where no training is recorded, None where
    nothing is known. Without a record the row's own method counts, if it is one, unless it is but the file's name."""
    if row.record is not None:
        return row.record.method
    is_file_name = row.method == PurePath(row.file).stem
    return None if row.is_float or is_file_name else _NAMED.get(row.method)


def training_text(row: Row) -> str:
    """For a cell: "SQAKD, 12 epochs"."""
    if row.is_float:
        return "-"
    method = trained_by(row)
    if method is None:
        return "not known"
    if not method:
        kept = row.record is not None and row.record.training
        return "calibrated weights kept" if kept else UNTRAINED
    record = row.record.training[-1] if row.record is not None else None
    if record is None:
        return method
    return f"{method}, own loop" if record.loop == "own" else f"{method}, {_epochs(record.history)}"


def way(row: Row) -> str:
    """How a quantized row came about: for the heading of a column."""
    if row.method in _NAMED:
        return row.method
    method = trained_by(row)
    return row.method if method is None else method or UNTRAINED


def trainings_of(document: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """{"name", "history"} of every training: those of the document, or else those that its files have recorded, each once."""
    if document.get("training"):
        return list(document["training"])
    found: list[tuple[Any, list[str]]] = []
    for row in rows:
        for record in row.record.training if row.record is not None else ():
            names = next((names for known, names in found if known == record), None)
            if names is None:
                found.append((record, names := []))
            if record.history and row.file not in names:
                names.append(row.file)
    return [
        {"name": f"{record.method}: {', '.join(names)}", "history": list(record.history)} for record, names in found if names
    ]


def proofs_of(document: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The proof of every file: those of the document, or else those that its files have recorded, each once."""
    if document.get("parity"):
        return list(document["parity"])
    found = {(row.file, row.run): row.record.parity for row in rows if row.record is not None and row.record.parity}
    proofs: list[dict[str, Any]] = []
    for (file, _), proof in found.items():
        entry = {"name": file, **proof}
        if entry not in proofs:
            proofs.append(entry)
    return proofs


def tunings_of(rows: Sequence[Row]) -> list[str]:
    """A line for every file that was tuned for a machine after it was proven: what computes otherwise in it now."""
    tuned = {row.file: row.record.tuning for row in rows if row.record is not None and row.record.tuning is not None}
    return [f"{file}: {_tuning(found)}" for file, found in tuned.items()]


def _tuning(found: Tuned) -> str:
    parts = [f"tuned for {found.get('runtime', 'a runtime')} on {found.get('cpu', 'a processor')}, from a file that was proven"]
    if layers := found.get("float_layers"):
        parts.append(f"in floating point: {', '.join(layers)}")
    counted = (("that no longer round", found.get("unrounded")), ("on half their step", found.get("half_steps")))
    parts += [f"quantizers {what}: {len(names)}" for what, names in counted if names]
    if shifted := found.get("zero_points"):
        parts.append(f"weights with a zero point of -1, the same numbers: {len(shifted)}")
    if blocked := found.get("blocked"):
        parts.append(f"convolutions that read blocks of pixels, the same integers: {len(blocked)}")
    if found.get("precision") == "bfloat16":
        parts.append("what is not quantized in bfloat16")
    step = (found.get("proof") or {}).get("largest_step")
    if isinstance(step, int | float) and step > 0:
        parts.append(f"numbers are at most {step:.2f} steps from what was trained, and rounding moves them by half a one")
    return "; ".join(parts)


def _epochs(history: Sequence[Mapping[str, Any]]) -> str:
    """How many, of a history that may be thinned."""
    last = history[-1].get("epoch") if history else None
    if not isinstance(last, int):
        return "number of epochs not known"
    return f"{last + 1} epoch{'s' * (last > 0)}"
