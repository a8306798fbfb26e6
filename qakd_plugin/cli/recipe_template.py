"""``qakd distill --print-config``: a recipe to start from, made of the signatures and docstrings of the API."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from typing import Any

import docstring_parser

from .recipes import APIS, STAND_INS, api_function, api_parameters

_HEAD = """\
# A recipe of qakd distill, rank, sensitivity and export: qakd distill recipe.yaml --out run
#
# `class_path` names a function or class, yours or a package's, and `init_args` its arguments: what it returns is the
# value. `batch_fn: my_code.split` names a function itself. `loader: &images {...}` and `data: *images` are one object.
# With a seed, it is set before each of them is called. A recipe is code: run only those that you trust.
"""


def commented_recipe() -> str:
    """YAML: every key with its default and a line of help; those without a default name a function to be written."""
    lines = [_HEAD]
    seen: set[str] = set()
    for command in APIS:
        help_of = {text.arg_name: text.description or "" for text in docstring_parser.parse(_doc(command)).params}
        lines.append(f"# -- qakd {command}\n")
        for key, parameter in api_parameters(command).items():
            if key not in seen:
                comment = textwrap.wrap(_first_sentence(help_of[key]), 118, initial_indent="# ", subsequent_indent="# ")
                lines += [*comment, *_entry(key, parameter.default), ""]
                seen.add(key)
    return "\n".join(lines)


def _doc(command: str) -> str:
    return inspect.getdoc(api_function(command)) or ""


def _entry(key: str, default: Any) -> list[str]:
    if default is not inspect.Parameter.empty:
        return [f"{key}: {_as_yaml(default)}"]
    reference = f"{key}: {{class_path: my_code.{key}, init_args: {{}}}}"
    return [f"# {reference}  # {STAND_INS[key]} where it is left out" if key in STAND_INS else reference]


def _as_yaml(value: Any) -> str:
    """A default; functions and classes by their import path."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else json.dumps(value)


def _first_sentence(text: str) -> str:
    words = re.sub(r":\w+:`~?(?:\w*\.)*(\w+)`", r"\1", " ".join(text.replace("``", "").split()))
    sentence = re.split(r"\.(?= [A-Z]|$)", words)[0]
    return sentence[:1].upper() + sentence[1:] + "."
