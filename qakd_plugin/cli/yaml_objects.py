"""``{class_path: my_code.network, init_args: {width: 4}}`` in a YAML file: what ``my_code.network(width=4)`` returns."""

from __future__ import annotations

import collections.abc
import importlib
import importlib.util
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import get_loader
from yaml import YAMLError  # type: ignore[import-untyped]

from .._common.files import read_whole
from ..errors import QakdError
from .options import suggestion
from .value_types import RecipeError, checked, dataclasses_of, fits, is_plain, members, type_hints, unfit

_KEYS = ("class_path", "init_args")


def load_yaml(path: Path) -> dict[str, Any]:
    """What a file says, as plain data: numbers, text, lists and mappings; no tag makes anything else.

    Raises:
        RecipeError: it cannot be read, or holds no mapping.
    """
    try:
        tree = get_loader("yaml")(read_whole(path).decode())
        json.dumps(tree, default=str)  # refuses what refers to itself
    except (OSError, YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} cannot be read as YAML: {reason}. Correct it there.") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected sections and values, got {type(tree).__name__}.")
    return tree


class Builder:
    """Makes objects of what a YAML file says. An alias (``*name``) is the object that its anchor (``&name``) stands before.

    Args:
        seed: set anew before each function or class is called, so that what it returns does not depend on what else was made
            before it; None for none.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._made: dict[int, Any] = {}

    def build(self, node: Any, hint: Any, where: str) -> Any:
        """The value of a node.

        Args:
            node: plain data.
            hint: the type that is wanted; ``Any`` where it is not known. Of a callable, text is the import path; of a
                dataclass, a mapping has the fields, and of one of several, text is the name.
            where: of the node, for errors.

        Raises:
            RecipeError: a name cannot be imported, an argument is unknown or missing, or a value has the wrong type.
        """
        known = dataclasses_of(hint)
        if isinstance(node, str) and node in known:
            return self._called(known[node], node, {}, where)
        if isinstance(node, dict) and "class_path" in node:
            if id(node) not in self._made:
                self._made[id(node)] = self._made_of(node, hint, where)
            return self._made[id(node)]
        if isinstance(node, dict) and len(known) == 1:
            ((name, kind),) = known.items()
            return self._called(kind, name, node, where)
        if isinstance(node, str) and any(get_origin(kind) is collections.abc.Callable for kind in members(hint)):
            words = {word for kind in members(hint) if get_origin(kind) is Literal for word in get_args(kind)}
            return node if node in words else imported(node, where)
        if isinstance(node, dict):
            node = {key: self.build(entry, Any, f"{where}.{key}") for key, entry in node.items()}
        elif isinstance(node, list):
            node = [self.build(entry, Any, f"{where}[{index}]") for index, entry in enumerate(node)]
        return checked(node, hint, where) if is_plain(hint) else node

    def fitting(self, node: Any, hint: Any, where: str) -> Any:
        """The value of a node, if it is of the type that is wanted; see :meth:`build`."""
        value = self.build(node, hint, where)
        if not fits(value, hint):
            raise unfit(node, hint, where)
        return value

    def _made_of(self, node: dict[str, Any], hint: Any, where: str) -> Any:
        """What a node with a ``class_path`` stands for."""
        wrong = next((key for key in node if key not in _KEYS), None)
        if wrong is not None:
            raise RecipeError(f"{where}: unknown key {wrong!r} beside class_path; init_args is known{_near(wrong, _KEYS)}.")
        path, given = node["class_path"], node.get("init_args") or {}
        if not isinstance(path, str) or not isinstance(given, dict):
            raise RecipeError(f"{where}: expected class_path: an import path, and init_args: names and values, got {node!r}.")
        target = dataclasses_of(hint).get(path) or imported(path, where)
        if not callable(target):
            raise RecipeError(f"{where}: {path} is no function or class, but {type(target).__name__}.")
        later = any(_makes(kind, target) for kind in members(hint))
        return self._called(target, path, given, where, later=later)

    def _called(self, target: Any, name: str, given: dict[str, Any], where: str, *, later: bool = False) -> Any:
        """What a function or class returns; ``later`` leaves the call, with more arguments, to whoever gets it."""
        _check_names(target, name, given, where, all_needed=not later)
        hints = type_hints(target.__init__ if inspect.isclass(target) else target)
        build = self.fitting if dataclasses_of(target) else self.build
        arguments = {key: build(value, hints.get(key, Any), f"{where}.{key}") for key, value in given.items()}
        if later:
            return partial(target, **arguments)
        if self._seed is not None:
            _set_seed(self._seed)
        try:
            return target(**arguments)
        except QakdError as error:
            raise RecipeError(f"{where}: {error}") from error


def check_packages(tree: dict[str, Any], prefix: str) -> None:
    """Whether every package that a tree names is there, before anything is imported, which takes time.

    Args:
        tree: as :func:`load_yaml` returns it.
        prefix: of places in it, for errors.

    Raises:
        RecipeError: one is not; says where.
    """
    for key, node in tree.items():
        for where, path in _class_paths(node, f"{prefix}{key}"):
            _check_package(path, where)


def imported(path: str, where: str) -> Any:
    """What an import path such as ``torch.optim.SGD`` names; modules of the working directory count.

    Raises:
        RecipeError: nothing, or importing it fails.
    """
    parts = _check_package(path, where)
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and path.startswith(f"{error.name}."):
                continue  # a class in a module, perhaps
            raise RecipeError(f"{where}: {path!r} cannot be imported: {name}: {error}") from error
        for part in parts[end:]:
            if not hasattr(found, part):
                raise RecipeError(f"{where}: {path!r} cannot be imported: {name} has no {part}{_near(part, dir(found))}.")
            found = getattr(found, part)
        return found
    raise _missing(path, where)


def _check_package(path: str, where: str) -> list[str]:
    """The parts of an import path whose first one can be found; modules of the working directory count."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise RecipeError(f"{where}: expected an import path such as my_code.make_network, got {path!r}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # to stay: what is imported may import from there as well
    if parts[0] not in sys.modules and importlib.util.find_spec(parts[0]) is None:
        raise _missing(path, where)
    return parts


def _missing(path: str, where: str) -> RecipeError:
    return RecipeError(f"{where}: {path!r} cannot be imported: no module {path.partition('.')[0]!r} is here or installed.")


def _class_paths(node: Any, where: str) -> collections.abc.Iterator[tuple[str, str]]:
    """Where a node and those below it name a function or class, and its path. What is no node is left to the builder."""
    if isinstance(node, list):
        for index, entry in enumerate(node):
            yield from _class_paths(entry, f"{where}[{index}]")
    if not isinstance(node, dict):
        return
    path, arguments = node.get("class_path"), node.get("init_args")
    if isinstance(path, str) and "." in path:  # without a dot it may be a dataclass's own name
        yield where, path
    for key, entry in (arguments if path is not None and isinstance(arguments, dict) else node).items():
        yield from _class_paths(entry, f"{where}.{key}")


def _near(unknown: object, known: collections.abc.Iterable[str]) -> str:
    return suggestion(str(unknown), known)


def _makes(kind: Any, target: Any) -> bool:
    """Whether a callable of type ``kind`` makes objects of the class ``target``: an optimizer, which gets parameters later."""
    if get_origin(kind) is not collections.abc.Callable or not inspect.isclass(target):
        return False
    made = get_args(kind)[1]
    return inspect.isclass(made) and issubclass(target, made)


def _check_names(target: Any, name: str, given: dict[str, Any], where: str, *, all_needed: bool) -> None:
    """Refuse arguments that the target does not take, and, if all are needed, that some are missing."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    usable = {key: parameter for key, parameter in parameters.items() if parameter.kind in named}
    takes_all = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = next((key for key in given if key not in usable), None)
    if unknown is not None and not takes_all:
        has = ", ".join(usable) or "no argument"
        raise RecipeError(f"{where}: unknown key {unknown!r}; {name} has {has}{_near(unknown, usable)}.")
    missing = [key for key, one in usable.items() if one.default is inspect.Parameter.empty and key not in given]
    if missing and all_needed:
        raise RecipeError(f"{where}: {missing[0]!r} is missing; {name} needs {', '.join(missing)}.")


def _set_seed(seed: int) -> None:
    from accelerate.utils import set_seed

    set_seed(seed)
