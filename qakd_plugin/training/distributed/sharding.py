"""Networks divided among processes by FSDP2, for loops with :func:`qakd_plugin.attach`: weights, gradients, optimizer states.

Example, in each process that torchrun started::

    whole = copy.deepcopy(prepared_model)              # on the CPU: for the export
    prepared_model, teacher = shard(prepared_model.cuda()), shard(teacher.cuda())
    optimizer = torch.optim.AdamW(prepared_model.parameters())
    with qakd.attach(prepared_model, teacher) as kd:
        ...                                            # the loop of one process, on this process's share of each batch
    whole.load_state_dict(gathered(prepared_model))    # in all processes
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, fx, nn

from ...errors import NotPreparedError, QakdError
from ...toolkits import adapter_for

_SHARDED = ("modelopt", "torchao")
"""Toolkits whose quantizers are called where the whole weight of their layer is at hand."""
_WERE_SCALARS = "_qakd_were_scalars"


def shard(network: nn.Module) -> nn.Module:
    """Divide a network among all processes, in place, by ``torch.distributed.fsdp.fully_shard``.

    Units are the entries of every ``nn.ModuleList``, as transformers keep their blocks, and the network: the weights of one
    unit at a time are whole, on each process, while it computes. Parameters that are numbers, as learned scales of activations
    are, become tensors of one element, which can be divided. Make optimizers after this.

    Args:
        network: a student prepared by ModelOpt or QATConfig, or any float network, on the device where it computes.

    Returns:
        The same network.

    Raises:
        QakdError: there are no processes, or a toolkit prepared the network whose quantizers would see a part of each weight.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import fully_shard

    _require_divisible(network)
    device = next(network.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _without_scalars(network)
    for unit in _units(network):
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def gathered(network: nn.Module) -> dict[str, Any]:
    """The whole state of a network that was divided, on the CPU: for ``load_state_dict`` of one that was not, and to be kept.

    Call it in all processes, which wait for each other. A network that was not divided gives its state as it is.
    """
    state = network.state_dict()
    scalars = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        for name in module.__dict__.get(_WERE_SCALARS, ())
    }
    for name, value in state.items():  # a module's own extra state is no tensor
        if isinstance(value, Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[name] = (whole.reshape(()) if name in scalars else whole).detach().cpu()
    return state


def _units(network: nn.Module) -> list[nn.Module]:
    """Entries of every list that are called themselves and hold parameters; inner ones first, each once."""
    entries = [entry for module in network.modules() if isinstance(module, nn.ModuleList) for entry in module]
    called = [entry for entry in entries if not isinstance(entry, nn.ModuleList | nn.ModuleDict)]
    return [entry for entry in reversed(dict.fromkeys(called)) if next(entry.parameters(), None) is not None]


def _without_scalars(network: nn.Module) -> None:
    for module in network.modules():
        scalars = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 0]
        for name in scalars:
            number = module._parameters[name]
            assert number is not None
            module._parameters[name] = nn.Parameter(number.detach().reshape(1), requires_grad=number.requires_grad)
        if scalars:
            module.__dict__[_WERE_SCALARS] = tuple(scalars)


def _require_divisible(network: nn.Module) -> None:
    if not dist.is_initialized():
        raise QakdError(
            "shard divides a network among processes, and there are none. Launch with torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    try:
        toolkit = adapter_for(network).name
    except NotPreparedError:  # a teacher
        toolkit = None
    if (toolkit is None or toolkit in _SHARDED) and not any(isinstance(module, fx.GraphModule) for module in network.modules()):
        return
    what = "is a captured graph" if toolkit is None else f"was prepared by {toolkit}"
    raise QakdError(
        f"{type(network).__name__} {what} and cannot be divided: weights are read beside the layers that hold them, where each "
        "process has a part. Prepare with toolkit='modelopt' or 'torchao', or train data parallel: qakd.distill, or "
        "DistributedDataParallel around the network."
    )
