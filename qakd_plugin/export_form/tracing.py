"""Tracing with torch.export: whether a model can be exported, and the first step of exporting it."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._common.module_copy import has_hooks
from .._common.silenced import silenced
from ..errors import ExportError
from ..tasks.inputs import Inputs, arguments, call, named_inputs, runs_on_one_sample
from ..tasks.outputs import named_outputs

Dynamic: TypeAlias = Mapping[str, Mapping[int, str]]
"""By input, the dimensions that may have another size than in the example, with a name for each: what has one name has one
size."""

BATCH = "batch"
"""Name of the dimension that is dynamic without being asked for."""

_NETWORK = "_traced_network"
"""Where the traced module keeps the model, in the path of each of its parameters and nodes."""


@dataclass(frozen=True)
class Traced:
    """A model as torch.export sees it.

    Attributes:
        program: tensors in, tensors out; parameters and nodes have the names that they have in the model.
        inputs: names of what goes in, in order.
        outputs: names of what comes out, in order.
        symbols: what torch calls a dynamic size -> its name; empty where the batch of a single tensor is the only one.
        fixed: a line for each dimension that would be dynamic, had the model not fixed it.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    symbols: Mapping[str, str]
    fixed: tuple[str, ...]


def trace(
    model: nn.Module,
    example: Inputs,
    dynamic: Dynamic | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Traced:
    """The graph of a model in eval mode, for any batch size where the model takes any.

    Args:
        model: any network.
        example: a tensor, a tuple of positional arguments or a mapping of keywords.
        dynamic: dimensions beside the batch that are dynamic; empty for none at all, not even the batch.
        input_names: in the place of the names that ``forward`` gives.
        output_names: in the place of the paths of outputs.

    Raises:
        ExportError: torch.export cannot trace it, ``forward`` fixes a dimension that was asked for, or names do not fit.
    """
    own = named_inputs(model, example)
    inputs = _names("input_names", input_names, list(own))
    tensors = dict(zip(inputs, own.values(), strict=True))
    output = _output(model, example)
    named = named_outputs(output)
    outputs = _names("output_names", output_names, list(named))
    if both := sorted(set(inputs) & set(outputs)):
        raise ExportError(
            f"{both[0]!r} is the name of an input and of an output. Pass output_names=[...], {len(outputs)} names."
        )
    dimensions = _dimensions(example, tensors, dynamic)
    # One tensor in, and a tree of tensors out that torch.export knows: it needs no wrapper. Of a GraphModule it reads the graph
    # alone, not the hooks around it.
    leaves = tree_leaves(output)
    plain = isinstance(example, Tensor) and len(leaves) == len(named) and all(map(operator.is_, leaves, named.values()))
    plain = plain and not (isinstance(model, torch.fx.GraphModule) and has_hooks(model))
    program, left, fixed = _traced(model if plain else _Flat(model, example), tensors, dimensions)
    if not plain:
        _drop_wrapper(program)
        _check_read(program, inputs)
    symbols = _symbols(program, inputs, left)
    only_batch = plain and set(symbols.values()) <= {BATCH}
    return Traced(program, tuple(inputs), tuple(outputs), {} if only_batch else symbols, fixed)


class _Flat(nn.Module):
    """A network that takes its tensors one after the other, and returns those of its output likewise."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self._traced_network = network
        leaves, self._structure = tree_flatten(arguments(inputs))
        self._leaves = [_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        following = iter(tensors)
        leaves = [next(following) if leaf is _PLACE else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        outputs: list[Tensor] = []
        for tensor in named_outputs(self._traced_network(*args, **kwargs)).values():
            seen = any(tensor is other for other in (*tensors, *outputs))
            outputs.append(tensor.clone() if seen else tensor)  # a file cannot give one value two names
        return tuple(outputs)


_PLACE = object()
"""Where a tensor goes among arguments."""


_Dimensions: TypeAlias = dict[str, dict[int, str]]
"""Names of dynamic dimensions, by input."""


def _output(model: nn.Module, example: Inputs) -> Any:
    try:
        with torch.no_grad():
            output = call(model, example)
    except Exception as error:
        raise ExportError(
            f"the model cannot be called with example_inputs ({type(error).__name__}: {first_line(error)}). Pass a batch as "
            "the loader yields it."
        ) from error
    if not named_outputs(output):
        raise ExportError(f"the model returns {type(output).__name__} without a tensor: there is nothing to export.")
    return output


def _names(argument: str, given: Sequence[str] | None, own: list[str]) -> list[str]:
    """The names that were given, else the model's own.

    Raises:
        ExportError: they are too few, too many, not unique or no names.
    """
    if given is None:
        return own
    names = [given] if isinstance(given, str) else list(given)
    kind = argument.removesuffix("_names")
    if len(names) != len(own):
        raise ExportError(
            f"{argument}={names}: the model has {len(own)} {kind}{'s' * (len(own) > 1)}, {', '.join(own)}. Give each a name."
        )
    if wrong := next((name for name in names if not isinstance(name, str) or not name or names.count(name) > 1), None):
        raise ExportError(f"{argument}={names}: {wrong!r} is there twice, or no text. Give each {kind} a name of its own.")
    return names


def _dimensions(example: Inputs, tensors: Mapping[str, Tensor], dynamic: Dynamic | None) -> _Dimensions:
    """What shall be dynamic.

    Raises:
        ExportError: ``dynamic`` names an input or dimension that is not there, or sizes that contradict each other.
    """
    if dynamic is not None and not dynamic:
        return {name: {} for name in tensors}
    found: _Dimensions = {name: {} for name in tensors}
    batch = 0 if isinstance(example, list) else _batch(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim and len(tensor) == batch:
            found[name][0] = BATCH
    for name, asked in (dynamic or {}).items():
        if name not in tensors:
            raise ExportError(
                f"dynamic={dict(dynamic or {})}: there is no input {name!r}, the inputs are {', '.join(tensors)}. Name one of "
                "them."
            )
        for dimension, symbol in asked.items():
            _check_asked(name, tensors[name], dimension, symbol)
            found[name][dimension] = symbol
    sizes: dict[str, tuple[int, str]] = {}
    for name, of in found.items():
        for dimension, symbol in of.items():
            size, place = tensors[name].shape[dimension], f"dimension {dimension} of {name!r}"
            known, before = sizes.setdefault(symbol, (size, place))
            if size != known:
                raise ExportError(
                    f"dynamic: {before} and {place} both have the name {symbol!r}, but sizes {known} and {size} in "
                    "example_inputs. Give them different names."
                )
    return found


def _batch(tensors: Mapping[str, Tensor]) -> int:
    return next((len(tensor) for tensor in tensors.values() if tensor.ndim), 0)


def _check_asked(name: str, tensor: Tensor, dimension: object, symbol: object) -> None:
    if not isinstance(dimension, int) or not 0 <= dimension < tensor.ndim:
        raise ExportError(
            f"dynamic: {name!r} has no dimension {dimension!r}, its shape is {tuple(tensor.shape)}. Write "
            f'dynamic={{"{name}": {{{max(tensor.ndim - 1, 0)}: "length"}}}}.'
        )
    if not isinstance(symbol, str) or not symbol.isidentifier():
        raise ExportError(f'dynamic: dimension {dimension} of {name!r} needs a name such as "length", got {symbol!r}.')
    if symbol != BATCH and tensor.shape[dimension] < 2:
        raise ExportError(
            f"dynamic: dimension {dimension} of {name!r} ({symbol}) has size {tensor.shape[dimension]} in example_inputs, "
            "which torch.export takes for a constant. Pass an example with at least 2."
        )


def _traced(
    module: nn.Module, tensors: Mapping[str, Tensor], dimensions: _Dimensions
) -> tuple[torch.export.ExportedProgram, _Dimensions, tuple[str, ...]]:
    """The program, what is dynamic in it, and a line for each dimension that the model fixed.

    Raises:
        ExportError: it cannot be traced, or not with a dimension that was asked for.
    """
    program = _attempt(module, tensors, dimensions)
    if isinstance(program, Exception) and any(dimensions.values()) and runs_on_one_sample(module, (*tensors.values(),), {}):
        program = _attempt(module, tensors, dimensions)  # what it kept for its last shape may have fixed it
    if not isinstance(program, Exception):
        return program, dimensions, ()
    first = program
    asked = {name: {d: s for d, s in of.items() if s != BATCH} for name, of in dimensions.items()}
    program = first if asked == dimensions else _attempt(module, tensors, asked)
    if not isinstance(program, Exception):
        lines = tuple(
            f"dimension {d} of {name!r} ({s}) is fixed to {tensors[name].shape[d]}: {_reason(first)}"
            for name, of in dimensions.items()
            for d, s in of.items()
            if s == BATCH
        )
        return program, asked, lines
    if any(asked.values()) and not isinstance(_attempt(module, tensors, {name: {} for name in tensors}), Exception):
        _raise_asked(module, tensors, asked, first)
    remedy = "Check that example_inputs have the types that forward takes and that no values steer its control flow."
    if threading.active_count() > 1 and "Unexpected key" in str(first):
        remedy = "Let no other thread call a torch module meanwhile: torch traces its calls as well."
    raise ExportError(f"torch.export cannot trace the model: {first_line(first)} {remedy}") from first


def _raise_asked(module: nn.Module, tensors: Mapping[str, Tensor], asked: _Dimensions, first: Exception) -> NoReturn:
    """Name the first dimension that cannot be dynamic although all others stay as they are in the example."""
    for symbol in dict.fromkeys(s for of in asked.values() for s in of.values()):
        alone = {name: {d: s for d, s in of.items() if s == symbol} for name, of in asked.items()}
        found = _attempt(module, tensors, alone)
        if isinstance(found, Exception):
            places = " and ".join(f"dimension {d} of {name!r}" for name, of in alone.items() for d in of)
            raise ExportError(
                f"dynamic: the model fixes {places} ({symbol}): {_reason(found)}. Leave {symbol!r} out of dynamic."
            ) from found
    raise ExportError(
        f"dynamic: the model fixes one of the dimensions that were asked for: {_reason(first)}. Leave one out."
    ) from first


def _attempt(
    module: nn.Module, tensors: Mapping[str, Tensor], dimensions: _Dimensions
) -> torch.export.ExportedProgram | Exception:
    try:
        return _export(module, tensors, dimensions)
    except Exception as error:  # noqa: BLE001 - user code runs under the tracer: whatever it raises means "cannot be traced"
        return error


def _export(module: nn.Module, tensors: Mapping[str, Tensor], dimensions: _Dimensions) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH)
    given, shapes = [], []
    for name, tensor in tensors.items():
        of = dimensions[name]
        for dimension, symbol in of.items():
            # With a batch of one the exporter would take the batch dimension for a constant.
            if symbol == BATCH and tensor.shape[dimension] == 1:
                tensor = torch.cat([tensor, tensor], dimension)
        given.append(tensor)
        shapes.append({d: batch if s == BATCH else torch.export.Dim.DYNAMIC for d, s in of.items()})
    with torch.no_grad(), silenced("torch.export._trace"):  # on failure it prints the whole graph so far
        return torch.export.export(
            module, tuple(given), dynamic_shapes=(tuple(shapes),) if isinstance(module, _Flat) else tuple(shapes)
        )


def _reason(error: BaseException) -> str:
    """What torch.export says of a dimension that is no dynamic one, in its own words."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    said = next((line for line in lines if "specialized" in line), None)
    return first_line(error) if said is None else said.partition(". If")[0].partition("but your code ")[2] or said


def _drop_wrapper(program: torch.export.ExportedProgram) -> None:
    """Nodes say which module of the model they come from: without the wrapper around it."""
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (unwrapped(path), kind) for key, (path, kind) in stack.items()}


def unwrapped(name: str) -> str:
    """The name that something has in the model, without the module that :func:`trace` puts around it."""
    return "" if name == _NETWORK else name.removeprefix(f"{_NETWORK}.")


def _user_inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[str(name)] for name in program.graph_signature.user_inputs]


def _check_read(program: torch.export.ExportedProgram, inputs: Sequence[str]) -> None:
    for name, node in zip(inputs, _user_inputs(program), strict=True):
        if not node.users:
            raise ExportError(
                f"the model does not read its input {name!r}, so a file has none. Leave it out of example_inputs."
            )


def _symbols(program: torch.export.ExportedProgram, inputs: Sequence[str], dimensions: _Dimensions) -> dict[str, str]:
    """What torch calls each dynamic size -> its name.

    Raises:
        ExportError: two names stand for what the model needs to be one size.
    """
    found: dict[str, str] = {}
    for name, node in zip(inputs, _user_inputs(program), strict=True):
        for dimension, symbol in dimensions[name].items():
            size = str(node.meta["val"].shape[dimension])
            if found.setdefault(size, symbol) != symbol:
                raise ExportError(
                    f"dynamic: the model needs {found[size]!r} and {symbol!r} (dimension {dimension} of {name!r}) to be equal. "
                    "Give both one name."
                )
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
