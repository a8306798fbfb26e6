"""The command ``qakd``: finds the command that is meant, and says in one line what went wrong.

Nothing but the standard library is imported before the command is known, so that ``qakd --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .._common.text import visible
from ..errors import QakdError


@dataclass(frozen=True)
class Command:
    """A function of a module beside this one.

    Attributes:
        module: its name.
        text: one line for ``qakd --help``.
        stopped: what is said after Ctrl-C.
        renamed: flags whose names differ from those of the arguments in Python that errors speak of.
        alone: flags for runs without a recipe, of which errors in a recipe's run do not speak.
        printed: a flag that prints what a function returns, in place of running the command: flag, module, function, help.
    """

    module: str
    text: str
    stopped: str
    renamed: dict[str, str] = field(default_factory=dict)
    alone: tuple[str, ...] = ()
    printed: tuple[str, str, str, str] | None = None


VERBOSE, QUIET = "say more", "say nothing but how it ends, and errors"

COMMANDS = {
    "demo": Command(
        "measure",
        "the whole pipeline on handwritten digits: train, distill, export, measure, report",
        "What was finished is kept: run the same command to go on.",
    ),
    "distill": Command(
        "train",
        "train a prepared model with a teacher",
        "Run the same command with --resume to go on from the last checkpoint, if one was written.",
        {"checkpoint_dir": "--out"},
        ("model", "weights", "data", "toolkit", "bits", "method", "target", "size", "mean", "std", "batch"),
        ("--print-config", "recipe_template", "commented_recipe", "print a commented YAML recipe to start from"),
    ),
    "rank": Command(
        "train",
        "rank augmentations with the teacher alone, by contextual mutual information",
        "Nothing was written.",
    ),
    "sensitivity": Command(
        "train",
        "measure how much each layer's quantizers cost, and which layers to keep in floating point",
        "Nothing was written.",
    ),
    "export": Command("deploy", "write a trained, prepared model as ONNX, gated on parity", "Nothing half-written was left."),
    "export-float": Command(
        "deploy", "write the float network of a recipe as ONNX, to compare with", "Nothing half-written was left."
    ),
    "val": Command("answers", "count how often an ONNX file or an engine is right", "Nothing was written."),
    "predict": Command("answers", "print the classes that a file sees in images", "Nothing was written."),
    "tune": Command("deploy", "fit a file for ONNX Runtime to this machine's processor, by measuring", "Nothing was written."),
    "engine": Command(
        "deploy",
        "build a TensorRT or TensorRT-RTX engine from canonical ONNX",
        "Nothing half-written was left.",
        {"capabilities": "--capability"},
    ),
    "bench": Command(
        "measure",
        "measure ONNX files and engines side by side and write a report",
        "No report was written.",
        {"batch_sizes": "--batch", "runtimes": "--runtime"},
    ),
    "report": Command(
        "measure",
        "make HTML and Markdown of a report.json, or one of several: runs of several machines beside each other",
        "No report was written.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C. A wrong command line exits with 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    at = next((index for index, word in enumerate(given) if not word.startswith("-")), len(given))
    options = _parser().parse_args(given[: at + 1])
    before = [word for word, said in (("--verbose", options.verbose), ("--quiet", options.quiet)) if said]
    return _run(options.command, [*before, *given[at + 1 :]])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and exit status 2."""
        print(f"{self.prog}: error: {visible(message)} ({self.prog} --help explains)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    """Reads what comes before a command's own arguments, and its name."""
    parser = _Parser(
        prog="qakd",
        description="Quantization-aware distillation, from a prepared model to hardware.",
        epilog="qakd COMMAND --help explains a command.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.text, add_help=False)
    return parser


def _run(name: str, arguments: Sequence[str]) -> int:
    from .noise import quiet
    from .options import CommandParser, in_flags
    from .value_types import RecipeError

    command = COMMANDS[name]
    function = getattr(importlib.import_module(f".{command.module}", __package__), name.replace("-", "_"))
    parser = CommandParser(name, command.text, function)
    parser.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    if command.printed is not None:
        parser.add_printing_flag(*command.printed)
    values = {name: _plain(value) for name, value in vars(parser.read(arguments)).items()}
    verbose, silent = values.pop("verbose"), values.pop("quiet")
    try:
        with _logging(verbose=verbose, silent=silent), quiet():
            function(**values)
    except QakdError as error:
        silent_on = command.alone if values.get("recipe") is not None else ()
        flags = {key: option for key, option in parser.flags.items() if key not in silent_on} | command.renamed
        text = str(error) if isinstance(error, RecipeError) else in_flags(str(error), flags)
        print(f"qakd: error: {visible(text)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nqakd: stopped. {command.stopped}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _logging(*, verbose: bool, silent: bool) -> Iterator[None]:
    """Show log records, each as one line. Our own tell how far a run is where there is no terminal, and so no progress bar.

    Args:
        verbose: show what others say as well, and ours on a terminal, too.
        silent: show errors only.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    usual = logging.ERROR if silent else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=usual, handlers=[handler])
    own = logging.getLogger(__name__.partition(".")[0])
    before = own.level
    own.setLevel(usual if silent or sys.stderr.isatty() else logging.INFO)
    try:
        yield
    finally:
        own.setLevel(before)


class _OneLine(logging.Formatter):
    """A record as one line that a terminal only shows."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _plain(value: Any) -> Any:
    """A number as a number: jsonargparse's own classes of int would go into checkpoints, which hold plain data only."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
