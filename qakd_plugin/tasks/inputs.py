"""What goes into a network: a tensor, several, or keywords; how it is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

from .._common.precision import dtype_name
from ..errors import QakdError

HALF = (torch.float16, torch.bfloat16)
"""Types in which steps of training are lost to rounding."""

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One tensor; a tuple, whose items are positional arguments; a mapping of keywords; a list, which is one argument (the images
of torchvision's detectors)."""


def call(network: nn.Module, inputs: Inputs) -> Any:
    """What ``network`` returns for ``inputs``."""
    args, kwargs = arguments(inputs)
    return network(*args, **kwargs)


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def precision_of(network: nn.Module) -> torch.dtype:
    """Of a network's first floating-point parameter; float32 where it has none."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def call_in_own_precision(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``network`` returns; one in float16 or bfloat16 gets its float inputs in that type, and no autocast around it."""
    dtype = precision_of(network)
    if dtype not in HALF or any(p.dtype != dtype for p in network.parameters() if p.is_floating_point()):
        return network(*args, **kwargs)
    args, kwargs = tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, (args, kwargs)
    )
    with torch.autocast(device_of({"args": args, "kwargs": kwargs}).type, enabled=False):
        return network(*args, **kwargs)


@contextmanager
def dtypes_named(network: nn.Module, inputs: Inputs, name: str) -> Iterator[None]:
    """Within the block, an error of torch on inputs of another type than ``network`` computes in says so, and what to write.

    Raises:
        QakdError: torch raised one.
    """
    try:
        yield
    except RuntimeError as error:
        computes = precision_of(network)
        wrong = {
            path: tensor
            for path, tensor in named_tensors(inputs).items()
            if tensor.dtype is torch.uint8 or (tensor.is_floating_point() and tensor.dtype != computes)
        }
        if not wrong or isinstance(error, QakdError):
            raise
        path, tensor = next(iter(wrong.items()))
        change = "float() / 255" if tensor.dtype is torch.uint8 else f"to(torch.{dtype_name(computes)})"
        raise QakdError(
            f"{name}: {path!r} {tuple(tensor.shape)} is {dtype_name(tensor.dtype)}, and {type(network).__name__} computes in "
            f"{dtype_name(computes)} ({str(error).strip().splitlines()[0]}). Convert it as the network was trained: "
            f"batch_fn=lambda batch: (batch[0].{change}, batch[1])."
        ) from error


def named_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor in ``inputs`` by its path: "input" for a single one, keywords, or positions."""
    if isinstance(inputs, Tensor):
        return {"input": inputs}
    leaves, _ = tree_flatten_with_path(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return {".".join(_key(part) for part in path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def named_inputs(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor in ``inputs`` by its name in an exported file, in the order in which they are given.

    "input" for a single one, keywords by their key, positional ones by the parameter of ``network.forward``; what lies deeper
    by its path.
    """
    if isinstance(inputs, Tensor):
        return {"input": inputs}
    args, kwargs = arguments(inputs)
    bound = dict(inspect.signature(network.forward).bind_partial(*args).arguments)
    leaves, _ = tree_flatten_with_path({**bound, **kwargs})
    return {".".join(_key(part) for part in path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def with_tensors(inputs: Inputs, tensors: Iterable[Tensor]) -> Inputs:
    """The same structure with other tensors in the places of its own, in their order."""
    following = iter(tensors)
    changed: Inputs = _of_tensors(inputs, lambda _: next(following))
    return changed


def to_device(inputs: Any, device: torch.device) -> Any:
    """The same structure with all of its tensors on ``device``; a mapping of any kind becomes a dict."""
    return _of_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=True))


def device_of_network(network: nn.Module) -> torch.device:
    """Of the first parameter; the CPU where there is none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def device_of(inputs: Inputs) -> torch.device:
    """Of the first tensor; the CPU where there is none."""
    return next((tensor.device for tensor in named_tensors(inputs).values()), torch.device("cpu"))


def sample_count(inputs: Inputs) -> int:
    """How many samples a batch holds: the length of a list, else the first dimension of the first tensor.

    Raises:
        QakdError: there is no tensor with a batch dimension.
    """
    if isinstance(inputs, list):
        return len(inputs)
    found = next((tensor for tensor in named_tensors(inputs).values() if tensor.ndim > 0), None)
    if found is None:
        raise QakdError(
            f"loader: a batch holds no tensor with a batch dimension ({type(inputs).__name__}). Yield x, (x, y) or a mapping "
            "of tensors, or pass batch_fn=lambda batch: (inputs, targets)."
        )
    return len(found)


def doubled(inputs: Any) -> Any:
    """The same structure with every sample twice: what an exporter would take for a constant, a batch of one, is none then."""
    return _of_tensors(inputs, lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor)


def named(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that ``network.forward`` gives them."""
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)


def first_samples(inputs: Any, count: int) -> Any:
    """The same structure with at most ``count`` samples."""
    if isinstance(inputs, list):
        return inputs[:count]
    return _of_tensors(inputs, lambda tensor: tensor[:count] if tensor.ndim else tensor)


@torch.no_grad()
def runs_on_one_sample(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``network`` takes the first sample of a batch alone; it is called with it.

    What a network keeps for the shape that it saw last, as detectors keep anchors, is of one sample then, and so of no batch
    that torch.export takes for dynamic. Kept from more samples, it fixes the batch to as many.
    """
    args, kwargs = first_samples((args, dict(kwargs)), 1)
    try:
        network(*args, **kwargs)
    except Exception:  # noqa: BLE001 - user code, on a size that nobody asked for
        return False
    return True


def forward_names(network: nn.Module) -> tuple[list[str], bool]:
    """Names of the arguments that ``network.forward`` takes, and whether it takes any others by keyword."""
    parameters = inspect.signature(network.forward).parameters.values()
    takes = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in takes], any(p.kind is p.VAR_KEYWORD for p in parameters)


def call_problem(network: nn.Module, inputs: Inputs) -> str | None:
    """Why ``network.forward`` cannot be called with ``inputs``, or None.

    What a wrapper hides behind ``*args`` or ``**kwargs`` is not looked at.
    """
    args, kwargs = arguments(inputs)
    try:
        inspect.signature(network.forward).bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(f"argument {index}" for index in range(len(args))), *kwargs])
        takes = ", ".join(forward_names(network)[0]) or "nothing"
        return f"{type(network).__name__} does not take the inputs {given} ({error}): its forward takes {takes}"
    return None


def require_known(network: nn.Module, inputs: Inputs, name: str) -> None:
    """Raise QakdError where there is a :func:`call_problem`; ``name`` says whose it is."""
    if problem := call_problem(network, inputs):
        raise QakdError(
            f"{name}: {problem}. Pass batch_fn=lambda batch: (inputs, targets) with a tensor, a tuple of positional arguments "
            "or a mapping of keywords."
        )


def _of_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed. Mappings that are no dict, as tokenizers return them, are opened."""
    return tree_map_only(Tensor, change, dict(inputs) if isinstance(inputs, Mapping) else inputs)


def _key(part: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
