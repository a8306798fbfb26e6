"""What a proof says: how close outputs are, and the numbers that an export keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils._pytree import tree_leaves

Array = npt.NDArray[np.float32]

_SMALLEST_RANGE = 1e-30


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
    return [leaf.detach().float().numpy() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def agreement(reference: Array, logits: Array) -> Agreement:
    """Compare (N, ...) logits with a reference of the same shape."""
    if reference.ndim < 2:  # one number per sample: a single class
        reference, logits = reference.reshape(-1, 1), logits.reshape(-1, 1)
    signal = reference.astype(np.float64)
    noise = logits.astype(np.float64) - signal
    power = float((noise**2).sum())
    return Agreement(
        top1=float((reference.argmax(1) == logits.argmax(1)).mean()),
        sqnr_db=float("inf") if power == 0 else float(10 * np.log10((signal**2).sum() / power)),
        max_deviation=float(np.abs(noise).max()) / max(float(np.ptp(signal)), _SMALLEST_RANGE),
        samples=len(reference),
    )


def least_agreement(references: Sequence[Array], outputs: Sequence[Array]) -> Agreement:
    """Compare all outputs with references of the same shapes; each number is that of the output that agrees least."""
    found = [agreement(*pair) for pair in zip(references, outputs, strict=True)]
    return Agreement(
        top1=min(one.top1 for one in found),
        sqnr_db=min(one.sqnr_db for one in found),
        max_deviation=max(one.max_deviation for one in found),
        samples=found[0].samples,
    )


def deviations(actual: Sequence[Array], expected: Sequence[Array]) -> list[float]:
    """Largest difference of each output over the range of what is expected of it; infinite where shapes or numbers differ."""
    if len(actual) != len(expected):
        return [float("inf")] * max(len(expected), 1)
    return [
        float(np.abs(one - other).max(initial=0)) / max(float(np.ptp(other)) if other.size else 0.0, _SMALLEST_RANGE)
        if one.shape == other.shape
        else float("inf")
        for one, other in zip(actual, expected, strict=True)
    ]


def largest_deviation(actual: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest of the :func:`deviations` of all outputs."""
    return float(np.max(deviations(actual, expected)))  # unlike Python's, NumPy's keeps NaN
