"""Accuracy through the runtimes, in one pass over a loader: whatever its size, only a block of it is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import QakdError
from ..runtimes.base import Array, Runner

IMAGES_AT_ONCE = 64
"""Images per call where a file leaves the batch open."""


@dataclass
class Tally:
    """What one runner answered so far.

    Attributes:
        name: of the file, for messages.
        runner: that computes.
        size: images per call; every call has the same, since runtimes compile for a size, and some files fix it.
        reference: logits (N, C) of the trained model on the loader's images, in their order.
        samples: images so far; ``correct`` and ``agreed`` are those with the label's and with the reference's class.
        noise: squared deviations from the reference, added up, and ``signal`` its own squares.
    """

    name: str
    runner: Runner
    size: int
    reference: Array | None = None
    samples: int = 0
    correct: int = 0
    agreed: int = 0
    noise: float = 0.0
    signal: float = 0.0

    def add(self, images: Array, labels: Array) -> None:
        """Compute a block."""
        logits = self._logits(images)
        self.correct += int((logits.argmax(1) == labels).sum())
        if self.reference is not None:
            self._compare(logits, self.reference)
        self.samples += len(labels)

    def score(self) -> dict[str, Any]:
        """The fields of a row."""
        low, high = wilson_interval(self.correct, self.samples)
        score = {
            "accuracy": self.correct / self.samples,
            "accuracy_low": low,
            "accuracy_high": high,
            "samples": self.samples,
        }
        if self.reference is None:
            return score
        if len(self.reference) != self.samples:
            raise _misfit(self.reference, f"{self.samples}", self.reference.shape[1])
        ratio = self.signal / self.noise if self.noise else 0.0
        return score | {"agreement": self.agreed / self.samples, "sqnr_db": 10 * math.log10(ratio) if ratio else None}

    def _logits(self, images: Array) -> Array:
        found = []
        for start in range(0, len(images), self.size):
            part = images[start : start + self.size]
            filled = np.concatenate([part, np.repeat(part[-1:], self.size - len(part), axis=0)])
            found.append(self.runner.run(filled)[: len(part)])
        logits: Array = np.concatenate(found)
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            raise QakdError(
                f"{self.name}: accuracy needs logits of shape [{len(images)}, classes] as the first output, got "
                f"{list(logits.shape)}. Measure it without a loader, or export a classifier."
            )
        return logits

    def _compare(self, logits: Array, reference: Array) -> None:
        part = np.asarray(reference[self.samples : self.samples + len(logits)], dtype=np.float64)
        if part.shape != logits.shape:
            raise _misfit(reference, f"{self.samples + len(logits)} or more", logits.shape[1])
        self.agreed += int((logits.argmax(1) == part.argmax(1)).sum())
        self.noise += float(((logits - part) ** 2).sum())
        self.signal += float((part**2).sum())


def score_all(tallies: Sequence[Tally], loader: Iterable[Any], keep: int) -> Array:
    """Give every batch of a loader to every runner; the loader is read once.

    Args:
        tallies: one for each runner; they are filled in.
        loader: batches (images, labels): float (N, ...) and integers (N,).
        keep: number of images to give back.

    Returns:
        The first ``keep`` images, or as many as there are.

    Raises:
        QakdError: the loader is empty, or what it yields is no such batch; says what it was.
    """
    kept: list[Array] = []
    for images, labels in _blocks(map(_arrays, loader), max(tally.size for tally in tallies)):
        for tally in tallies:
            tally.add(images, labels)
        if sum(map(len, kept)) < keep:
            kept.append(images)
    if not kept:
        raise QakdError("loader is empty: it yielded no batch.")
    return np.concatenate(kept)[:keep]


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927)."""
    from scipy.stats import binomtest  # takes longer to import than many a file to be measured

    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _misfit(reference: Array, images: str, classes: int) -> QakdError:
    return QakdError(
        f"reference: expected {classes} logits for each of the loader's {images} images, got shape {list(reference.shape)}. "
        "Compute them on all images of the loader, in its order."
    )


def _arrays(batch: Any) -> tuple[Array, Array]:
    """Images and labels of a batch, one label for each image."""
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise QakdError("loader: accuracy needs batches (images, labels).")
    try:
        images, labels = np.asarray(batch[0], dtype=np.float32), np.asarray(batch[1])
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a GPU or with gradients
        raise QakdError(
            f"loader: a batch cannot be read as arrays ({str(error)[:200]}). Yield arrays, or tensors on the CPU."
        ) from error
    # NumPy would compare labels (N, 1) with N answers as N x N, without a word.
    if labels.ndim != 1 or labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise QakdError(
            f"loader: labels must be one integer for each image, shape {list(images.shape[:1])}; got {labels.dtype} of shape "
            f"{list(labels.shape)}. Take labels[:, 0] of labels (N, 1), and labels.argmax(1) of one-hot ones."
        )
    return images, labels


def _blocks(batches: Iterable[tuple[Array, Array]], size: int) -> Iterator[tuple[Array, Array]]:
    """The same samples in blocks of one size, and the rest of them."""
    waiting: list[tuple[Array, Array]] = []
    for batch in batches:
        waiting.append(batch)
        count = sum(len(labels) for _, labels in waiting)
        if count < size:
            continue
        images, labels = _joined(waiting)
        rest = count - count % size
        for start in range(0, rest, size):
            yield images[start : start + size], labels[start : start + size]
        waiting = [(images[rest:], labels[rest:])]
    if any(len(labels) for _, labels in waiting):
        yield _joined(waiting)


def _joined(batches: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    shapes = list(dict.fromkeys(images.shape[1:] for images, _ in batches))
    if len(shapes) > 1:
        raise QakdError(f"loader: images must have one shape, got {list(shapes[0])} and {list(shapes[1])}. Resize them.")
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])
