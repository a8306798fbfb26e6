"""BatchNorms that the user froze: where gamma and beta need no gradient, running statistics stay as they are."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_frozen(gamma: Tensor | None, beta: Tensor | None) -> bool:
    """Whether a BatchNorm with these numbers is frozen. Its mode cannot say: toolkits set that of all modules.

    One without gamma is none, in whose place ``prepare_qat_pt2e`` puts ones that are no parameter.
    """
    return isinstance(gamma, nn.Parameter) and not gamma.requires_grad and (beta is None or not beta.requires_grad)


def set_training(model: nn.Module, training: bool) -> None:
    """``model.train(training)``, but frozen BatchNorms stay in eval mode."""
    model.train(training)
    for module in model.modules() if training else ():
        if isinstance(module, _BatchNorm) and is_frozen(module.weight, module.bias):
            module.eval()
