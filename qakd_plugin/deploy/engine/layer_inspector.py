"""What TensorRT's engine inspector says about a loaded engine: on a GPU only, where :mod:`.plan` needs none.

Read is what NVIDIA documents for engines built with detailed profiling verbosity. Whatever does not look so, such as what is
fused into one block by Myelin, means "unknown". Nothing here has been run on a GPU yet.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .bindings import Runtime, collecting_logger
from .rtx_plan import Kind, PlanContents, PlanLayer

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f\n]*)\]")
_TYPES = (("int8", "int8"), ("int4", "int4"), ("fp16", "half"), ("half", "half"), ("fp32", "float"), ("float", "float"))


def inspect_plan(library: Runtime, plan: bytes, inputs: dict[str, tuple[int, ...]]) -> PlanContents | None:
    """Load a plan that was just built, and ask the inspector; None where that cannot be done or says nothing.

    Args:
        library: that built the plan.
        plan: trusted, since it was never out of this process.
        inputs: sizes to inspect it at: formats of dynamic shapes are not shown otherwise.
    """
    trt = library.module
    logger, _ = collecting_logger(library)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if context is None or not all(context.set_input_shape(name, shape) for name, shape in inputs.items()):
        return None
    return read_report(ask(library, engine, context))


def ask(library: Runtime, engine: Any, context: Any) -> str:
    """The inspector's JSON for an engine, at the shapes set in a context."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(library.module.LayerInformationFormat.JSON))


def read_report(text: str) -> PlanContents | None:
    """Convolutions and matrix products of the inspector's JSON; None where it shows none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    entries = document.get("Layers") if isinstance(document, dict) else None
    layers = [layer for entry in entries or () if isinstance(entry, dict) and (layer := _layer(entry)) is not None]
    return PlanContents(tuple(layers), sum(layer.stored == "int4" for layer in layers)) if layers else None


def _layer(entry: dict[str, Any]) -> PlanLayer | None:
    """A layer with weights; what reformats, pools or adds is none."""
    weights, inputs = entry.get("Weights"), entry.get("Inputs")
    if entry.get("ParameterType") not in ("Convolution", "MatrixMultiply") or not isinstance(weights, dict):
        return None
    first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
    data, stored = _type(first.get("Format/Datatype")), _type(weights.get("Type"))
    product = re.search("gemm|matmul|matrixmultiply|fullyconnected", str(entry.get("LayerType")).lower())
    kind: Kind = "matmul" if product else "convolution"
    made_from = tuple(_ONNX_LAYER.findall(str(entry.get("Metadata", ""))))
    return PlanLayer(str(entry.get("Name")), kind, (data, stored), made_from, None if stored == "unknown" else stored)


def _type(text: Any) -> str:
    words = str(text).lower()
    return next((name for word, name in _TYPES if word in words), "unknown")
