"""What is counted through the runtimes, in one pass over a loader: whatever its size, only a block of it is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import QakdError
from ..runtimes.base import Array, Runner
from .intervals import mcnemar_p_value, paired_interval, wilson_interval
from .rows import OutputAgreement
from .samples import Pool, Reader, Samples, blocks

IMAGES_AT_ONCE = 64
"""Samples per call where a file leaves the batch open, and labels can be cut anywhere."""

_COUNT_ANOTHER = "Count another metric: metric=, with metric_fn=lambda outputs, targets: (..., ...)."


class Count(Protocol):
    """Something that is counted of a runner's outputs."""

    def add(self, outputs: Mapping[str, Array], samples: Samples) -> None:
        """Count some samples."""

    def score(self) -> dict[str, Any]:
        """Fields of a row."""

    def change(self, reference: Any) -> tuple[float, float | None, float | None, float | None] | None:
        """What was counted less what ``reference``, of the same kind, counted of another file on the same samples: the value,
        its 95 % interval, and a p-value; None where no row is ranked by it."""


@dataclass
class Tally:
    """What one runner answered so far.

    Attributes:
        name: of the file, for messages.
        runner: that computes.
        size: samples per call; every call has the same, since runtimes compile for a size, and some files fix it.
        counts: what is counted of its outputs.
    """

    name: str
    runner: Runner
    size: int
    counts: Sequence[Count]

    def add(self, samples: Samples, reader: Reader) -> None:
        """Compute a block, and count."""
        calls = []
        for start in range(0, samples.count, self.size):
            part = samples.rows(start, start + self.size)
            calls.append((part.count, self.runner.run(reader.feed(self.runner, part.filled(self.size)))))
        outputs = {name: self._whole(name, [(count, found[name]) for count, found in calls]) for name in calls[0][1]}
        for count in self.counts:
            count.add(outputs, samples)

    def score(self) -> dict[str, Any]:
        """The fields of a row."""
        return {name: value for count in self.counts for name, value in count.score().items()}

    def _whole(self, name: str, parts: Sequence[tuple[int, Array]]) -> Array:
        """One output for all samples: without what was computed for samples that only filled a call up."""
        arrays = [array for _, array in parts]
        if all(array.ndim and len(array) == self.size for array in arrays):
            return np.concatenate([array[:count] for count, array in parts])
        if (len(parts) == 1 and parts[0][0] == self.size) or all(np.array_equal(array, arrays[0]) for array in arrays[1:]):
            return arrays[0]
        raise QakdError(
            f"{self.name}: output {name!r} has shape {list(arrays[0].shape)} for {self.size} samples, and other values for "
            f"others: it does not say which belong to which sample. Yield batches of {self.size}."
        )


@dataclass
class Accuracy:
    """Top-1 of logits (N, C) against class labels (N,), with Wilson's interval.

    Attributes:
        name: of the file, for messages.
        samples: so far; ``correct`` are those with the label's class.
        right: whether each has it, block by block.
    """

    name: str
    samples: int = 0
    correct: int = 0
    right: list[Array] = field(default_factory=list)

    def add(self, outputs: Mapping[str, Array], samples: Samples) -> None:
        """Count the labels that it gives."""
        logits = outputs[main_output(outputs, self.name)]
        if logits.ndim != 2 or len(logits) != samples.count or logits.shape[1] < 2:
            raise QakdError(
                f"{self.name}: accuracy needs logits of shape [{samples.count}, classes], got {list(logits.shape)}. "
                f"{_COUNT_ANOTHER}"
            )
        right = logits.argmax(1) == samples.targets
        self.right.append(right)
        self.correct += int(right.sum())
        self.samples += samples.count

    def score(self) -> dict[str, Any]:
        """Share and interval."""
        low, high = wilson_interval(self.correct, self.samples)
        return {
            "accuracy": self.correct / self.samples,
            "accuracy_low": low,
            "accuracy_high": high,
            "samples": self.samples,
        }

    def change(self, reference: Accuracy) -> tuple[float, float | None, float | None, float | None] | None:
        """Paired: Tango's interval and McNemar's test."""
        mine, others = np.concatenate(self.right), np.concatenate(reference.right)
        gained, lost = int((mine & ~others).sum()), int((others & ~mine).sum())
        low, high = paired_interval(gained, lost, self.samples)
        return (gained - lost) / self.samples, low, high, mcnemar_p_value(gained, lost)


@dataclass
class Agreement:
    """Outputs against those of the trained model: the same label where they hold logits, and signal to noise.

    Attributes:
        name: of the file, for messages.
        reference: (N, ...) for all samples of the loader: of its only output, or by name.
        samples: so far.
    """

    name: str
    reference: Array | Mapping[str, Array]
    samples: int = 0
    _expected: Mapping[str, Array] = field(default_factory=dict)
    _found: dict[str, _Compared] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, Array], samples: Samples) -> None:
        """Compare a block."""
        integers = any(array.dtype.kind in "iu" for array in samples.inputs.values())
        self._expected = self._expected or self._references(outputs)
        for name, expected in self._expected.items():
            output = outputs[name]
            part = np.asarray(expected[self.samples : self.samples + samples.count], dtype=np.float64)
            if part.shape != output.shape:
                raise _misfit(expected, f"{self.samples + samples.count} or more", output.shape[1:])
            dim = class_dim(output, integers)
            self._found.setdefault(name, _Compared(dim)).add(output, part)
        self.samples += samples.count

    def score(self) -> dict[str, Any]:
        """Of the only output or the one called "logits"; of each by name, where several are compared."""
        for expected in self._expected.values():
            if len(expected) != self.samples:
                raise _misfit(expected, f"{self.samples}", np.shape(expected)[1:])
        each = {name: (found.agreement, found.sqnr_db) for name, found in self._found.items()}
        main = each.get("logits") if len(each) > 1 else next(iter(each.values()))
        agreement, sqnr_db = main or (None, None)
        several = tuple(OutputAgreement(name, *found) for name, found in each.items()) if len(each) > 1 else ()
        return {"agreement": agreement, "sqnr_db": sqnr_db, "outputs": several, "samples": self.samples}

    def change(self, reference: Agreement) -> None:
        """None: it is a comparison already."""

    def _references(self, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if not isinstance(self.reference, Mapping):
            return {main_output(outputs, self.name): self.reference}
        for name in self.reference:
            if name not in outputs:
                raise QakdError(
                    f"reference: {self.name} has no output {name!r}; it outputs {listed(outputs)}. Name one of them."
                )
            if outputs[name].dtype.kind != "f":
                raise QakdError(f"reference: output {name!r} of {self.name} holds {outputs[name].dtype}: leave it out.")
        return self.reference


@dataclass
class _Compared:
    """Sums of one output: labels that agree, squares of the reference, and of deviations from it."""

    dim: int | None
    agreed: int = 0
    labels: int = 0
    noise: float = 0.0
    signal: float = 0.0

    def add(self, output: Array, expected: Array) -> None:
        if self.dim is not None:
            same = output.argmax(self.dim) == expected.argmax(self.dim)
            self.agreed += int(same.sum())
            self.labels += same.size
        self.noise += float(((output - expected) ** 2).sum())
        self.signal += float((expected**2).sum())

    @property
    def agreement(self) -> float | None:
        return self.agreed / self.labels if self.labels else None

    @property
    def sqnr_db(self) -> float | None:
        ratio = self.signal / self.noise if self.noise else 0.0
        return 10 * math.log10(ratio) if ratio else None


def score_all(tallies: Sequence[Tally], batches: Iterable[Samples], reader: Reader, keep: int, *, cut: bool) -> Samples:
    """Give all samples to every runner, in their order.

    Args:
        tallies: one for each runner; they are filled in.
        batches: one at least.
        reader: that split them.
        keep: number of samples to give back.
        cut: whether targets are labels or none, so that samples may be joined and cut to the size of a call.

    Returns:
        The first ``keep`` samples of the first one's shape, or as many as there are.

    Raises:
        QakdError: a runner does not take them, or what is counted does not take its outputs.
    """
    pool, batches = Pool(keep), _alike(batches)
    for samples in blocks(batches, max(tally.size for tally in tallies)) if cut else batches:
        for tally in tallies:
            tally.add(samples, reader)
        pool.add(samples)
    return pool.samples()


def main_output(outputs: Mapping[str, Array], name: str) -> str:
    """The float output called "logits", or the only one.

    Raises:
        QakdError: there are several, or none.
    """
    floats = [key for key, array in outputs.items() if array.dtype.kind == "f" and array.ndim]
    if "logits" in floats:
        return "logits"
    if len(floats) != 1:
        raise QakdError(
            f"{name} outputs {listed(outputs)}: which of them holds logits is not known. {_COUNT_ANOTHER} A reference is a "
            "mapping with the names of outputs."
        )
    return floats[0]


def class_dim(output: Array, integer_inputs: bool) -> int | None:
    """The dimension of classes, as training reads it: 1 of (N, C) and (N, C, H, W), the last of (N, T, C) of token ids."""
    if output.ndim in (2, 4) and output.shape[1] > 1:
        return 1
    return -1 if output.ndim == 3 and integer_inputs else None


def listed(outputs: Mapping[str, Array]) -> str:
    """Names, shapes and types, for messages."""
    return ", ".join(f"{name!r} {list(array.shape)} {array.dtype}" for name, array in outputs.items()) or "nothing"


def labels_of(samples: Samples) -> Array:
    """Class labels of samples.

    Raises:
        QakdError: targets are not one integer for each sample.
    """
    try:
        labels = np.asarray(samples.targets)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a GPU or with gradients
        raise QakdError(
            f"loader: labels cannot be read as an array ({str(error)[:200]}). Yield arrays, or tensors on the CPU."
        ) from error
    # NumPy would compare labels (N, 1) with N answers as N x N, without a word.
    if labels.shape != (samples.count,) or not np.issubdtype(labels.dtype, np.integer):
        raise QakdError(
            f"loader: labels must be one integer for each image, shape [{samples.count}]; got {labels.dtype} of shape "
            f"{list(labels.shape)}. Take labels[:, 0] of labels (N, 1), and labels.argmax(1) of one-hot ones. Other targets "
            "need metric=."
        )
    return labels


def _alike(batches: Iterable[Samples]) -> Iterator[Samples]:
    """The same batches; what goes with every sample alike does so in each of them."""
    names: frozenset[str] | None = None
    for samples in batches:
        names = samples.per_sample if names is None else names
        if samples.per_sample != names:
            name = min(samples.per_sample ^ names)
            rows = len(samples.inputs[name]) if name in samples.inputs else "no"
            raise QakdError(
                f"loader: the input {name!r} has one row per sample in some batches alone: here {rows} rows for "
                f"{samples.count} samples. Give it one in all of them, or in none."
            )
        yield samples


def _misfit(reference: Array, images: str, sizes: Sequence[int]) -> QakdError:
    what = f"{sizes[0]} logits" if len(sizes) == 1 else f"values of shape {list(sizes)}"
    return QakdError(
        f"reference: expected {what} for each of the loader's {images} images, got shape {list(np.shape(reference))}. "
        "Compute them on all images of the loader, in its order."
    )
