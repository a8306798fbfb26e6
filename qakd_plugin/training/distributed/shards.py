"""The batches of an epoch, shared among processes so that no sample is lost and none counts twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from ..._common.rng_state import samplers_of
from ...errors import QakdError
from ...tasks.inputs import Inputs, named_tensors
from ..streams import length_of
from .processes import Processes


class Shares(Protocol):
    """Re-iterable, with a length: the batches that this process works on, and whether each counts."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Any, bool]]: ...


class Whole:
    """All batches of a loader: those of a process that trains alone, or of a loader that is shared out already.

    Args:
        loader: as the user passed it.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        for batch in self.loader:
            yield batch, True


class Shards:
    """One process's share of each joined batch.

    A joined batch is as many consecutive batches of the loader as there are processes; each takes one. What is left at the end
    of the loader is divided anew, as evenly as can be. A process for which nothing is left gets a sample of another to compute
    on, which does not count: it must have no weight in any mean.

    Of a DataLoader each process reads its own share only, in the order that the first process's sampler drew. Other iterables
    are run through by every process and must yield the same everywhere.

    Args:
        loader: the whole loader, the same in all processes.
        processes: of this run, more than one.
    """

    def __init__(self, loader: Iterable[Any], processes: Processes) -> None:
        self.loader, self.processes = loader, processes
        # A subclass may iterate in its own way, and an IterableDataset has no indices to share.
        by_index = type(loader) is DataLoader and loader.batch_sampler is not None
        self._own = None
        if by_index and not isinstance(loader.dataset, IterableDataset):  # type: ignore[attr-defined]
            self._indices = _SharedIndices(loader.batch_sampler, processes)  # type: ignore[attr-defined]
            options = {name: getattr(loader, name) for name in _KEPT_OPTIONS if hasattr(loader, name)}
            self._own = DataLoader(loader.dataset, batch_sampler=self._indices, **options)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return -(-len(self.loader) // self.processes.count)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        if self._own is None:
            yield from self._from_groups()
            return
        for number, batch in enumerate(self._own):
            yield batch, number not in self._indices.fillers

    def _from_groups(self) -> Iterator[tuple[Any, bool]]:
        batches, count = iter(self.loader), self.processes.count
        while group := list(islice(batches, count)):
            yield (group[self.processes.index], True) if len(group) == count else self._part(group)

    def _part(self, group: list[Any]) -> tuple[Any, bool]:
        try:
            start, end, counts = _bounds(sum(map(_size, group)), self.processes)
            return _cut(group, start, end), counts
        except TypeError as problem:
            raise QakdError(
                f"loader: its last {len(group)} batches cannot be divided among {self.processes.count} processes, because they "
                f"hold more than tensors ({problem}). Give it a length that the number of processes divides, or use a "
                "DataLoader over a map-style data set."
            ) from problem


def shared(loader: Iterable[Any], processes: Processes) -> Shares:
    """The batches that this process works on, each with whether it counts.

    Args:
        loader: as the user passed it. One with a DistributedSampler is shared out already and taken as it is.
        processes: of this run.

    Raises:
        QakdError: accelerate has shared it out: a share of a share would leave most samples out.
    """
    if processes.count > 1 and isinstance(loader, DataLoaderStateMixin):
        raise QakdError(
            "loader (or val_loader) came from accelerator.prepare and is shared out already. Pass the DataLoader that it was "
            "made of: distill shares it out itself, so that no sample is lost and none counts twice."
        )
    if processes.count == 1 or any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(loader)):
        return Whole(loader)
    return Shards(loader, processes)


def held_out(loader: Iterable[Any], processes: Processes, borrowed: Callable[[Any], None]) -> Iterable[Any]:
    """Batches that this process evaluates, as often as it is asked: a share of them where each process gets one, else all.

    Args:
        loader: as the user passed it.
        processes: of this run.
        borrowed: is given, in its turn, a batch that does not count, where all processes call their networks equally often.
    """
    length = length_of(loader)
    divided = length is not None and length >= processes.count
    return _Counting(shared(loader, processes) if divided else Whole(loader), processes, borrowed)


def smallest_batch(loader: Iterable[Any], processes: Processes) -> int | None:
    """Samples in the smallest batch that a process computes on; None where it cannot be known before.

    What is left at the end of a loader makes it, divided among the processes; one that gets nothing borrows a sample.
    """
    if type(loader) is DataLoader and type(loader.batch_sampler) is BatchSampler:
        shared_already = isinstance(loader.sampler, DistributedSampler)
        count, size = 1 if shared_already else processes.count, loader.batch_sampler.batch_size
        samples, drop_last = length_of(loader.sampler), loader.batch_sampler.drop_last
        if samples is None:
            return None
        rest = (samples - samples % size if drop_last else samples) % (size * count)
        return min(size, max(1, rest // count)) if rest else size
    if isinstance(loader, list | tuple) and processes.count == 1:
        try:
            return min(map(_size, loader))
        except TypeError:
            return None
    return None


def require_own_streams(inputs: Inputs, processes: Processes) -> None:
    """Raise QakdError where two processes read the same stream, and would train with each of its batches twice.

    Args:
        inputs: of the first batch of this process.
        processes: of this run; nothing is looked at where there is one.
    """
    if processes.count == 1:
        return
    digest = hashlib.sha256()
    for name, tensor in named_tensors(inputs).items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    found = processes.gather(digest.hexdigest())
    for index, mine in enumerate(found):
        if mine in found[:index]:
            raise QakdError(
                f"loader: processes {found.index(mine)} and {index} of {processes.count} begin with the same batch, and with "
                "steps_per_epoch each reads a stream of its own. Split it by int(os.environ['RANK']) and "
                "int(os.environ['WORLD_SIZE']): itertools.islice(samples, rank, None, count), nodesplitter=wds.split_by_node "
                "of webdataset, or datasets.distributed.split_dataset_by_node."
            )


class _Counting:
    """The batches that count; at their end processes agree, before metrics wait for each other."""

    def __init__(self, shares: Shares, processes: Processes, borrowed: Callable[[Any], None]) -> None:
        self._shares, self._processes, self._borrowed = shares, processes, borrowed

    def __iter__(self) -> Iterator[Any]:
        for batch, counts in self._shares:
            if counts:
                yield batch
            elif self._processes.divide:
                self._borrowed(batch)
        self._processes.agree()


class _SharedIndices:
    """A batch sampler with this process's part of what the first process's draws."""

    def __init__(self, batches: Iterable[Any], processes: Processes) -> None:
        self.batches, self.processes = batches, processes
        self.fillers: set[int] = set()

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes.count)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Any]]:
        drawn = self.processes.on_main(lambda: [list(batch) for batch in self.batches])
        count, index = self.processes.count, self.processes.index
        self.fillers = set()
        for number, start in enumerate(range(0, len(drawn), count)):
            group = drawn[start : start + count]
            if len(group) == count:
                yield group[index]
                continue
            joined = [item for batch in group for item in batch]
            first, end, counts = _bounds(len(joined), self.processes)
            if not counts:
                self.fillers.add(number)
            yield joined[first:end]


def _bounds(size: int, processes: Processes) -> tuple[int, int, bool]:
    """This process's part of so many samples, and whether it is one: if there is none, it borrows the first sample."""
    start, end = (size * number // processes.count for number in (processes.index, processes.index + 1))
    return (start, end, True) if end > start else (0, 1, False)


def _size(batch: Any) -> int:
    """How many samples a batch holds, by the first tensor in it."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
        return _size(batch[0])
    raise TypeError(type(batch).__name__)


def _cut(batches: Sequence[Any], start: int, end: int) -> Any:
    """Samples of batches laid end to end, in the form of a batch. Raises TypeError for a part that is no tensor."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))[start:end]
    if isinstance(first, Mapping):
        return {key: _cut([batch[key] for batch in batches], start, end) for key in first}
    if isinstance(first, tuple | list):
        return [_cut(parts, start, end) for parts in zip(*batches, strict=True)]
    raise TypeError(type(first).__name__)


_KEPT_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
