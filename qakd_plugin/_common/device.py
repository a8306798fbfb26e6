"""Networks on other devices, with what ``nn.Module.to`` leaves behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


def move(network: nn.Module, device: torch.device | str) -> None:
    """``network.to(device)``, in place, with the tensors that its graphs make on the way.

    ``torch.export`` writes the device of its example inputs into every ``zeros`` and ``arange`` of a graph, which a captured
    network would go on making there wherever it is moved.
    """
    network.to(device)
    make_tensors_on(network, device)


def make_tensors_on(network: nn.Module, device: torch.device | str) -> None:
    """Let the graphs in a network make their tensors on a device; a network without graphs is left as it is."""
    device = torch.device(device)

    def there(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for module in network.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        changed = False
        for node in module.graph.nodes:
            args, kwargs = fx.node.map_aggregate(node.args, there), fx.node.map_aggregate(node.kwargs, there)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs, changed = args, kwargs, True
        if changed:
            module.recompile()
