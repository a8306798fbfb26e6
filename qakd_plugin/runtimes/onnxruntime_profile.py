"""ONNX Runtime's own record of how long each node took."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QakdError

_SUFFIX = re.compile(r"(_token_\d+)?_kernel_time$")
"""Of a node's name in the record; nodes that the runtime fused carry a token of their own."""

_PRECISIONS = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class NodeTimes:
    """One node of the graph that the runtime ran, which may be several of the file, fused.

    Attributes:
        name: as in the file, or what the runtime made of it.
        operator: of the runtime: "QLinearConv", "FusedConv", ...
        precision: type of the first input: "uint8", "float32", ...
        times_ms: of each call, in order.
    """

    name: str
    operator: str
    precision: str
    times_ms: tuple[float, ...]

    def median_ms(self, warm_up: int) -> float:
        """Median without the first ``warm_up`` calls; 0 where there are no others.

        Not the mean: one interruption by the system lasts longer than most layers.
        """
        times = self.times_ms[warm_up:]
        return float(np.median(times)) if times else 0.0


def read_profile(path: str | os.PathLike[str]) -> list[NodeTimes]:
    """The nodes in a file that ``session.end_profiling()`` wrote, in the order of their first calls.

    Raises:
        QakdError: the file cannot be read, or is no such record.
    """
    try:
        return _nodes(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise QakdError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QakdError(
            f"{path} is no profile of ONNX Runtime ({type(error).__name__}: {str(error)[:200]}). Record it again."
        ) from error


def _nodes(events: Iterable[Mapping[str, Any]]) -> list[NodeTimes]:
    calls: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for event in events:
        name, count = _SUFFIX.subn("", event["name"])
        if event.get("cat") == "Node" and count:
            calls.setdefault((event["args"]["node_index"], name), []).append(event)
    return [
        NodeTimes(
            name,
            found[0]["args"]["op_name"],
            _precision(found[0]["args"].get("input_type_shape", [])),
            tuple(event["dur"] / 1e3 for event in found),
        )
        for (_, name), found in calls.items()
    ]


def _precision(inputs: Iterable[Mapping[str, Any]]) -> str:
    first = next((kind for value in inputs for kind in value), "unknown")
    return _PRECISIONS.get(first, first)
