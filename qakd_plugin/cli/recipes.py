"""Recipes: the arguments of ``distill``, ``rank_augmentations``, ``sensitivity`` and ``export_onnx``, in YAML or Python.

A recipe is code: a YAML file names functions that are imported and called. Whoever runs one trusts it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .options import suggestion
from .value_types import RecipeError, checked, is_plain, type_hints
from .yaml_objects import Builder, imported, load_yaml

APIS = {
    "distill": ("training.distillation", "distill"),
    "rank": ("augment.ranking", "rank_augmentations"),
    "sensitivity": ("training.sensitivity", "sensitivity"),
    "export": ("deploy.export", "export_onnx"),
}
"""By command, the function whose arguments are keys of a recipe: its module and name."""

BY_FLAG = {"checkpoint_dir": "--out", "resume": "--resume", "path": "--out"}
"""Arguments that the command line gives, so that no recipe does."""

STAND_INS = {"data": "loader", "example_inputs": "loader", "batches": "loader"}
"""Keys that may be missing, and what is taken then."""


class Recipe:
    """What a recipe holds.

    Args:
        source: its name, for errors.
        values: by key; made when they are asked for.
        command: that it is read for.
    """

    def __init__(self, source: str, values: Mapping[str, Any], command: str) -> None:
        self.source, self.values, self.command = source, values, command
        _check_keys(source, list(values), command)

    def arguments(self, *needed: str) -> dict[str, Any]:
        """The arguments of the command's function, but for those that a flag gives. Keys of other commands are left out.

        Args:
            *needed: that must be there, or something that stands in for them.

        Raises:
            RecipeError: one of them is missing, or cannot be made.
        """
        own = api_parameters(self.command)
        keys = {key: key for key in own if key in self.values}
        keys |= {key: STAND_INS[key] for key in needed if key not in keys and STAND_INS.get(key) in self.values}
        missing = [f"no {key}" for key in needed if key not in keys]
        if missing:
            raise RecipeError(f"{self.source} has {' or '.join(missing)}, which qakd {self.command} needs.")
        quick_first = sorted(keys, key=lambda name: not is_plain(own[name].annotation))  # to say what is wrong at once
        return {name: self.values[keys[name]] for name in quick_first}


def read_recipe(name: str, command: str) -> Recipe:
    """A recipe for a command.

    Args:
        name: a file that ends in .yaml or .yml; or MODULE:FUNCTION, which is called and returns a dict.
        command: "distill", "rank", "sensitivity" or "export".

    Raises:
        RecipeError: it cannot be read, or a key is unknown; names it.
    """
    if Path(name).suffix in {".yaml", ".yml"}:
        return Recipe(name, _YamlValues(name, load_yaml(Path(name)), command), command)
    values = resolve(name)()
    if not isinstance(values, dict):
        raise RecipeError(f"{name!r} must return a dict of keyword arguments, got {type(values).__name__}.")
    return Recipe(name, values, command)


def resolve(name: str) -> Callable[[], Any]:
    """Import ``MODULE:FUNCTION``; modules of the working directory count.

    Raises:
        RecipeError: it cannot be imported, or is no function.
    """
    module, _, function = name.partition(":")
    if not function:
        raise RecipeError(f"{name!r} must be MODULE:FUNCTION, for example my_recipe:build, or a file that ends in .yaml.")
    if module.endswith(".py"):
        raise RecipeError(f"{name!r} cannot be imported: name the module without .py, {module[:-3]}:{function}.")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise RecipeError(f"{name!r} cannot be imported: MODULE:FUNCTION is my_recipe:build, without folders.")
    found = imported(f"{module}.{function}", name)
    if not callable(found):
        raise RecipeError(f"{name!r} is not a function.")
    return found  # type: ignore[no-any-return]


@cache
def api_parameters(command: str) -> dict[str, inspect.Parameter]:
    """Keys of a recipe that a command uses, with defaults, and annotations that are types."""
    function = api_function(command)
    hints = type_hints(function)
    return {
        key: parameter.replace(annotation=hints.get(key, Any))
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in BY_FLAG
    }


def api_function(command: str) -> Callable[..., Any]:
    """The function behind a command."""
    module, name = APIS[command]
    return getattr(importlib.import_module(f"..{module}", __package__), name)  # type: ignore[no-any-return]


class _YamlValues(Mapping[str, Any]):
    """The values of a YAML file, each made when it is first asked for, once."""

    def __init__(self, source: str, tree: dict[str, Any], command: str) -> None:
        self._source, self._tree, self._command = source, tree, command
        self._builder = Builder(checked(tree.get("seed"), int | None, f"{source}: seed"))

    def __getitem__(self, key: str) -> Any:
        parameters = api_parameters(self._command)
        hint = parameters[key].annotation if key in parameters else Any
        return self._builder.fitting(self._tree[key], hint, f"{self._source}: {key}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)


def _check_keys(source: str, keys: list[str], command: str) -> None:
    """Refuse what no command knows."""
    known: dict[str, None] = {}
    for name in sorted(APIS, key=lambda one: one != command):  # the own keys first: others take time to import
        known |= dict.fromkeys(api_parameters(name))
        if all(key in known for key in keys):
            return
    unknown = next(key for key in keys if key not in known)
    if unknown in BY_FLAG:
        raise RecipeError(f"{source}: {unknown} is given on the command line, as {BY_FLAG[unknown]}. Leave it out.")
    raise RecipeError(f"{source}: unknown key {unknown!r}{suggestion(str(unknown), known)}. Known are {', '.join(known)}.")
