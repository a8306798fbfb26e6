"""What is shown of a tuned file before it is written: by the file that it was made from, on the same inputs.

Three steps, each against something that was computed without what it shows:
  1. weights with a zero point of -1: the same bits as without, with ONNX Runtime's fusions off and on; convolutions of blocks
     of pixels: with fusions on, as they are deployed, since integers can be added in any order and floats cannot;
  2. every quantizer that was made finer: no number is farther than half of the trained step from what it would have made of
     the same input. So nothing else was taken away with the rounding, neither a ReLU nor a learned clip;
  3. outputs in the runtime, fused and in its precision, against the tuned file computed operator by operator: no farther than
     if all roundings that are left fell otherwise. Rounding ties do, and bfloat16; a kernel that misreads the file does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import ParityError
from ...runtimes.base import Array
from ..parity.tolerances import LABELS, LOGIT_TOLERANCE
from .grids import Finer, grids_of, made_finer
from .timing import Inputs, Variant, Variants

HALF_A_STEP = 0.5 + 1e-3
"""In steps: float32 sums and quotients of numbers of up to 255 steps are that exact."""


@dataclass(frozen=True)
class TuningProof:
    """What was compared.

    Attributes:
        same_bits: every output has the same bits as before, as the runtime computes it.
        quantizers: that were made finer.
        largest_step: by how many of its steps any of their numbers differs from what was trained, at most: half a one is the
            most that rounding moves a number.
        sqnr_db: of the tuned file in its runtime, against the same file computed operator by operator; None of equal outputs.
        rounding_db: the ratio that the rounding which was trained has, which ``sqnr_db`` may not fall below by more than 3 dB;
            None where rounding changes nothing.
        samples: of the comparison.
    """

    same_bits: bool
    quantizers: int
    largest_step: float
    sqnr_db: float | None
    rounding_db: float | None
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def check_same_bits(runtime: Variants, plain: bytes, tuned: bytes, batches: Sequence[Inputs], fusions: Sequence[bool]) -> None:
    """Compare two files in ONNX Runtime, without its fusions, or with them, as they are deployed.

    Raises:
        ParityError: an output differs.
    """
    for fused in fusions:
        pairs = zip(*(runtime.as_it_says(data, batches, fusions=fused) for data in (plain, tuned)), strict=True)
        if not all(np.array_equal(one, other) for outputs in pairs for one, other in zip(*outputs, strict=True)):
            raise ParityError(
                f"the tuned file computes other numbers with fusions {'on' if fused else 'off'}: a fault of ONNX Runtime "
                f"{_version()}. Deploy the plain file."
            )


def check_finer(model: ir.Model, changes: Finer, variant: Variant, runtime: Variants, batches: Sequence[Inputs]) -> TuningProof:
    """Prove what was made of a model.

    Args:
        model: as it was exported.
        changes: what was made finer in it.
        variant: the tuned file, and the precision that it is deployed in.
        runtime: that it is deployed in.
        batches: inputs, by name.

    Raises:
        ParityError: a number moved by more than half a step, or the runtime computes something else than the file says.
    """
    grids = grids_of(model)
    order = (*sorted(changes.unrounded), *sorted(changes.halved - changes.unrounded))
    changed = [grids[index].name for index in order for _ in grids[index].quantizers]
    witnesses, steps = made_finer(model, changes, runtime.runtime, witnessed=True), np.zeros(0)
    count = len(model.graph.outputs)
    found = runtime.as_it_says(runtime.serialized(witnesses), batches)
    if changed:
        steps = np.max([np.stack(outputs[count:]) for outputs in found], axis=0)
        worst = int(np.argmax(steps))  # of NaN, too
        if not steps[worst] <= HALF_A_STEP:
            raise ParityError(
                f"{changed[worst]}: the tuned file moves its numbers by {steps[worst]:.3g} steps, where rounding moves them by "
                "half a one. Deploy the plain file, and report this.",
                changed[worst],
            )
    expected = _joined([outputs[:count] for outputs in found])
    rounded, unrounded = (
        _joined(runtime.as_it_says(runtime.serialized(made_finer(model, one, runtime.runtime)), batches))
        for one in (Finer(), Finer(unrounded=frozenset(range(len(grids)))))
    )
    deployed = _joined(runtime.deployed(variant, batches))
    outputs = [str(value.name) for value in model.graph.outputs]
    compared = list(zip(outputs, expected, deployed, rounded, unrounded, strict=True))
    compared = [one for one in compared if one[1].dtype.kind == "f"] or compared
    for name, *arrays in compared:
        if not _is_explained(*arrays):
            raise ParityError(
                f"{name}: {runtime.runtime} computes something else than the tuned file says: the signal-to-noise ratio is "
                f"{_decibels(*arrays[:2])} dB, of which rounding leaves {_decibels(*arrays[2:])}. Deploy the plain file."
            )
    return TuningProof(
        same_bits=False,
        quantizers=len(steps),
        largest_step=float(steps.max(initial=0.0)),
        sqnr_db=min((ratio for one in compared if (ratio := _decibels(*one[1:3])) is not None), default=None),
        rounding_db=min((ratio for one in compared if (ratio := _decibels(*one[3:])) is not None), default=None),
        samples=sum(len(next(iter(batch.values()))) for batch in batches),
    )


def _joined(batches: Sequence[Sequence[Array]]) -> list[Array]:
    """Each output, of all batches."""
    return [np.concatenate([np.atleast_1d(array) for array in arrays]) for arrays in zip(*batches, strict=True)]


def _is_explained(expected: Array, output: Array, rounded: Array, unrounded: Array) -> bool:
    if expected.shape != output.shape:
        return False
    if expected.dtype.kind != "f":
        return float((output != expected).mean()) <= max(LABELS, 2 * float((unrounded != rounded).mean()))
    finite = expected[np.isfinite(expected)]
    difference = np.abs(_difference(output, expected)).max(initial=0.0)
    if difference <= LOGIT_TOLERANCE * float(np.ptp(finite) if finite.size else 0.0):
        return True
    return bool(_power(_difference(output, expected)) <= 2 * _power(_difference(unrounded, rounded)))


def _difference(one: Array, other: Array) -> Array:
    """Equal infinite numbers have none."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(one == other, 0.0, one.astype(np.float64) - other))


def _power(array: Array) -> float:
    return float((array**2).sum())


def _decibels(reference: Array, output: Array) -> float | None:
    """Signal-to-noise ratio; None of equal arrays, and of what holds no floats."""
    noise = _power(_difference(output, reference)) if reference.dtype.kind == "f" else 0.0
    signal = _power(reference[np.isfinite(reference)].astype(np.float64)) if noise else 0.0
    return round(float(10 * np.log10(signal / noise)), 2) if noise and signal and np.isfinite(noise) else None


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
