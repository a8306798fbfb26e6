"""Which changes make a file faster on this machine: found by profiles, and by measuring whole files."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from ..._common.cpu_features import has_bfloat16
from ...errors import ParityError
from ..canonical.graph import only_consumer
from .grids import LAYERS, Finer, Grid, floats_of, grids_of, halvable, made_finer
from .proof import TuningProof, check_finer, check_same_bits
from .space_to_depth import blockable_layers, in_blocks
from .timing import Inputs, Variant, Variants
from .zero_point import eligible_layers, with_weight_zero_point

_log = logging.getLogger(__name__)

ROUNDS = 3
"""Of proposals: changes that gain nothing alone may gain beside those that were kept."""

AT_ONCE = 5
"""Variants that are loaded at the same time, beside what they are compared with."""


PARTS = 24
"""Groups of quantizers that a round tries, those first that save most by the times of single layers."""

_FUSED = ("Add", "Clip", "LeakyRelu", "Relu")
_PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """A variant of the file.

    Attributes:
        finer: quantizers that are left out, or on half their step.
        shifted: convolutions whose weights have a zero point of -1.
        blocked: convolutions that read blocks of pixels.
        precision: of what is not quantized.
    """

    finer: Finer = field(default_factory=Finer)
    shifted: frozenset[str] = frozenset()
    blocked: frozenset[str] = frozenset()
    precision: str = "float32"

    def __or__(self, other: Choice) -> Choice:
        """Both changes."""
        finer = Finer(self.finer.unrounded | other.finer.unrounded, self.finer.halved | other.finer.halved)
        precision = max(self.precision, other.precision, key=_PRECISIONS.index)
        return Choice(finer, self.shifted | other.shifted, self.blocked | other.blocked, precision)


@dataclass
class Search:
    """A search for faster variants of a file.

    Args:
        model: as it was exported.
        runtime: what variants run in.
        batches: inputs, by name.
        calls: timed calls of each variant that decides.
        minimum_gain: least share of the time that a change must save.
        exact: only what leaves every bit of the outputs as it is.
    """

    model: ir.Model
    runtime: Variants
    batches: Sequence[Inputs]
    calls: int
    minimum_gain: float
    exact: bool
    closest: Choice = field(default_factory=Choice)
    """The fastest variant that does not gain enough."""

    _refused: set[Choice] = field(default_factory=set)
    _proofs: dict[Choice, TuningProof] = field(default_factory=dict)

    @cached_property
    def eligible(self) -> tuple[str, ...]:
        """Convolutions whose weights can have a zero point of -1: in ONNX Runtime."""
        return eligible_layers(self.model) if self.runtime.runtime == "onnxruntime" else ()

    @cached_property
    def blockable(self) -> tuple[str, ...]:
        """Convolutions that can read blocks of pixels: in ONNX Runtime."""
        return blockable_layers(self.model) if self.runtime.runtime == "onnxruntime" else ()

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Grids that can be made finer."""
        return () if self.exact else grids_of(self.model)

    def made(self, choice: Choice) -> ir.Model:
        """The graph of a choice."""
        model = made_finer(self.model, choice.finer, self.runtime.runtime)
        if blocked := choice.blocked.intersection(blockable_layers(model)):
            model = in_blocks(model, blocked)
        return with_weight_zero_point(model, choice.shifted.intersection(eligible_layers(model))) if choice.shifted else model

    def variant(self, choice: Choice) -> Variant:
        """The file of a choice."""
        return Variant(self.runtime.serialized(self.made(choice)), choice.precision)

    def compare(self, choice: Choice) -> tuple[float, float]:
        """Time of the file as it was given and of a choice, milliseconds, from a run of their own."""
        plain, changed = self._times([Choice(), choice], self.calls)
        return plain, changed

    def best(self) -> Choice | None:
        """The fastest choice that was found and proven; None where nothing gains.

        Each change must gain the minimum over what it was made from.
        """
        choice = Choice()
        for _ in range(ROUNDS):
            better = self._better(choice)
            if better == choice:
                break
            choice = better
        return None if choice == Choice() else choice

    def prove(self, choice: Choice) -> TuningProof:
        """Show, once, that a choice computes what it should.

        Raises:
            ParityError: it does not.
        """
        if choice not in self._proofs:
            self._proofs[choice] = self._proof(choice)
        return self._proofs[choice]

    def _proof(self, choice: Choice) -> TuningProof:
        data = self.variant(choice)
        if choice.shifted:
            without = self.variant(replace(choice, shifted=frozenset()))
            check_same_bits(self.runtime, without.data, data.data, self.batches, fusions=(False, True))
        if choice.blocked:  # operator by operator, floats are added in another order
            without = self.variant(replace(choice, blocked=frozenset()))
            check_same_bits(self.runtime, without.data, data.data, self.batches, fusions=(True,))
        if (choice.finer, choice.precision) == (Finer(), "float32"):
            return TuningProof(True, 0, 0.0, None, None, sum(len(next(iter(batch.values()))) for batch in self.batches))
        return check_finer(self.model, choice.finer, data, self.runtime, self.batches)

    def _better(self, choice: Choice) -> Choice:
        """The best of what a round of proposals, and what they make together, gain on a choice."""
        proposals = list(dict.fromkeys(one for one in self._proposals(choice) if one not in {choice, *self._refused}))
        gains: dict[Choice, float] = {}
        for some in _chunks(proposals):
            base, *times = self._times([choice, *some], max(self.calls // 4, 5))
            gains |= {one: 1 - time / base for one, time in zip(some, times, strict=True)}
        self._refused.update(one for one, gain in gains.items() if gain < -self.minimum_gain)
        ranked = sorted(gains, key=gains.__getitem__, reverse=True)
        together = list(dict.fromkeys(itertools.accumulate((one for one in ranked if gains[one] > 0), Choice.__or__)))
        return self._fastest(choice, list(dict.fromkeys([*ranked[:1], *_some(together)])))

    def _fastest(self, choice: Choice, others: Sequence[Choice]) -> Choice:
        """The fastest of others that gains enough, and can be proven; else the choice itself."""
        gains: dict[Choice, float] = {}
        for some in _chunks(others):
            base, *times = self._times([choice, *some], self.calls)
            gains |= {one: 1 - time / base for one, time in zip(some, times, strict=True)}
        for one in sorted(others, key=gains.__getitem__, reverse=True):
            if gains[one] < self.minimum_gain:
                self.closest = one if choice == Choice() else self.closest
                break
            try:
                self.prove(one)
            except ParityError as error:
                _log.warning("a faster variant is not taken: %s", error)
                continue
            return one
        return choice

    def _times(self, choices: Iterable[Choice], calls: int) -> list[float]:
        return self.runtime.interleaved([self.variant(one) for one in choices], self.batches, calls)

    def _proposals(self, choice: Choice) -> Iterator[Choice]:
        """Changes of a choice that may gain, by the times of its layers and of those that they become."""
        before = self._layer_times(choice)
        if self.eligible and not choice.shifted:
            shifted = replace(choice, shifted=frozenset(self.eligible))
            after = self._layer_times(shifted)
            faster = frozenset(name for name in self.eligible if after.get(name, np.inf) < before.get(name, np.inf))
            yield from (shifted, replace(choice, shifted=faster))
        if self.blockable and not choice.blocked:
            yield replace(choice, blocked=frozenset(self.blockable))
        if not self.grids:
            return
        if self.runtime.runtime == "openvino" and has_bfloat16():
            yield replace(choice, precision="bfloat16")  # where no sum is computed in floating point it may gain nothing yet
        halved = Finer(choice.finer.unrounded, halvable(self.model, self.runtime.runtime))
        yield replace(choice, finer=halved)
        left = [index for index in range(len(self.grids)) if index not in choice.finer.unrounded]
        everything = replace(choice, finer=Finer(choice.finer.unrounded | set(left), choice.finer.halved))
        after = self._layer_times(everything)
        free = tuple(index for index in left if not floats_of([self.grids[index]], self.runtime.runtime))
        parts = [*_parts(tuple(left)), *([free] if free else [])]  # sums alone read those: no layer leaves its integers
        savings = {part: self._saving(part, before, after) for part in parts}
        likely = sorted((part for part in savings if savings[part] > 0), key=savings.__getitem__, reverse=True)
        for part in likely[:PARTS]:
            yield replace(choice, finer=Finer(choice.finer.unrounded | set(part), choice.finer.halved))

    def _layer_times(self, choice: Choice) -> dict[str, float]:
        """By the layers' names; what a runtime fuses into a layer may give its own to both."""
        model = self.made(choice)
        names = {fused: str(node.name) for node in model.graph if node.op_type in LAYERS for fused in _names(node)}
        times: dict[str, float] = {}
        variant = Variant(self.runtime.serialized(model), choice.precision)
        for name, time in self.runtime.layer_times(variant, self.batches[0]).items():
            known = names.get(name, name)
            times[known] = times.get(known, 0.0) + time
        return times

    def _saving(self, part: Sequence[int], before: Mapping[str, float], after: Mapping[str, float]) -> float:
        """At most, milliseconds, where grids are left out: what their layers cost less in floating point, and what is done
        between layers. By how much less of the latter nobody knows beforehand."""
        names = {node.name for node in floats_of([self.grids[index] for index in part], self.runtime.runtime)}
        layers = {node.name for node in self.model.graph if node.op_type in LAYERS}
        between = sum(time for name, time in before.items() if name not in layers)
        return between + sum(before.get(str(name), 0.0) - after.get(str(name), 0.0) for name in names)


def _names(layer: ir.Node) -> Iterator[str]:
    """What runtimes call a layer, with what they fuse into it."""
    node: ir.Node | None = layer
    while node is not None and node.op_type in (*LAYERS, *_FUSED):
        for name in (str(node.name), str(node.outputs[0].name)):
            yield from (name, f"{name}_nchwc", f"{name}/WithoutBiases")
        node = only_consumer(node.outputs[0])


def _chunks(choices: Sequence[Choice], size: int = AT_ONCE) -> Iterator[Sequence[Choice]]:
    return (choices[start : start + size] for start in range(0, len(choices), size))


def _parts(indices: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All, and halves of them, down to single ones."""
    if indices:
        yield indices
    if len(indices) > 1:
        middle = len(indices) // 2
        yield from _parts(indices[:middle])
        yield from _parts(indices[middle:])


def _some(choices: Sequence[Choice]) -> list[Choice]:
    """The first two, every second power of two, and the last: a whole file is loaded for each."""
    places = sorted({index for power in range(1, 12, 2) if (index := 2**power - 1) < len(choices)} | {len(choices) - 1} - {-1})
    return [choices[index] for index in places]
