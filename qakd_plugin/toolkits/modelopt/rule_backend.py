"""Learned quantizers as ModelOpt finds and runs them: a backend under a name that it saves with a model."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ...quantizers import rule_from_dict

BACKEND = "qakd"
"""Under which ModelOpt finds learned quantizers."""


def quantizer_class() -> type[nn.Module] | None:
    """ModelOpt's TensorQuantizer, if ModelOpt is loaded: a model it prepared cannot exist otherwise."""
    module: Any = sys.modules.get("modelopt.torch.quantization.nn.modules.tensor_quantizer")
    if module is None:
        return None
    if not module.is_registered_quant_backend(BACKEND):
        # From here on ModelOpt can run, save and restore quantizers that were swapped.
        module.register_quant_backend(BACKEND, run_rule)
    kind: type[nn.Module] = module.TensorQuantizer
    return kind


def run_rule(inputs: Tensor, quantizer: Any) -> Tensor:
    """What ModelOpt calls in the place of its own arithmetic."""
    return rule_from_dict(quantizer.backend_extra_args)(inputs, quantizer)
