"""What a proof says: how close outputs are, and the numbers that an export keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...tasks.outputs import named_outputs

Array = npt.NDArray[Any]
"""float32, or integers and truth values as they are."""

FLIPS = 1e-3
"""Share of an output's integers (labels, token ids) that may differ once ties are settled: the largest of two scores that are
equal but for float32 rounding may be either. Below a thousand of them none may."""

_SMALLEST_RANGE = 1e-30

ROUNDING = 4
"""Units in the last place by which two programs may round one number apart. They count where an output hardly varies: boxes of
a detector that knows nothing yet are all 0.5, and a ten-thousandth of their range is less than float32 resolves there."""


@dataclass(frozen=True)
class Agreement:
    """How two sets of logits compare: N samples. Of several outputs, each number is that of the one that agrees least.

    Attributes:
        top1: share of samples with the same arg max.
        sqnr_db: signal to quantization-noise ratio, dB.
        max_deviation: largest absolute difference over the range of the reference.
        samples: N.
    """

    top1: float
    sqnr_db: float
    max_deviation: float
    samples: int


@dataclass(frozen=True)
class ParityReport:
    """What was compared, and how it came out.

    Attributes:
        weight_codes: integer weight codes found equal.
        activation_codes: integer activation codes compared.
        ties_runtime: activations on a tie that the runtime rounds the other way than the export form.
        ties_toolkit: activations on a tie that the toolkit rounds the other way than the export form.
        ties_fused: likewise, the runtime with fusions on; None where it was not run.
        runtime_deviation: runtime against export form, ties settled; over the range of the logits.
        toolkit_deviation: export form against prepared model, ties settled; likewise.
        unfused: the file without fusions against the prepared model, ties left as they fall.
        fused: the file as it is deployed, fusions on, against the prepared model; None where it was not run.
        openvino: the file in OpenVINO against the prepared model; None where it is not meant for it, or it is not installed.
    """

    weight_codes: int
    activation_codes: int
    ties_runtime: int
    ties_toolkit: int
    ties_fused: int | None
    runtime_deviation: float
    toolkit_deviation: float
    unfused: Agreement
    fused: Agreement | None
    openvino: Agreement | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain data for a report."""
        return asdict(self)


def arrays(outputs: object) -> list[Array]:
    """All tensors in what a model returns, however nested, in the order that they have in an exported file."""
    return [as_float32(as_array(tensor)) for tensor in named_outputs(outputs).values()]


def as_array(tensor: Tensor) -> Array:
    """The same numbers; NumPy has no bfloat16."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_float32(array: Array) -> Array:
    """float32, unless it holds integers or truth values."""
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def agreement(reference: Array, logits: Array) -> Agreement:
    """Compare (N, ...) logits with a reference of the same shape; of integers, each is a label."""
    if reference.dtype.kind != "f":
        same = float((reference == logits).mean()) if reference.size else 1.0
        sqnr = float("inf") if same == 1 else float("-inf")
        return Agreement(same, sqnr, 1 - same, len(reference) if reference.ndim else 1)
    if reference.ndim < 2:  # one number per sample: a single class
        reference, logits = reference.reshape(-1, 1), logits.reshape(-1, 1)
    signal = reference.astype(np.float64)
    noise = logits.astype(np.float64) - signal
    power = float((noise**2).sum())
    return Agreement(
        top1=float((reference.argmax(1) == logits.argmax(1)).mean()),
        sqnr_db=float("inf") if power == 0 else float(10 * np.log10((signal**2).sum() / power)),
        max_deviation=float(np.abs(noise).max()) / max(range_of(signal), _SMALLEST_RANGE),
        samples=len(reference),
    )


def least_agreement(references: Sequence[Array], outputs: Sequence[Array]) -> Agreement:
    """Compare all outputs with references of the same shapes; each number is that of the output that agrees least.

    Integers count where there is nothing else.
    """
    pairs = list(zip(references, outputs, strict=True))
    found = [agreement(*pair) for pair in [pair for pair in pairs if pair[0].dtype.kind == "f"] or pairs]
    return Agreement(
        top1=min(one.top1 for one in found),
        sqnr_db=min(one.sqnr_db for one in found),
        max_deviation=max(one.max_deviation for one in found),
        samples=found[0].samples,
    )


def deviations(
    actual: Sequence[Array], expected: Sequence[Array], flips: float = FLIPS, ranges: Sequence[float] | None = None
) -> list[float]:
    """Largest difference of each output over the range of what is expected of it; infinite where shapes or numbers differ.

    Of integers and truth values no difference counts as small, but a share of ``flips`` may differ. ``ranges`` are those of
    more samples, where ``expected`` has too few to have one.
    """
    if len(actual) != len(expected):
        return [float("inf")] * max(len(expected), 1)
    least = ranges or [0.0] * len(expected)
    return [_deviation(one, other, flips, floor) for one, other, floor in zip(actual, expected, least, strict=True)]


def range_of(output: Array) -> float:
    """Largest less smallest finite value; of a single value, its distance from 0."""
    finite = output[np.isfinite(output)] if output.dtype.kind == "f" else output[:0]
    spread = float(np.ptp(finite)) if finite.size else 0.0
    return spread or float(np.abs(finite).max(initial=0))


def _deviation(one: Array, other: Array, flips: float, floor: float) -> float:
    if one.shape != other.shape:
        return float("inf")
    if other.dtype.kind != "f":
        return 0.0 if not other.size or float((one != other).mean()) <= flips else float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.where(one == other, np.float32(0), np.abs(one - other))  # infinite, as masks are, is no difference
        difference = np.where(difference <= ROUNDING * np.spacing(np.abs(other)), np.float32(0), difference)
    return float(difference.max(initial=0)) / max(range_of(other), floor, _SMALLEST_RANGE)


def largest_deviation(actual: Sequence[Array], expected: Sequence[Array], flips: float = FLIPS) -> float:
    """The largest of the :func:`deviations` of all outputs."""
    return float(np.max(deviations(actual, expected, flips)))  # unlike Python's, NumPy's keeps NaN
