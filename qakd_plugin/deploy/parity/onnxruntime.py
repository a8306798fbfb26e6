"""A file in memory, run in ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from ...errors import KEEP_FLOAT, ExportError
from ...runtimes.onnxruntime import session_options, start_session
from ...tasks.inputs import Inputs, named_tensors
from .report import Array, as_array, as_float32

_NODE = re.compile(r"""(?:node with name |Name:|[Nn]ode[:,]? \()['"]?([^'",\s)]+)""")
"""How the runtime names the node that it cannot take, in the messages that name one."""


class Session:
    """A file in memory, loaded.

    Args:
        file: any.
        fusions: let the runtime optimize the graph.

    Raises:
        ExportError: the runtime cannot load the file; names the node where the runtime does.
    """

    def __init__(self, file: ir.Model, *, fusions: bool) -> None:
        self._inputs = [value.name for value in file.graph.inputs]
        options = session_options(fusions=fusions)
        # What one run takes is given back after it: several sessions lie beside each other here, and each runs once or twice.
        options.enable_cpu_mem_arena = False
        with _told("load"):
            self._session = start_session(ir.serde.serialize_model(file).SerializeToString(), options)

    def run(self, samples: Inputs, names: Sequence[str] | None = None) -> list[Array]:
        """What the file outputs: floats as float32, integers and truth values as they are.

        Args:
            samples: its tensors are the file's inputs, in order.
            names: of the outputs; all of them by default.

        Raises:
            ExportError: the runtime cannot run the file.
        """
        feeds = dict(zip(self._inputs, map(as_array, named_tensors(samples).values()), strict=True))
        with _told("run"):
            return [as_float32(np.asarray(one)) for one in self._session.run(names, feeds)]


@contextmanager
def _told(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the runtime's own exception types, and protobuf's, share no other base class
        reason = " ".join(str(error).split())
        node = _NODE.search(reason)
        raise ExportError(
            f"{node[1] if node else 'the file'}: ONNX Runtime cannot {doing} what was exported, so it cannot be proven: "
            f"{reason[:300]}. {KEEP_FLOAT}"
        ) from error


def run(file: ir.Model, samples: Inputs, *, fusions: bool, names: Sequence[str] | None = None) -> list[Array]:
    """Load a file, and run it once: see :class:`Session`."""
    return Session(file, fusions=fusions).run(samples, names)
