"""Which data a loader yields, told by a look at two samples: so that a run goes on with the data that it began with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .._common.rng_state import generators_of, samplers_of, undisturbed
from .facts import facts, plain


@dataclass(frozen=True)
class DataFacts:
    """What a loader says of itself, a line each.

    Attributes:
        data: the number of samples, and what the first and the last are.
        batches: how samples become batches.
        draws: whether a sample, or putting samples together, draws from a source of randomness.
    """

    data: list[str]
    batches: list[str]
    draws: bool


def data_facts(loader: Iterable[Any]) -> DataFacts:
    """Look at a loader; draws nothing from training.

    Samples are read where training reads them, in a worker or here, after the global generators were seeded: what an
    augmentation in the data set draws is the same each time. What cannot be read alone is represented by the reason.
    """
    with undisturbed(generators_of(loader)):
        first, second = _read_twice(loader)
    data = first[0] if first[0] == second[0] else ["not the same when it is read again"]
    dataset = loader.dataset if isinstance(loader, DataLoader) else loader
    size = [f"samples = {len(dataset)}"] if isinstance(dataset, Sized) else []
    return DataFacts(size + data, _batching(loader), first[1] or first[0] != second[0])


def hidden_state(loader: Iterable[Any], seen: DataFacts) -> str | None:
    """Why a run with this loader cannot go on bit-identically, if it cannot, and what to do.

    Args:
        loader: of training.
        seen: of it.
    """
    if not (getattr(loader, "persistent_workers", False) and seen.draws):
        return None
    return (
        "loader: persistent_workers=True keeps the generators of its workers from one epoch to the next, its samples draw from "
        "them, and no checkpoint holds them. Pass persistent_workers=False for a run that goes on bit-identically, or "
        'resume="force" to go on with other draws'
    )


class _Seeded(Dataset[tuple[list[str], bool]]):
    """The first and the last sample of a data set as a batch: what it is, and whether it drew."""

    def __init__(self, samples: Any, collate: Any, together: bool) -> None:
        self.samples, self.collate, self.together = samples, collate, together

    def __getitem__(self, _: int) -> tuple[list[str], bool]:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global generator is what data sets may draw from
        random.seed(0)
        before = _drawn()
        try:
            found = facts(self._read([0, len(self.samples) - 1]), "samples")
        except Exception as problem:  # noqa: BLE001 - of the user's code; training may never read these samples
            return [f"cannot be read alone ({type(problem).__name__})"], True
        return found, before != _drawn()

    def _read(self, indices: list[int]) -> Any:
        if not self.together:
            return [self.collate(self.samples[index]) for index in indices]
        if callable(several := getattr(self.samples, "__getitems__", None)):
            return self.collate(several(indices))
        return self.collate([self.samples[index] for index in indices])


def _read_twice(loader: Iterable[Any]) -> list[tuple[list[str], bool]]:
    if not isinstance(loader, DataLoader):
        if not (hasattr(loader, "__getitem__") and isinstance(loader, Sized)):
            return 2 * [(["cannot be indexed"], False)]
        probe = _Seeded(loader, _unchanged, together=False)
        return [probe[0], probe[0]]
    probe = _Seeded(loader.dataset, loader.collate_fn, together=loader.batch_sampler is not None)
    if not loader.num_workers:
        return [probe[0], probe[0]]
    # A data set that opens a file when it is first read must not do so here: its workers would share what is open.
    reader = DataLoader(
        probe,
        batch_size=None,
        sampler=[0, 0],
        num_workers=1,
        collate_fn=_unchanged,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    try:
        return [*reader]
    except Exception as problem:  # noqa: BLE001 - as above, of a worker
        return 2 * [([f"cannot be read alone ({type(problem).__name__})"], True)]


def _unchanged(value: Any) -> Any:
    return value


def _drawn() -> tuple[Any, ...]:
    """Where the global generators stand."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - as above
    return torch.get_rng_state().numpy().tobytes(), numpy_state[1].tobytes(), numpy_state[2:], random.getstate()


_OF_SAMPLERS = (
    "replacement",
    "num_samples",
    "batch_size",
    "drop_last",
    "shuffle",
    "seed",
    "num_replicas",
    "weights",
    "indices",
)
"""What torch's samplers are made with. Others may count what they have yielded, which is another number each time."""


def _batching(loader: Iterable[Any]) -> list[str]:
    owners = [("loader", loader), *((f"sampler {index}", sampler) for index, sampler in enumerate(samplers_of(loader)))]
    found = [f"workers = {getattr(loader, 'num_workers', 0)}", f"generators = {len(generators_of(loader))}"]
    for name, owner in owners:
        found.append(f"{name} = {type(owner).__qualname__}")
        for attribute in _OF_SAMPLERS:
            value = getattr(owner, attribute, None)
            value = torch.tensor(value) if _are_numbers(value) else value
            if value is not None and (line := plain(value)) is not None:
                found.append(f"{name}.{attribute} = {line}")
    return found


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(item) in (int, float) for item in value)
