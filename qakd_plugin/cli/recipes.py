"""Recipes: the arguments of ``distill``, ``rank_augmentations``, ``sensitivity`` and ``export_onnx``, in YAML or Python.

A recipe is code: a YAML file names functions that are imported and called. Whoever runs one trusts it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from .options import suggestion
from .value_types import RecipeError, checked, fits, is_plain, is_scalar, type_hints, unfit
from .yaml_objects import Builder, check_packages, imported, load_yaml

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
        keys = {key: key for key in api_keys(self.command) if key in self.values}
        keys |= {key: STAND_INS[key] for key in needed if key not in keys and STAND_INS.get(key) in self.values}
        missing = [f"no {key}" for key in needed if key not in keys]
        if missing:
            raise RecipeError(f"{self.source} has {' or '.join(missing)}, which qakd {self.command} needs.")
        own = api_parameters(self.command)
        quick_first = sorted(keys, key=lambda name: not is_plain(own[name].annotation))  # to say what is wrong at once
        return {name: self._fitting(keys[name], own[name].annotation) for name in quick_first}

    def _fitting(self, key: str, hint: Any) -> Any:
        value, where = self.values[key], f"{self.source}: {key}"
        if isinstance(self.values, _YamlValues):  # whose text has become what it stands for
            return value
        if not fits(value, hint) or (is_scalar(value) and is_plain(hint) and _is_converted(value, hint)):
            raise unfit(value, hint, where, python=True)
        return value


def _is_converted(value: Any, hint: Any) -> bool:
    """Whether a number would be taken for text, or text for a number, as YAML's are."""
    return isinstance(checked(value, hint, ""), str) != isinstance(value, str)


def read_recipe(name: str, command: str) -> Recipe:
    """A recipe for a command.

    Args:
        name: a file that ends in .yaml or .yml; or MODULE:FUNCTION, which is called and returns a dict.
        command: "distill", "rank", "sensitivity" or "export".

    Raises:
        RecipeError: it cannot be read, or a key is unknown; names it.
    """
    if Path(name).suffix in {".yaml", ".yml"}:
        return made_recipe(load_yaml(Path(name)), name, command)
    values = resolve(name)()
    if not isinstance(values, dict):
        raise RecipeError(f"{name!r} must return a dict of keyword arguments, got {type(values).__name__}.")
    return Recipe(name, values, command)


def made_recipe(tree: dict[str, Any], name: str, command: str) -> Recipe:
    """A recipe that was made and not read.

    Args:
        tree: as YAML would say it.
        name: for errors.
        command: that it is for.
    """
    return Recipe(name, _YamlValues(name, tree, command), command)


def as_yaml(recipe: Recipe) -> str:
    """The text of a recipe that :func:`made_recipe` made: read again, it makes the same."""
    assert isinstance(recipe.values, _YamlValues)
    head = "# Made of the flags of qakd distill; qakd distill, export, export-float, val, bench and others take it.\n"
    return head + str(yaml.safe_dump(recipe.values.tree, sort_keys=False))


def counted_by(recipe: str) -> dict[str, Any]:
    """What a recipe says of how held-out samples are counted."""
    values = read_recipe(recipe, "distill").values
    return {key: values[key] for key in ("batch_fn", "metric", "metric_fn", "val_loader") if key in values}


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
        raise RecipeError(f"{name!r} cannot be imported: write a module's name without folders, such as my_recipe:build.")
    found = imported(f"{module}.{function}", name)
    if not callable(found):
        raise RecipeError(f"{name!r} is no function. Name one that takes no argument and returns a Recipe.")
    return found  # type: ignore[no-any-return]


@cache
def api_keys(command: str) -> tuple[str, ...]:
    """Keys of a recipe that a command uses, read from the source: importing it takes seconds, and a typo should not."""
    module, name = APIS[command]
    spec = find_spec(f"..{module}", __package__)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_bytes())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return tuple(one.arg for one in named if one.arg not in BY_FLAG)


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
        check_packages(tree, f"{source}: ")
        self._source, self._tree, self._command = source, tree, command
        self._builder = Builder(checked(tree.get("seed"), int | None, f"{source}: seed"))

    def __getitem__(self, key: str) -> Any:
        parameters = api_parameters(self._command)
        hint = parameters[key].annotation if key in parameters else Any
        return self._builder.fitting(self._tree[key], hint, f"{self._source}: {key}")

    @property
    def tree(self) -> dict[str, Any]:
        """The plain data that they are made of."""
        return self._tree

    def __contains__(self, key: object) -> bool:
        return key in self._tree  # Mapping's own way would make the value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree)

    def __len__(self) -> int:
        return len(self._tree)


def _check_keys(source: str, keys: list[str], command: str) -> None:
    """Refuse what no command knows."""
    known = dict.fromkeys(key for name in sorted(APIS, key=lambda one: one != command) for key in api_keys(name))
    unknown = next((key for key in keys if key not in known), None)
    if unknown is None:
        return
    if unknown in BY_FLAG:
        raise RecipeError(f"{source}: {unknown} is given on the command line, as {BY_FLAG[unknown]}. Leave it out.")
    raise RecipeError(f"{source}: unknown key {unknown!r}{suggestion(str(unknown), known)}. Known are {', '.join(known)}.")
