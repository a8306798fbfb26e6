"""What an object computes with, as lines of text that are the same in every process and at every start."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def facts(value: Any, name: str) -> list[str]:
    """What an object computes with, a line each: ``"augment.magnitude = 9"``.

    Of a function its code, its defaults and the constants in its closure; of ``functools.partial`` its arguments; of a module
    or a dataclass its parts, of another callable its public attributes. What says nothing lasting, as an address would, is
    represented by the name of its type. A function's globals are not looked at.
    """
    return list(_facts(value, name, ()))


def _facts(value: Any, name: str, around: tuple[int, ...]) -> Iterator[str]:
    """``around``: ids of the objects that hold this one, to which nothing leads back."""
    if (text := plain(value)) is not None:
        yield f"{name} = {text}"
        return
    yield f"{name} = {value.__qualname__ if isinstance(value, types.FunctionType) else type(value).__qualname__}"
    if id(value) not in around:
        for part, inner in _parts(value):
            yield from _facts(inner, f"{name}{part}", (*around, id(value)))


def plain(value: Any) -> str | None:
    """What has no parts, as text; None for what has some."""
    if hasattr(type(value), "__array_interface__"):  # an image of Pillow, too
        value = np.ascontiguousarray(value)
        if value.dtype.kind not in "biufc":
            return f"{value.dtype} {value.shape}"
    if isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | np.generic | torch.dtype | torch.device | slice | range
    ):
        return repr(value)
    if isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    return None


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What an object is made of, each with how it is written after the object's name."""
    if isinstance(value, functools.partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        owner = [(".__self__", value.__self__)] if _computes(value.__self__) else []
        return [*owner, (".__func__", value.__func__)]
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    if isinstance(value, Mapping):
        return [(f"[{plain(key) or type(key).__qualname__}]", value[key]) for key in value]
    if isinstance(value, tuple | list):
        return [(f"[{index}]", inner) for index, inner in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [(f"[{index}]", inner) for index, inner in enumerate(sorted(value, key=repr))]
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        own = [part for part in _public(value) if part[0] != ".training"]
        return own + [(f".{name}", part) for name, part in [*tensors, *value.named_children()]]
    if is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    return _public(value)


def _parts_of_function(function: types.FunctionType) -> list[tuple[str, Any]]:
    if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return []  # of this package: its name says what it does, in every version
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = [(f" with {name}", cell.cell_contents) for name, cell in cells if _is_lasting(cell)]
    defaults = [(".__defaults__", function.__defaults__), (".__kwdefaults__", function.__kwdefaults__)]
    return [(".__code__", _digest_of_code(function.__code__)), *[part for part in defaults if part[1]], *closure]


def _is_lasting(cell: types.CellType) -> bool:
    """Whether a closure's variable is a constant or computes something, rather than holding the state of the program."""
    try:
        value = cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return False
    if isinstance(value, tuple | list):
        return all(plain(inner) is not None or _computes(inner) for inner in value)
    return plain(value) is not None or _computes(value)


def _computes(value: Any) -> bool:
    return isinstance(value, nn.Module | functools.partial | types.FunctionType) or is_dataclass(value)


def _digest_of_code(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            text = _digest_of_code(constant)
        else:
            text = repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
        digest.update(text.encode())
    digest.update(repr(code.co_names).encode())
    return digest.hexdigest()[:16]


def _public(value: Any) -> list[tuple[str, Any]]:
    return [(f".{name}", inner) for name, inner in getattr(value, "__dict__", {}).items() if not name.startswith("_")]
