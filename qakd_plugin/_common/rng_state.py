"""Sources of randomness that training may draw from: saved in checkpoints, and put back after work that must leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def samplers_of(loader: Iterable[Any]) -> list[Any]:
    """A loader's samplers and batch samplers, and those that they draw from in turn."""
    found: dict[int, Any] = {}
    owners: list[Any] = [loader]
    for owner in owners:
        for inner in (getattr(owner, "sampler", None), getattr(owner, "batch_sampler", None)):
            if inner is not None and id(inner) not in found:
                found[id(inner)] = inner
                owners.append(inner)
    return list(found.values())


def generators_of(loader: Iterable[Any]) -> list[torch.Generator]:
    """Generators of a loader's own, which its shuffling draws from."""
    owners = (loader, *samplers_of(loader), getattr(loader, "dataset", None))
    found = [generator for owner in owners if isinstance(generator := getattr(owner, "generator", None), torch.Generator)]
    return list({id(generator): generator for generator in found}.values())


def random_state(generators: list[torch.Generator]) -> dict[str, Any]:
    """All sources of randomness that a training step may draw from, as plain data and tensors."""
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - as in restore_random_state
    python_state = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)), *map(float, numpy_state[2:])],
        "python": [python_state[0], list(python_state[1]), python_state[2]],
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: dict[str, Any], generators: list[torch.Generator]) -> None:
    """Undo everything drawn since :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))  # noqa: NPY002 - the global generator is what user code may draw from
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


@contextmanager
def undisturbed(generators: list[torch.Generator]) -> Iterator[None]:
    """Within the block anything may be drawn; afterwards these generators and the global ones are as they were."""
    saved = random_state(generators)
    try:
        yield
    finally:
        restore_random_state(saved, generators)
