"""ModelOpt's quantizer with a learned rule, in whatever memory format its input has. Imported only where ModelOpt is in use."""

from __future__ import annotations

from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor
from torch.nn import Parameter

from .rule_backend import BACKEND, run_rule


class LearnedTensorQuantizer(TensorQuantizer):  # type: ignore[misc]
    """A TensorQuantizer that carries out a learned rule on its input as it lies in memory.

    ModelOpt's own forward makes every input contiguous, which its FP4 kernels need. In a network in channels_last this costs
    two copies per layer. Wherever ModelOpt would do more than call the rule, its own forward runs; both compute the same.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        alone = self.backend == BACKEND and self._if_quant and not (self._disabled or self._if_calib or self.rotate_is_enabled)
        if alone and type(inputs) in {Tensor, Parameter} and self.pre_quant_scale is None and self.block_sizes is None:
            return run_rule(inputs, self)
        return super().forward(inputs)  # type: ignore[no-any-return]
