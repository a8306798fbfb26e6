"""``{class_path: my_code.network, init_args: {width: 4}}`` in YAML stands for what ``my_code.network(width=4)`` returns."""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial, reduce
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from ..errors import QakdError
from .options import suggestion

_KEYS = ("class_path", "init_args")
_SCALARS = (bool, int, float, str, NoneType)
_PLAIN = (*_SCALARS, Path, os.PathLike)
_CONTAINERS = (list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping)


class RecipeError(QakdError):
    """Says what is wrong in a recipe, in the recipe's own words."""


class Builder:
    """Makes objects of what a YAML file says. An alias (``*name``) is the object that its anchor (``&name``) stands before.

    Args:
        seed: set anew before each function or class is called, so that what it returns does not depend on what else was made
            before it; None for none.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._made: dict[int, Any] = {}

    def build(self, node: Any, hint: Any, where: str) -> Any:
        """The value of a node.

        Args:
            node: plain data.
            hint: the type that is wanted; ``Any`` where it is not known. Where it is a callable, text is its import path.
            where: of the node, for errors.

        Raises:
            RecipeError: a name cannot be imported, an argument is unknown or missing, or a value has the wrong type.
        """
        if isinstance(node, dict) and "class_path" in node:
            if id(node) not in self._made:
                self._made[id(node)] = self._called(node, hint, where)
            return self._made[id(node)]
        if isinstance(node, str) and any(get_origin(kind) is collections.abc.Callable for kind in _members(hint)):
            return imported(node, where)
        value = node
        if isinstance(node, dict):
            value = {key: self.build(entry, Any, f"{where}.{key}") for key, entry in node.items()}
        elif isinstance(node, list):
            value = [self.build(entry, Any, f"{where}[{index}]") for index, entry in enumerate(node)]
        return checked(value, hint, where) if is_plain(hint) else value

    def _called(self, node: dict[str, Any], hint: Any, where: str) -> Any:
        wrong = next((key for key in node if key not in _KEYS), None)
        if wrong is not None:
            raise RecipeError(
                f"{where}: unknown key {wrong!r} beside class_path{suggestion(str(wrong), _KEYS)}. Use {_KEYS[1]}."
            )
        path, given = node["class_path"], node.get("init_args") or {}
        if not isinstance(path, str) or not isinstance(given, dict):
            raise RecipeError(f"{where}: expected class_path: an import path, and init_args: names and values, got {node!r}.")
        target = imported(path, where)
        if not callable(target):
            raise RecipeError(f"{where}: {path} is no function or class, but {type(target).__name__}.")
        makes_later = any(_is_class_of(target, kind) for kind in _members(hint))
        hints = _accepted(target, given, path, where, all_needed=not makes_later)
        arguments = {name: self.build(value, hints.get(name, Any), f"{where}.{name}") for name, value in given.items()}
        if makes_later:
            return partial(target, **arguments)
        if self._seed is not None:
            _set_seed(self._seed)
        try:
            return target(**arguments)
        except QakdError as error:
            raise RecipeError(f"{where}: {error}") from error


def imported(path: str, where: str) -> Any:
    """What an import path such as ``torch.optim.SGD`` names; modules of the working directory count.

    Raises:
        RecipeError: nothing, or importing it fails.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise RecipeError(f"{where}: {path!r} cannot be imported: an import path looks like my_code.make_network.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # to stay: what is imported may import from there as well
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name in _prefixes(parts):
                continue  # a class in a module, perhaps
            raise RecipeError(f"{where}: {path!r} cannot be imported: {name}: {error}") from error
        for part in parts[end:]:
            if not hasattr(found, part):
                raise RecipeError(f"{where}: {path!r} cannot be imported: {name} has no {part}{suggestion(part, dir(found))}.")
            found = getattr(found, part)
        return found
    raise RecipeError(
        f"{where}: {path!r} cannot be imported: there is no module {parts[0]!r} here or among installed packages."
    )


def checked(value: Any, hint: Any, where: str) -> Any:
    """Plain data as the type that is wanted: numbers, text, and lists and mappings of them.

    Raises:
        RecipeError: it is of another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        quoted = " (YAML reads no, off, yes and on as false and true: quote them)" if isinstance(value, bool) else ""
        raise RecipeError(f"{where}: expected {named(hint)}, got {value!r} ({type(value).__name__}).{quoted}") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML can be meant: objects and lists are left to the function that gets them."""
    members = _members(hint)
    if not isinstance(value, _SCALARS) or any(kind in (Any, object) for kind in members):
        return True
    plain = [kind for kind in members if _is_plain(kind)]
    if not plain:
        return False
    try:
        checked(value, reduce(operator.or_, plain), "")
    except RecipeError:
        return False
    return True


def named(hint: Any) -> str:
    """A type, in words for errors."""
    words = []
    for kind in _members(hint):
        if get_origin(kind) is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        elif kind is NoneType:
            words.append("null")
        elif kind in (*_SCALARS, Path):
            words.append(kind.__name__)
        elif _is_plain(kind):
            words.append(str(kind).replace("typing.", "").replace("collections.abc.", ""))
        elif "{class_path: ..., init_args: {...}}" not in words:
            words.append("{class_path: ..., init_args: {...}}")
    return " or ".join(words)


def type_hints(function: Any) -> dict[str, Any]:
    """Annotations as types; those that cannot be evaluated are left out."""
    plain = inspect.unwrap(function)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(plain, "__annotations__", {}).items():
        alone = SimpleNamespace(__annotations__={name: annotation})
        with suppress(NameError, TypeError, AttributeError):  # names that only a type checker imports
            hints |= get_type_hints(alone, globalns=plain.__globals__)
    return hints


def _prefixes(parts: list[str]) -> set[str]:
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; one type otherwise."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_plain(hint: Any) -> bool:
    """Whether YAML can say every value of this type."""
    return all(_is_plain(kind) for kind in _members(hint))


def _is_plain(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType) or origin in _CONTAINERS:
        return all(part is Ellipsis or _is_plain(part) for part in get_args(kind))
    return kind in _PLAIN or origin in (Literal, os.PathLike)


def _is_class_of(target: Any, kind: Any) -> bool:
    """Whether a callable of type ``kind`` makes what the class ``target`` is: an optimizer, which gets its parameters later."""
    if get_origin(kind) is not collections.abc.Callable or not inspect.isclass(target):
        return False
    made = get_args(kind)[1]
    return inspect.isclass(made) and issubclass(target, made)


def _accepted(target: Any, given: Mapping[str, Any], path: str, where: str, *, all_needed: bool) -> dict[str, Any]:
    """Check the names of arguments; returns the annotations of those that have one."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C
        return {}
    usable = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    unknown = next((name for name in given if name not in usable), None)
    if unknown is not None and all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        near = suggestion(str(unknown), usable)
        raise RecipeError(f"{where}: {path} takes no {unknown!r}{near}; it takes {', '.join(usable) or 'nothing'}.")
    missing = [name for name, one in usable.items() if one.default is inspect.Parameter.empty and name not in given]
    if missing and all_needed:
        raise RecipeError(f"{where}: {path} needs {', '.join(missing)}: add init_args: {{{missing[0]}: ...}}.")
    return type_hints(target.__init__ if inspect.isclass(target) else target)


def _set_seed(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)
