"""A command's options are the parameters of its function."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import docstring_parser
import jsonargparse
from jsonargparse.typing import PositiveInt

from .._common.text import visible

_WORDS = (
    (r"Not of type PositiveInt: .*?'?(\S+?)'?( does not conform.*)?$", r"expected a positive whole number, got \1"),
    (r"invalid PositiveInt value: '(.*)'$", r"expected a positive whole number, got \1"),
    (r"Expected an? <class '(?:\w+\.)*(\w+)'>. Got value:", r"expected \1, got"),
    (r"^argument (\S+):", r"\1:"),
)
"""jsonargparse's words, and ours."""


@dataclass(frozen=True)
class OneOf:
    """Annotates a text that must be one of a table's entries."""

    table: tuple[str, ...]


class CommandParser(jsonargparse.ArgumentParser):  # type: ignore[misc]
    """Reads the command line of one command.

    Positional parameters of the function are positional here too, several where they are lists. Keyword parameters are flags:
    ``min_batch`` is ``--min-batch``, a bool needs no value, ``bool | Literal["force"]`` takes the word or nothing, and the flag
    of a list may be repeated. Types, defaults and help come from the signature and the docstring.

    Args:
        name: of the command.
        text: what it does, in one line.
        function: that is called with what was read.
    """

    def __init__(self, name: str, text: str, function: Callable[..., None]) -> None:
        self._words: dict[str, tuple[str, ...]] = {}
        texts = docstring_parser.parse(inspect.getdoc(function) or "")
        super().__init__(
            prog=f"qakd {name}",
            description=text,
            formatter_class=argparse.HelpFormatter,
            allow_abbrev=False,
        )
        help_of = {text.arg_name: " ".join((text.description or "").split()) for text in texts.params}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            self._add(parameter, help_of[parameter.name])

    def read(self, args: Sequence[str]) -> Any:
        """What ``parse_args`` returns; but a flag that stands without its word takes no other argument for it."""
        joined: list[str] = []
        for word in args:
            if joined and joined[-1].endswith("=") and word in self._words.get(joined[-1][:-1], ()):
                joined[-1] += word
            else:
                joined.append(f"{word}=" if word in self._words else word)
        return self.parse_args(joined)

    def _add(self, parameter: inspect.Parameter, text: str) -> None:
        kind, several = _item_type(parameter.annotation)
        words = _words_beside_bool(parameter.annotation)
        if not (parameter.default in (inspect.Parameter.empty, None) or isinstance(parameter.default, bool)):
            text += f" ({parameter.default})"
        options: dict[str, Any] = {"help": text.replace("%", "%%")} | _checks(kind)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            optional = parameter.default is not inspect.Parameter.empty
            self.add_argument(parameter.name, nargs="+" if several else "?" if optional else None, **options)
            return
        if parameter.default is inspect.Parameter.empty:
            options["required"] = True
        else:
            options["default"] = parameter.default
        if words:
            options |= {"nargs": "?", "metavar": "|".join(words), "type": partial(_word_or_nothing, words)}
            self._words[flag(parameter.name)] = words
        elif kind is bool:
            options = {"action": "store_true", "help": options["help"]}
        elif several:  # "append" checks each value as a list in jsonargparse
            options |= {"action": "extend", "nargs": 1, "metavar": parameter.name.upper()}
        self.add_argument(flag(parameter.name), **options)

    def add_printing_flag(self, option: str, module: str, function: str, text: str) -> None:
        """A flag in place of all others: prints what a function of a module beside this one returns, and exits."""

        class Print(argparse.Action):
            def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
                print(getattr(importlib.import_module(f".{module}", __package__), function)())
                parser.exit()

        self.add_argument(option, action=Print, nargs=0, default=argparse.SUPPRESS, help=text)

    @property
    def flags(self) -> dict[str, str]:
        """Of parameters, by name."""
        return {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line that names the flag, and exit status 2."""
        line = visible(message)
        for name, option in self.flags.items():
            line = line.replace(f'Parser key "{name}"', option).replace(f"are required: {name}", f"are required: {option}")
        for pattern, words in _WORDS:
            line = re.sub(pattern, words, line)
        if line.startswith("unrecognized arguments: "):
            unknown = line.split()[2].partition("=")[0]
            line += suggestion(unknown, self.flags.values())
        print(f"{self.prog}: error: {line} ({self.prog} --help explains)", file=sys.stderr)
        sys.exit(2)


def flag(name: str) -> str:
    """``--min-batch`` of ``min_batch``."""
    return f"--{name.replace('_', '-')}"


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """Which of the known names may have been meant; nothing where none is near."""
    near = difflib.get_close_matches(unknown, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error of the API in the words of the command line: ``resume=True`` is ``--resume``.

    Args:
        message: speaks of arguments in Python.
        flags: by the names of these arguments.
    """
    for name, option in flags.items():
        message = re.sub(rf"\b{name}=(True\b|(?=\s))", option, message)
        message = re.sub(rf"\b{name}=(['\"]?)([^\s'\"]+)\1", rf"{option} \2", message)
        words = rf"\b{name}\b" if "_" in name else rf"^{name}(?=:)"
        message = re.sub(words, option, message)
    return message


def _item_type(annotation: Any) -> tuple[Any, bool]:
    """The type of a value, and whether there may be several."""
    if _words_beside_bool(annotation):
        return bool, False
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) is list:
        return get_args(annotation)[0], True
    return annotation, False


def _words_beside_bool(annotation: Any) -> tuple[str, ...]:
    """("force",) of ``bool | Literal["force"]``."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return get_args(next(kind for kind in kinds if kind is not bool)) if bool in kinds else ()


def _word_or_nothing(words: tuple[str, ...], given: Any) -> Any:
    """The value of a flag with a word or without."""
    if given not in ("", *words, True, False):
        raise argparse.ArgumentTypeError(f"expected {' or '.join(words)} or nothing, got {given!r}")
    return given or given == ""


def _checks(kind: Any) -> dict[str, Any]:
    """How a value of this type is read."""
    if get_origin(kind) is Annotated:
        of, table = get_args(kind)
        return {"type": of, "choices": table.table}
    if get_origin(kind) is Literal:
        return {"type": str, "choices": get_args(kind)}
    return {"type": kind}


__all__ = ["CommandParser", "OneOf", "PositiveInt", "flag", "in_flags", "suggestion"]
