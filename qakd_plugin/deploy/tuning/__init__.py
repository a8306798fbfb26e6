"""A file for ONNX Runtime, fitted to the processor that it will run on, by measuring there.

ONNX Runtime's convolutions with symmetric weights run on kernels that cannot use a matrix unit (AMX). With a weight zero point
of -1 and codes lowered by one, which are the same numbers, it takes its matrix product instead, which can. For some layers that
is faster on processors with AMX, for others slower, and elsewhere rarely of use; so it is measured, layer by layer. Such a file
is for ONNX Runtime alone: TensorRT rejects it, and OpenVINO computes it in floating point.
"""

from .tune import Tuning, tune_for_host
from .zero_point import eligible_layers, with_weight_zero_point

__all__ = ["Tuning", "eligible_layers", "tune_for_host", "with_weight_zero_point"]
