"""The file at other sizes than those of the example: there a size that is baked into the graph shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...errors import ExportError, ParityError
from ...tasks.inputs import Inputs, call, named_tensors, with_tensors
from ..canonical.graph import batch_symbol, dynamic_sizes
from .programs import InFile, Program, Reference, same
from .recorded_codes import Codes
from .report import Array, deviations, range_of
from .tolerances import LOGIT_TOLERANCE


def check_other_sizes(in_file: InFile, reference: Reference, program: Program) -> None:
    """Run the file for one sample alone (two, where the example is one), then with other dynamic sizes halved or doubled.

    All of it is made of the example's own numbers.

    Args:
        in_file: the file without fusions.
        reference: with the samples that the gate is run on.
        program: what the file did with these.

    Raises:
        ParityError: the file computes something else at other sizes, or for a sample alone than for it in a batch.
        ExportError: the model itself takes no other size of a dimension that is dynamic in the file.
    """
    reference = replace(reference, ranges=[range_of(output) for output in program.outputs])
    sizes = dynamic_sizes(in_file.file.graph)
    batch = batch_symbol(in_file.file.graph)
    other = reference.samples
    if batch is not None:
        count = _size(reference.samples, sizes, batch)
        other = _changed(reference.samples, sizes, {batch: 1}) if count > 1 else _with_half(reference.samples, sizes, batch)
        few, at = replace(reference, samples=other), f" for {'one sample' if count > 1 else 'two samples'}"
        found = in_file.run(other, at)
        same(few, found)
        if count > 1:
            _check_alone(few, found, program, count)
        else:
            _check_alone(reference, program, found, 2)
    symbols = {symbol for of in sizes for symbol in of.values()} - {batch}
    if symbols:
        at, other = _resized(reference, other, sizes, sorted(symbols))
        same(replace(reference, samples=other), in_file.run(other, f" at {at}"))


def _check_alone(alone: Reference, single: Program, whole: Program, count: int) -> None:
    """What the file computes for a sample alone is what it computes for it as the first of a batch of ``count``."""
    names, pairs, ranges = [], [], []
    for name, one, many in zip(alone.output_names, single.outputs, whole.outputs, strict=True):
        first = None if one.shape == many.shape else _first(many, one.shape, count)
        if first is not None:  # else a number for the whole batch, or one for each pair of samples
            names.append(name)
            pairs.append((one, first))
            ranges.append(range_of(many))
    found = deviations([one for one, _ in pairs], [first for _, first in pairs], ranges=ranges)
    if all(deviation <= LOGIT_TOLERANCE for deviation in found):
        return
    codes = _first_codes(whole.codes, single.codes, count)
    worst = int(np.argmax(found))
    if codes is not None:  # ties may have been settled otherwise
        outputs = [
            first if (first := _first(many, one.shape, count)) is not None else one
            for one, many in zip(single.outputs, whole.outputs, strict=True)
        ]
        try:
            same(
                alone,
                replace(whole, name=f"the exported file, for a sample in a batch of {count}", outputs=outputs, codes=codes),
            )
        except ParityError as error:
            raise ParityError(
                _ALONE.format(layer=error.layer, count=count, deviation=found[worst], output=names[worst]), error.layer
            ) from error
        return
    raise ParityError(_ALONE.format(layer=names[worst], count=count, deviation=found[worst], output=names[worst]), names[worst])


_ALONE = (
    "{layer}: for a sample alone the file computes something else than for it in a batch of {count}: {output} differs by "
    "{deviation:.2g} of its range. Something in the model looks at the whole batch (normalization without running statistics). "
    "Replace it, or export with dynamic={{}} for batches of exactly this size."
)


def _first(array: Array, shape: tuple[int, ...], count: int) -> Array | None:
    """The first sample's part of what a batch gave, where that has ``count`` times the size along one dimension."""
    if array.shape == shape:
        return array
    axes = [axis for axis, size in enumerate(array.shape) if len(shape) == array.ndim and size != shape[axis]]
    if len(axes) != 1 or array.shape[axes[0]] != count * shape[axes[0]]:
        return None
    return np.take(array, range(shape[axes[0]]), axis=axes[0])


def _first_codes(codes: Codes, alone: Codes, count: int) -> Codes | None:
    found: Codes = {}
    for name, calls in codes.items():
        firsts = [_first(many, one.shape, count) for many, one in zip(calls, alone[name], strict=True)]
        if any(first is None for first in firsts):
            return None
        found[name] = [first for first in firsts if first is not None]
    return found


_Sizes = Sequence[Mapping[int, str]]
"""Dynamic dimensions of each input."""


def _size(samples: Inputs, sizes: _Sizes, symbol: str) -> int:
    return next(
        tensor.shape[dimension]
        for tensor, of in zip(named_tensors(samples).values(), sizes, strict=True)
        for dimension, name in of.items()
        if name == symbol
    )


def _changed(samples: Inputs, sizes: _Sizes, wanted: Mapping[str, int]) -> Inputs:
    """The samples with other sizes: cut, or repeated."""

    def changed(tensor: Tensor, of: Mapping[int, str]) -> Tensor:
        for dimension, symbol in of.items():
            if symbol in wanted:
                repeats = -(-wanted[symbol] // tensor.shape[dimension])
                tensor = torch.cat([tensor] * repeats, dimension).narrow(dimension, 0, wanted[symbol])
        return tensor.contiguous()

    return with_tensors(samples, list(map(changed, named_tensors(samples).values(), sizes)))


def _with_half(sample: Inputs, sizes: _Sizes, batch: str) -> Inputs:
    """A batch of the sample and of half its floats: statistics of a batch of equal samples would be those of one."""

    def doubled(tensor: Tensor, of: Mapping[int, str]) -> Tensor:
        second = tensor / 2 if tensor.is_floating_point() else tensor
        dimension = next((dimension for dimension, symbol in of.items() if symbol == batch), None)
        return tensor if dimension is None else torch.cat([tensor, second], dimension)

    return with_tensors(sample, list(map(doubled, named_tensors(sample).values(), sizes)))


def _resized(reference: Reference, samples: Inputs, sizes: _Sizes, symbols: Sequence[str]) -> tuple[str, Inputs]:
    """Samples with all further dynamic sizes halved, or else doubled, where the model takes these."""
    now = {symbol: _size(samples, sizes, symbol) for symbol in symbols}
    problem = ""
    for wanted in ({s: size // 2 for s, size in now.items()}, {s: 2 * size for s, size in now.items()}):
        at = ", ".join(f"{symbol}={size}" for symbol, size in wanted.items())
        changed = _changed(samples, sizes, wanted)
        try:
            with torch.no_grad():
                call(reference.form, changed)
        except Exception as error:  # noqa: BLE001 - the user's own code
            problem = f"{at}: {' '.join(str(error).split())[:150] or type(error).__name__}"
            continue
        return at, changed
    raise ExportError(
        f"dynamic: the model takes {' and '.join(symbols)} neither half nor twice as large as in example_inputs ({problem}), "
        f"so no other size can be proven. Leave {symbols[0]!r} out of dynamic, or pass an example whose half is a valid size."
    )
