"""How ONNX Runtime is started here: proofs, measurements and tuning run with the same options.

``session.x64quantprecision`` is not among them. It is ONNX Runtime's remedy for x86 processors without VNNI, whose kernels for
unsigned activations and signed weights add pairs of products in 16 bits, which saturate. But it takes effect with VNNI too, and
ONNX Runtime then fails to load files in which layers share a zero point, as those of ``ort_form`` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._optional import require


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
    if not fusions:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return options
