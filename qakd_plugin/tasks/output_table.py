"""What a network outputs, as a table that says with what each output would be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .._common.precision import dtype_name
from ..errors import QakdError
from .inputs import Inputs, arguments
from .matchers import Matcher
from .matching import default_match, suggestion
from .outputs import frozen_output, named_outputs


@dataclass(frozen=True)
class OutputLine:
    """One output of a network.

    Attributes:
        name: its path.
        shape: of the example.
        dtype: likewise.
        matched: with what it would be compared by default, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matched: Matcher | None


class OutputTable(tuple[OutputLine, ...]):
    """What a network outputs; prints as a table, with the line to write where no default exists."""

    hint: str | None

    def __new__(cls, lines: list[OutputLine], hint: str | None) -> OutputTable:
        table = super().__new__(cls, lines)
        table.hint = hint
        return table

    def __str__(self) -> str:
        width = max([len("output"), *(len(line.name) for line in self)])
        rows = [f"{'output':{width}}  {'shape':20}  {'dtype':10}  matched by default"]
        for line in self:
            dtype = dtype_name(line.dtype)
            rows.append(f"{line.name:{width}}  {line.shape!s:20}  {dtype:10}  {line.matched or ''}".rstrip())
        return "\n".join([*rows, *([f"no default: {self.hint}"] if self.hint else [])])


def outputs_of(model: nn.Module, inputs: Inputs) -> OutputTable:
    """What a network outputs in eval mode: names, shapes, dtypes, and with what each would be compared by default.

    Args:
        model: any network.
        inputs: a batch: a tensor, a tuple of positional arguments or a mapping of keywords.

    Returns:
        A table: print it. ``table.hint`` is the line to write where there is no default.
    """
    args, kwargs = arguments(inputs)
    found = named_outputs(frozen_output(model, *args, **kwargs))
    hint = None
    try:
        match = default_match(found, inputs)
    except QakdError:
        match, hint = {}, suggestion(found)
    lines = [OutputLine(name, tuple(tensor.shape), tensor.dtype, match.get(name)) for name, tensor in found.items()]
    return OutputTable(lines, hint)
