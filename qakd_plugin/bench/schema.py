"""What a report may hold: models of its document, from which its JSON schema is generated and which check it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # typing's own lack what pydantic needs before Python 3.12
)

from annotated_types import Ge, Le
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from ..deploy.file_record import Proof
from ..errors import QakdError
from .rows import Row

SCHEMA_VERSION = 3
"""3: rows hold the numbers of any metric, agreement output by output, what they lose against FP32, and their file's record.
2: a report may hold several runs, each with its environment; rows name their run. Version 1 had one."""

_DEEPEST = 32
_LARGEST = 2**63
"""Bounds of what a report may nest and count: anything beyond comes from a damaged file."""

_FIELDS = dict.fromkeys(("unexpected_keyword_argument", "extra_forbidden"), "is no field that a report has.")
_FIELDS["missing"] = "is missing."

_Many = Annotated[int, Ge(0), Le(2**53)]


# Of a document, nothing but what is named; of what others wrote, what is named has a type, and the rest is carried along.
_closed = with_config(ConfigDict(strict=True, extra="forbid"))
_open = with_config(ConfigDict(strict=True, extra="allow"))


@_open
class Environment(TypedDict, total=False):
    """The machine and the versions of one run."""

    cpu: str
    versions: dict[str, str]


@_closed
class Run(TypedDict):
    """What rows that were measured together share."""

    created: str
    environment: Environment
    seeds: NotRequired[dict[str, int]]
    notes: NotRequired[list[str]]
    warnings: NotRequired[list[str]]


@_open
class Training(TypedDict):
    """One run of ``distill``; its history has an entry for each epoch."""

    name: str
    history: list[dict[str, Any]]


@_open
class Parity(Proof):
    """The proof of one exported file: ``ParityReport.as_dict()`` and its name."""

    name: str


@_open
class Library(TypedDict, total=False):
    """What built an engine."""

    name: str
    version: str


@_open
class Layers(TypedDict, total=False):
    """Layers of an engine: in integers, and all."""

    int8: Annotated[int, Ge(0)]
    total: Annotated[int, Ge(0)]


@_open
class Engine(TypedDict):
    """The manifest of one engine and its name; where its layers are not known, a text says why."""

    name: str
    sha256: str
    bytes: NotRequired[_Many]
    runtime: NotRequired[Library]
    convolutions: NotRequired[str | Layers]
    matmuls: NotRequired[str | Layers]


@_closed
class Report(TypedDict):
    """A whole ``report.json``."""

    schema_version: Literal[3]
    title: str
    created: str
    runs: Annotated[list[Run], Field(min_length=1)]
    rows: list[Row]
    training: NotRequired[list[Training]]
    parity: NotRequired[list[Parity]]
    engines: NotRequired[list[Engine]]


_REPORT = TypeAdapter(Report)


def schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_REPORT.json_schema()}


def validate(document: Mapping[str, Any]) -> None:
    """Check a report document.

    Raises:
        QakdError: names the place and what was expected.
    """
    _check_plain(document)
    try:
        _REPORT.validate_json(json.dumps(document))
    except ValidationError as error:
        raise QakdError(f"report: {_first(error, document)}") from error
    runs = len(document["runs"])
    for index, row in enumerate(document["rows"]):
        if row.get("run", 0) >= runs:
            raise QakdError(
                f"report: rows/{index}/run: {row.get('run', 0)} was given, and the report has {runs} runs: name one of them."
            )


def _first(error: ValidationError, document: Mapping[str, Any]) -> str:
    """The first problem on one line; of those in one place the innermost, which says most where several types are allowed."""
    problems = error.errors(include_url=False)
    inner = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    problem = max(inner, key=lambda found: len(found["loc"]))
    what = _FIELDS.get(problem["type"]) or f"{problem['msg'][:200]}, got {problem['input']!r:.60}."
    return f"{_place(_within(document, problem['loc'], is_missing=problem['type'] == 'missing'))}: {what}"


def _within(document: Any, location: tuple[Any, ...], is_missing: bool) -> list[Any]:
    """The parts of a location that lead somewhere; pydantic also names the type where several are allowed."""
    place, value = [], document
    for part in location:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list | tuple) and isinstance(part, int)):
            place.append(part)
            value = value[part]
    return [*place, location[-1]] if is_missing else place


def _check_plain(document: Mapping[str, Any]) -> None:
    """Refuse what JSON, HTML or arithmetic would choke on later: NaN, giant numbers, lone surrogates, deep nesting."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        problem = _problem(value, len(place))
        if problem:
            raise QakdError(f"report: {_place(place)}: {problem}")
        if isinstance(value, dict):
            waiting += [((*place, key), inner) for key, inner in value.items()]
            waiting += [((*place, "a key"), object() if isinstance(key, tuple) else key) for key in value]
        elif isinstance(value, list | tuple):
            waiting += [((*place, index), inner) for index, inner in enumerate(value)]


def _place(path: Iterable[Any]) -> str:
    return "/".join(str(part)[:40] for part in path) or "the document"


def _problem(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST:
        return f"nested more than {_DEEPEST} levels deep."
    if isinstance(value, str):
        return None if value.isascii() or value.encode(errors="replace").decode() == value else "text with a lone surrogate."
    if value is None or isinstance(value, bool | dict | list | tuple):
        return None
    if not isinstance(value, int | float):
        return f"{type(value).__name__} is no JSON type."
    if isinstance(value, int):
        return "a number beyond 2^63." if abs(value) > _LARGEST else None
    return None if math.isfinite(value) else f"{value} is not a finite number."
