"""What a loader yields, as named arrays and targets. Nothing here needs torch, and tensors become arrays all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from .._common.batch_keys import INPUT_KEYS, TARGET_KEYS
from ..errors import QakdError
from ..runtimes.base import Array, Runner

BatchFn: TypeAlias = Callable[[Any], tuple[Any, Any]]
_SAY = "Yield x, (x, y) or a mapping, or pass batch_fn=lambda batch: (inputs, targets)."


@dataclass(frozen=True)
class Samples:
    """Some samples of a loader.

    Attributes:
        inputs: by name, or by position: {"0": ..}.
        targets: as the loader has them; class labels as an array (N,).
        count: how many samples there are.
        per_sample: names of the inputs whose first dimension counts samples; all others go with every sample alike.
    """

    inputs: dict[str, Array]
    targets: Any
    count: int
    per_sample: frozenset[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one sample, and of what goes with all."""
        return {name: array.shape[name in self.per_sample :] for name, array in self.inputs.items()}

    def rows(self, start: int, stop: int) -> Samples:
        """A part of them, with labels."""
        inputs = {name: array[start:stop] if name in self.per_sample else array for name, array in self.inputs.items()}
        labels = self.targets[start:stop] if isinstance(self.targets, np.ndarray) else None
        return Samples(inputs, labels, min(stop, self.count) - start, self.per_sample)

    def filled(self, size: int) -> dict[str, Array]:
        """Inputs of ``size`` samples: the last one repeated."""
        missing = size - self.count
        if missing <= 0:
            return self.inputs
        return {
            name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if name in self.per_sample else array
            for name, array in self.inputs.items()
        }

    def contiguous(self) -> Samples:
        """The same, each input in one piece of memory."""
        return replace(self, inputs={name: np.ascontiguousarray(array) for name, array in self.inputs.items()})

    def repeated(self, size: int) -> Samples:
        """At least ``size`` samples, the same ones again and again."""
        times = -(-size // self.count)
        return self if times == 1 else joined([self] * times)


def joined(parts: Sequence[Samples]) -> Samples:
    """Samples of one shape, one after the other.

    Raises:
        QakdError: an input without a batch dimension differs between them.
    """
    first = parts[0]
    for name in first.inputs.keys() - first.per_sample:
        if not all(np.array_equal(part.inputs[name], first.inputs[name]) for part in parts[1:]):
            raise QakdError(f"loader: the input {name!r} has no batch dimension, and differs between batches. Give it one.")
    inputs = {
        name: np.concatenate([part.inputs[name] for part in parts]) if name in first.per_sample else array
        for name, array in first.inputs.items()
    }
    labels = None if first.targets is None else np.concatenate([part.targets for part in parts])
    return Samples(inputs, labels, sum(part.count for part in parts), first.per_sample)


class Reader:
    """Splits what a loader yields, and knows what each runner takes of it.

    Args:
        batch_fn: splits a batch into inputs (an array, a tuple by position, a mapping by name) and targets; None for x, (x, y),
            and mappings, of which a runner takes what it has inputs for, and the usual keys are targets.
        runners: that will compute.
    """

    def __init__(self, batch_fn: BatchFn | None, runners: Sequence[Runner]) -> None:
        self._batch_fn = batch_fn
        self._names = [set(runner.inputs) for runner in runners]
        self._alike = {name for runner in runners for name in _without_batch(runner)}

    def split(self, batch: Any) -> Samples:
        """Inputs as arrays, targets as they are.

        Raises:
            QakdError: no inputs are found, or they cannot be read as arrays.
        """
        inputs, targets = self._default(batch) if self._batch_fn is None else _pair(self._batch_fn(batch))
        arrays = {name: _array(value) for name, value in _named(inputs).items()}
        sized = [name for name, array in arrays.items() if array.ndim and name not in self._alike]
        if not sized:
            raise QakdError(f"loader: a batch holds no array with a batch dimension. {_SAY}")
        count = len(arrays[sized[0]])
        return Samples(arrays, targets, count, frozenset(name for name in sized if len(arrays[name]) == count))

    def feed(self, runner: Runner, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What a runner takes, in its own names and types.

        Raises:
            QakdError: that is not there, or does not fit.
        """
        if self._batch_fn is None and not _by_position(inputs):
            known = {name: array for name, array in inputs.items() if name in runner.inputs}
            first = next((inputs[key] for key in INPUT_KEYS if key in inputs), None)
            inputs = known or (inputs if first is None else {"0": first})
        return runner.fit(inputs)

    def _default(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            return self._chosen(batch), next((batch[key] for key in TARGET_KEYS if key in batch), None)
        if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch):
            if isinstance(batch[0], Mapping):
                raise QakdError(f"loader: cannot find the inputs in a batch that begins with a mapping. {_SAY}")
            return (batch[0],), batch[1] if len(batch) > 1 else None
        if not hasattr(batch, "__array__"):
            raise QakdError(f"loader: cannot find the inputs in a batch of type {type(batch).__name__}. {_SAY}")
        return (batch,), None

    def _chosen(self, batch: Mapping[Any, Any]) -> dict[str, Any]:
        """What the runners have inputs for, and one of the usual keys for those that have none of these names."""
        known = {str(key) for key in batch} - {*TARGET_KEYS}
        wanted = {name for names in self._names for name in names & known}
        if not wanted or not all(names & known for names in self._names):
            wanted |= set(next(([key] for key in INPUT_KEYS if key in known), []))
        if not wanted:
            names = ", ".join(sorted({name for names in self._names for name in names}))
            raise QakdError(f"loader: a batch has the keys {sorted(map(str, batch))}, and the inputs are {names}. {_SAY}")
        return {str(key): value for key, value in batch.items() if str(key) in wanted}


class Pool:
    """The first samples of one shape, for calls that are timed.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self._size, self._kept = size, list[Samples]()

    def add(self, samples: Samples) -> None:
        """Keep them, while there are too few, if they have the shape of the first."""
        if sum(part.count for part in self._kept) < self._size and (
            not self._kept or (samples.shapes, samples.per_sample) == (self._kept[0].shapes, self._kept[0].per_sample)
        ):
            self._kept.append(replace(samples, targets=None))

    def samples(self) -> Samples:
        """At most ``size`` of them; at least one was added."""
        return joined(self._kept).rows(0, self._size)


def blocks(parts: Iterable[Samples], size: int) -> Iterator[Samples]:
    """The same samples, with labels, in blocks of ``size``; smaller ones at the end and where the shape changes."""
    waiting: list[Samples] = []
    for part in parts:
        if waiting and (part.shapes, part.per_sample) != (waiting[0].shapes, waiting[0].per_sample):
            yield joined(waiting)
            waiting = []
        waiting.append(part)
        count = sum(each.count for each in waiting)
        if count < size:
            continue
        whole = joined(waiting)
        rest = count - count % size
        for start in range(0, rest, size):
            yield whole.rows(start, start + size)
        waiting = [whole.rows(rest, count)] if rest < count else []
    if waiting:
        yield joined(waiting)


def _without_batch(runner: Runner) -> set[str]:
    """Names of inputs with a fixed first size where others of the file leave theirs open, and of numbers; positions as well."""
    shapes = [(index, name, spec.shape) for index, (name, spec) in enumerate(runner.inputs.items())]
    some_open = any(shape and shape[0] is None for _, _, shape in shapes)
    alike = [
        (str(index), name) for index, name, shape in shapes if shape == () or (shape and some_open and shape[0] is not None)
    ]
    return {key for keys in alike for key in keys}


def _pair(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise QakdError(f"batch_fn must return (inputs, targets), got {type(found).__name__}.")
    return found


def _named(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        return {str(key): value for key, value in inputs.items()}
    if isinstance(inputs, list):
        raise QakdError("batch_fn: inputs are a list, which files do not take. Return an array, a tuple, or a mapping by name.")
    return {str(index): value for index, value in enumerate(inputs if isinstance(inputs, tuple) else (inputs,))}


def _by_position(inputs: Mapping[str, Array]) -> bool:
    return list(inputs) == [str(index) for index in range(len(inputs))]


def _array(value: Any) -> Array:
    """Floats in 32 bits, everything else as it is."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a GPU or with gradients
        raise QakdError(
            f"loader: a batch cannot be read as arrays ({str(error)[:200]}). Yield arrays, or tensors on the CPU."
        ) from error
    if array.dtype.kind not in "fiub":
        raise QakdError(f"loader: a batch cannot be read as arrays of numbers: it holds {type(value).__name__}. {_SAY}")
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
