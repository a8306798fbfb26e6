"""A float network, prepared as another one was: what a student's file says of its preparation is done again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import QakdError
from ..quantizers.base import Rule, rule_from_dict
from ..tasks.inputs import device_of_network
from ..toolkits import adapter_for
from .exchange import install_rules
from .prepared import prepare_as
from .recorded import inputs_like


def learned_rules(model: nn.Module) -> dict[str, Rule]:
    """What the learned quantizers of a prepared model compute, by their names."""
    adapter = adapter_for(model)
    found = {quantizer.fqn: adapter.learned(quantizer) for quantizer in adapter.quantizers(model)}
    return {name: rule for name, rule in found.items() if rule is not None}


def prepare_again(network: nn.Module, preparation: Mapping[str, Any], rules: Mapping[str, Any]) -> nn.Module:
    """A prepared copy, ready for the state_dict of a student: its ranges are of drawn numbers, and mean nothing.

    Args:
        network: in floating point.
        preparation: :meth:`.recorded.Preparation.as_dict` of the student.
        rules: :meth:`Rule.as_dict` of each learned quantizer, by its name.

    Raises:
        QakdError: the network is another one than the student's, or is prepared already.
    """
    try:
        given = dict(preparation)
        batch = inputs_like(given.pop("inputs"), device_of_network(network))
        given.setdefault("placement", 1)  # of files that do not say it
        prepared = prepare_as(_without_zero_gammas(network), [batch], batch_fn=_is_inputs, **given)
        install_rules(prepared, {name: rule_from_dict(rule) for name, rule in rules.items()})
    except QakdError as error:
        raise QakdError(f"model cannot be prepared as the student was: {error}") from error
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:  # of a network that takes other inputs
        reason = " ".join(str(error).split())[:300]
        raise QakdError(
            f"model ({type(network).__name__}) cannot be prepared as the student was: {reason}. Pass one of the "
            "student's own architecture."
        ) from error
    return prepared


@torch.no_grad()
def _without_zero_gammas(network: nn.Module) -> nn.Module:
    """A copy: a new residual network may begin with gammas of 0, and what is 0 throughout has no range."""
    changed = copy.deepcopy(network)
    for module in changed.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            weight[weight == 0] = 1
    return changed


def _is_inputs(batch: Any) -> tuple[Any, None]:
    return batch, None
