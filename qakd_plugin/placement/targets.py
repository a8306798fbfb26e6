"""What a student can be deployed with."""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["tensorrt", "onnxruntime", "openvino"]
TARGETS: tuple[Target, ...] = get_args(Target)

WeightStorage = Literal["int8", "int4", "int2"]
"""The narrowest type in the file of weights beside quantized activations."""
