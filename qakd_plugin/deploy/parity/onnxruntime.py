"""A file in memory, run in ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...errors import ExportError
from ...runtimes.onnxruntime import session_options, start_session
from .report import Array

_NODE = re.compile(r"""(?:node with name |Name:|[Nn]ode[:,]? \()['"]?([^'",\s)]+)""")
"""How the runtime names the node that it cannot take, in the messages that name one."""


def run(file: ir.Model, samples: Tensor, *, fusions: bool, names: Sequence[str] | None = None) -> list[Array]:
    """What a file outputs, as float32.

    Args:
        file: with one input.
        samples: float32 (N, ...).
        fusions: let the runtime optimize the graph.
        names: of the outputs; all of them by default.

    Raises:
        ExportError: the runtime cannot load or run the file; names the node where the runtime does.
    """
    doing = "load"
    try:
        session = start_session(ir.serde.serialize_model(file).SerializeToString(), session_options(fusions=fusions))
        doing = "run"
        found = session.run(names, {session.get_inputs()[0].name: samples.numpy()})
    except Exception as error:  # the runtime's own exception types, and protobuf's, share no other base class
        reason = " ".join(str(error).split())
        node = _NODE.search(reason)
        raise ExportError(
            f"{node[1] if node else 'the file'}: ONNX Runtime cannot {doing} what was exported, so it cannot be proven: "
            f"{reason[:300]}"
        ) from error
    return [np.asarray(one, dtype=np.float32) for one in found]
