"""Images to score augmentations on: in [0, 1], in an order of our own, in chunks that are the same for every candidate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import LabelsRequiredError, QakdError
from ..tasks.batches import BatchFn

CHUNK = 40
"""Images read and scored at a time; a multiple of every number of jackknife blocks."""
Stats = tuple[Sequence[float], Sequence[float]]


class Extremes:
    """The smallest and the largest value of batches, judged without waiting for a device at each of them.

    The first batch is judged at once, and so is every batch on a CPU; of others the extremes are gathered where they are, and
    :meth:`settle` judges them.

    Args:
        judge: callable(low, high) that raises where images must not lie there.
    """

    def __init__(self, judge: Callable[[float, float], None]) -> None:
        self._judge = judge
        self._seen: tuple[Tensor, Tensor] | None = None

    def clamped(self, x: Tensor) -> Tensor:
        """``x`` in [0, 1]."""
        low, high = x.detach().aminmax()
        if _is_read_at_once(x):
            self._judge(float(low), float(high))
            return x.clamp(0, 1) if low < 0 or high > 1 else x
        if self._seen is None:
            self._judge(float(low), float(high))
            self._seen = low, high
        self._seen = torch.minimum(self._seen[0], low), torch.maximum(self._seen[1], high)
        return x.clamp(0, 1)

    def settle(self) -> None:
        """Judge what was gathered since: once an epoch."""
        if self._seen is not None:
            self._judge(*torch.stack(self._seen).tolist())


def _is_read_at_once(x: Tensor) -> bool:
    return x.device.type == "cpu"


class UnitRange:
    """Normalised images to [0, 1] and back.

    Args:
        input_stats: (mean, std) per channel; None where images are in [0, 1] already.
    """

    def __init__(self, input_stats: Stats | None) -> None:
        self.input_stats = input_stats
        self._stats = None if input_stats is None else [torch.tensor(values).reshape(1, -1, 1, 1) for values in input_stats]
        self._there = self._stats
        self._extremes = Extremes(self._require)

    def unit(self, x: Tensor) -> Tensor:
        """Images as augmentations want them: clamped by what rounding left over. On a GPU see :meth:`settle`.

        Raises:
            QakdError: they are no float images, or not in [0, 1]; says what to pass.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise QakdError(f"images must be float (N, C, H, W), got {tuple(x.shape)} {x.dtype}.")
        if self._stats is not None:
            mean, std = self._like(x)
            x = x * std + mean
        return self._extremes.clamped(x)

    def settle(self) -> None:
        """Judge the images since the last time of which :meth:`unit` could not without waiting: see :class:`Extremes`."""
        self._extremes.settle()

    def normalised(self, x: Tensor) -> Tensor:
        """Images as the networks want them."""
        if self._stats is None:
            return x
        mean, std = self._like(x)
        return (x - mean) / std

    def _like(self, x: Tensor) -> list[Tensor]:
        """Mean and deviation where ``x`` is; copied there once."""
        assert self._stats is not None
        assert self._there is not None
        if self._there[0].device != x.device or self._there[0].dtype != x.dtype:
            self._there = [values.to(x) for values in self._stats]
        return self._there

    def _require(self, low: float, high: float) -> None:
        if low < -1e-2 or high > 1 + 1e-2:  # what is no number is reported where it would do harm
            given = "after input_stats they lie" if self._stats is not None else "they lie"
            raise QakdError(
                f"images must be in [0, 1] for an augmentation, but {given} in {low:.3g}..{high:.3g}. "
                "Pass input_stats=(mean, std) of the loader's normalisation."
            )


@dataclass(frozen=True)
class Chunk:
    """Some images, the same for every candidate.

    Attributes:
        images: float (n, C, H, W) in [0, 1], n at most CHUNK.
        labels: as the data hold them, or None.
        seeds: (n,): of each image's draws.
    """

    images: Tensor
    labels: Any
    seeds: list[int]


class Source:
    """Reads images from what users pass, at most ``limit`` of them; equal seeds read equal images.

    Data that can be indexed (a Dataset, a DataLoader over one, a list of batches) are shuffled; other iterables are taken in
    their own order.

    Args:
        data: Dataset, DataLoader, list of batches, or another iterable of batches.
        batch_fn: splits a batch into images and labels.
        unit_range: takes images to [0, 1].
        seed: of the order, of random transforms in the data set, and of the draws of augmentations.
        limit: None for all.
    """

    def __init__(self, data: Any, batch_fn: BatchFn, unit_range: UnitRange, seed: int, limit: int | None) -> None:
        self.data, self.batch_fn, self.unit_range, self.seed, self.limit = data, batch_fn, unit_range, seed, limit
        self.total = self._total()

    def _total(self) -> int | None:
        """Images there will be, where that is known."""
        if (dataset := _indexed(self.data)) is not None:
            count = len(dataset)  # type: ignore[arg-type]
        elif isinstance(self.data, Sequence):
            count = sum(len(self.batch_fn(batch)[0]) for batch in self.data)
        else:
            return None
        return count if self.limit is None else min(count, self.limit)

    def chunks(self) -> Iterator[Chunk]:
        """All chunks; full ones, except the last. Draws from the global generators."""
        draws = torch.Generator().manual_seed(self.seed)
        batches = iter(self._batches(draws))
        left = self.limit
        for number in range(2**62):
            _seed_all(self.seed + 7919 * number)  # a candidate's draws must not reach the data set's own
            batch = next(batches, None)
            if batch is None or left == 0:
                return
            images, labels = batch
            count = len(images) if left is None else min(left, len(images))
            left = None if left is None else left - count
            seeds = torch.randint(2**62, (CHUNK,), generator=draws).tolist()[:count]
            cut = labels[:count] if isinstance(labels, Tensor) else None
            unit = self.unit_range.unit(images[:count])
            self.unit_range.settle()
            yield Chunk(unit, cut, seeds)

    def _images(self, batch: Any) -> tuple[Tensor, Any]:
        images, labels = self.batch_fn(batch)
        if not isinstance(images, Tensor):
            raise QakdError(
                f"ranking augmentations is for images and classes: a batch holds {type(images).__name__} and no tensor of "
                "images. Choose an augmentation yourself: augment=..."
            )
        return images, labels

    def _batches(self, draws: torch.Generator) -> Iterable[tuple[Tensor, Any]]:
        """(images, labels) of CHUNK images; the last has fewer."""
        if (dataset := _indexed(self.data)) is not None:
            order = torch.randperm(len(dataset), generator=draws).tolist()  # type: ignore[arg-type]
            given = self.data if isinstance(self.data, DataLoader) else None
            loader: Any = DataLoader(
                dataset,
                CHUNK,
                sampler=order,
                collate_fn=None if given is None else given.collate_fn,
                num_workers=0 if given is None else given.num_workers,
                generator=torch.Generator().manual_seed(self.seed),
            )
            return (self._images(batch) for batch in loader)
        split = (self._images(batch) for batch in self.data)
        if not isinstance(self.data, Sequence):
            return _rechunked(split)
        images, labels = _joined(list(split))
        shuffled = torch.split(torch.randperm(len(images), generator=draws), CHUNK)
        return ((images[rows], None if labels is None else labels[rows]) for rows in shuffled)


def _indexed(data: Any) -> Dataset[Any] | None:
    """The data set behind ``data`` whose samples can be read in any order, or None."""
    if isinstance(data, DataLoader):
        if data.batch_size is None and data.batch_sampler is None:
            return None  # its items are batches already
        data = data.dataset
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return data
    return None


def _rechunked(batches: Iterable[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
    held: list[tuple[Tensor, Any]] = []
    for batch in batches:
        images, labels = _joined([*held, batch])
        while len(images) >= CHUNK:
            yield images[:CHUNK], None if labels is None else labels[:CHUNK]
            images, labels = images[CHUNK:], None if labels is None else labels[CHUNK:]
        held = [(images, labels)] if len(images) else []
    yield from held


def _joined(batches: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor | None]:
    if not batches:
        raise QakdError("data is empty: it holds no batch. Pass batches of images.")
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels) if all(isinstance(label, Tensor) for label in labels) else None


def require_dataset_labels(labels: Any) -> Tensor:
    """Labels of a chunk.

    Raises:
        LabelsRequiredError: there are none.
    """
    if not isinstance(labels, Tensor):
        raise LabelsRequiredError(
            'labels="dataset", but the data yield no tensor of labels. Yield (x, y), or pass labels="teacher", which takes the '
            "teacher's own answers on the images before augmentation."
        )
    return labels


def _seed_all(seed: int) -> None:
    seed %= 2**63
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what a data set's transforms may draw from
