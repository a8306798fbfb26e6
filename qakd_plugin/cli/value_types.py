"""Whether a value from a YAML file is of the type that an annotation asks for."""

from __future__ import annotations

import collections.abc
import inspect
import operator
import os
from contextlib import suppress
from dataclasses import is_dataclass
from functools import reduce
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from ..errors import QakdError

_SCALARS = (bool, int, float, str, NoneType)
_PLAIN = (*_SCALARS, Path, os.PathLike)
_CONTAINERS = (list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping)


class RecipeError(QakdError):
    """Says what is wrong in a recipe, in the recipe's own words."""


def type_hints(function: Any) -> dict[str, Any]:
    """Annotations as types; those that cannot be evaluated are left out."""
    plain = inspect.unwrap(function)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(plain, "__annotations__", {}).items():
        alone = SimpleNamespace(__annotations__={name: annotation})
        with suppress(NameError, TypeError, AttributeError):  # names that only a type checker imports
            hints |= get_type_hints(alone, globalns=plain.__globals__)
    return hints


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; one type otherwise."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_plain(hint: Any) -> bool:
    """Whether YAML itself can say every value of this type: numbers, text, and lists and mappings of them."""
    return all(_is_plain(kind) for kind in members(hint))


def dataclasses_of(hint: Any) -> dict[str, Any]:
    """The dataclasses of a union, by name."""
    return {kind.__name__: kind for kind in members(hint) if inspect.isclass(kind) and is_dataclass(kind)}


def checked(value: Any, hint: Any, where: str) -> Any:
    """Plain data as the type that is wanted.

    Raises:
        RecipeError: it is of another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        raise unfit(value, hint, where) from error


def unfit(value: Any, hint: Any, where: str, *, python: bool = False) -> RecipeError:
    """The error for a value of another type, in the words of YAML or of Python."""
    words = _named(hint)
    if python:
        words = words.replace("{class_path: ..., init_args: {...}}", "an object").replace("null", "None")
    quoted = " YAML reads no, off, yes and on as false and true: quote them." if isinstance(value, bool) and not python else ""
    return RecipeError(f"{where}: expected {words}, got {value!r} ({type(value).__name__}).{quoted}")


def is_scalar(value: Any) -> bool:
    """Whether it is a number, text, a truth value or None."""
    return isinstance(value, _SCALARS)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value can be meant; objects and lists are left to the function that gets them, but for dataclasses."""
    kinds = members(hint)
    if any(kind in (Any, object) for kind in kinds):
        return True
    if len(dataclasses_of(hint)) + (NoneType in kinds) == len(kinds):
        return isinstance(value, kinds)
    if value is None:  # which jsonargparse takes for what was not given
        return NoneType in kinds
    if not isinstance(value, _SCALARS):
        return True
    plain = [kind for kind in kinds if _is_plain(kind)]
    if not plain:
        return False
    try:
        checked(value, reduce(operator.or_, plain), "")
    except RecipeError:
        return False
    return True


def _named(hint: Any) -> str:
    """A type, in words for errors."""
    words = [*dataclasses_of(hint)]
    for kind in members(hint):
        if get_origin(kind) is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif kind is NoneType:
            words.append("null")
        elif kind in (*_SCALARS, Path):
            words.append(kind.__name__)
        elif _is_plain(kind):
            words.append(str(kind).replace("typing.", "").replace("collections.abc.", ""))
        elif kind not in dataclasses_of(hint).values() and "{class_path: ..., init_args: {...}}" not in words:
            words.append("{class_path: ..., init_args: {...}}")
    return " or ".join(words)


def _is_plain(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType) or origin in _CONTAINERS:
        return all(part is Ellipsis or _is_plain(part) for part in get_args(kind))
    return kind in _PLAIN or origin in (Literal, os.PathLike)
