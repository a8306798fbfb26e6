"""Dampening: weights are drawn to the grid point they round to, so that they do not oscillate between two."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QakdError
from ..toolkits import Adapter, Quantizer


class Dampening:
    """The sum over quantized weights of ``|sg[q(w)] - clip(w)|^2``, with q(w) the grid point and clip(w) within the grid.

    No gradient reaches the grid, and none a weight beyond its ends. Weights are as their quantizers see them, with BatchNorm
    folded in where the toolkit does that.

    Args:
        adapter: of the toolkit that prepared ``model``.
        model: the student, whose quantizers get hooks until :meth:`remove`.

    Raises:
        QakdError: no weight is quantized, or the grid of one is not that of the weight itself; names it.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv 2203.11086.
    """

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        self._adapter = adapter
        self._quantizers = [quantizer for quantizer in adapter.quantizers(model) if quantizer.role == "weight"]
        for quantizer in self._quantizers:
            rule = adapter.learned(quantizer)
            if (rule is not None and rule.transforms_weight) or adapter.qparams(quantizer).block is not None:
                raise QakdError(
                    f"dampening: {quantizer.fqn} rounds more than the weight itself (tanh of DoReFa and PACT, EWGS's interval, "
                    "blocks). Take qakd.LSQ() or the toolkit's own quantizers, or leave dampening out."
                )
        if not self._quantizers:
            raise QakdError("dampening: no weight of prepared_model is quantized. Leave it out.")
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = [q.module.register_forward_hook(_keep(self._seen, q.fqn)) for q in self._quantizers]

    def added(self, loss: Tensor, parts: dict[str, Tensor], weight: float, progress: float) -> Tensor:
        """``loss`` with the dampening of the batch just seen; it is listed, unweighted, in ``parts`` as "dampening".

        Args:
            loss: ().
            parts: of the loss, by name.
            weight: at the end of training.
            progress: share of training that is done; the weight grows with it by half a cosine, from 0.
        """
        distances = [self._distance(q, *self._seen.pop(q.fqn)) for q in self._quantizers if q.fqn in self._seen]
        total = torch.stack(distances).sum()
        parts["dampening"] = total.detach()
        return loss + weight * 0.5 * (1 - math.cos(math.pi * progress)) * total

    def _distance(self, quantizer: Quantizer, weight: Tensor, rounded: Tensor) -> Tensor:
        params = self._adapter.qparams(quantizer)
        scale, zero_point = params.scale.detach(), params.zero_point
        if params.axis is not None:
            shape = [-1 if dim == params.axis else 1 for dim in range(weight.ndim)]
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        low, high = ((limit - zero_point) * scale for limit in (params.quant_min, params.quant_max))
        return (torch.clamp(weight.float(), low, high) - rounded.detach().float()).square().sum()

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()


def _keep(found: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            found[name] = args[0], output

    return hook
