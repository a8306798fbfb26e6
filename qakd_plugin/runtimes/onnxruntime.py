"""How ONNX Runtime is started here: proofs, measurements and tuning run with the same options.

On x86 processors without VNNI, ``session.x64quantprecision`` is one of them: the kernels for unsigned activations and signed
weights add pairs of products in 16 bits there, which saturate, and with it ONNX Runtime makes the weights unsigned, whose
kernels do not. It takes effect with VNNI too, where it only costs time.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from .._common.cpu_features import adds_products_in_16_bits
from .._common.optional import require

_log = logging.getLogger(__name__)

_PRECISION = "session.x64quantprecision"


def session_options(threads: int = 0, *, fusions: bool = True, profile: Path | None = None) -> Any:
    """Options of a session on the CPU.

    Args:
        threads: for one operator, operators run one after the other; 0 lets the runtime choose.
        fusions: let the runtime optimize the graph.
        profile: beginning of the path where each node's time is recorded, which slows it down; None to record nothing.

    Returns:
        ``onnxruntime.SessionOptions``.
    """
    onnxruntime = require("onnxruntime", extra="all", purpose="run ONNX files")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Threads would go on spinning after a call, while another session is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if adds_products_in_16_bits():
        options.add_session_config_entry(_PRECISION, "1")
    if not fusions:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return options


def start_session(model: bytes | str | os.PathLike[str], options: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: its bytes, or the path of its file.
        options: from :func:`session_options`.

    Raises:
        Exception: ONNX Runtime cannot load it; its own exception types share no other base class.
    """
    onnxruntime = require("onnxruntime", extra="all", purpose="run ONNX files")
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime makes a weight unsigned once for each layer that reads it, and fails the second time.
        if "replace the existing tensor" not in str(error) or not adds_products_in_16_bits():
            raise
        _log.warning(
            "layers share a weight, which ONNX Runtime's %s does not take: on this processor, which has no VNNI, sums of "
            "products saturate in 16 bits.",
            _PRECISION,
        )
        options.add_session_config_entry(_PRECISION, "0")
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
