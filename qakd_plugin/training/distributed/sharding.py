"""Networks divided among processes by FSDP2: weights, gradients, optimizer states.

:func:`qakd_plugin.distill` divides copies where it is launched for it. In a loop with :func:`qakd_plugin.attach`, in each
process that torchrun started::

    whole = copy.deepcopy(prepared_model)              # on the CPU: for the export
    prepared_model, teacher = shard(prepared_model.cuda()), shard(teacher.cuda())
    optimizer = torch.optim.AdamW(prepared_model.parameters())
    with qakd.attach(prepared_model, teacher) as kd:
        ...                                            # the loop of one process, on this process's share of each batch
    whole.load_state_dict(gathered(prepared_model))    # in all processes
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..._common.module_copy import copied
from ...errors import NotPreparedError, QakdError
from ...toolkits import adapter_for
from ..ema import Ema

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
    require_divisible(network)
    _divide(network, next(network.parameters()).device)
    return network


def divided_copy(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy that is divided among all processes, with the first one's numbers; no more than one unit is whole on ``device``.

    Args:
        network: as for :func:`shard`, on any device, for instance the CPU. It is left as it is.
        device: where the copy computes.

    Raises:
        QakdError: as :func:`shard`.
    """
    require_divisible(network)
    made = copied(network)
    with torch.no_grad():
        for tensor in chain(made.parameters(), made.buffers()):
            there = tensor.detach().to(device).contiguous()
            dist.broadcast(there, 0)
            tensor.copy_(there)
    _divide(made, device)
    return made


def is_divided(network: nn.Module) -> bool:
    """Whether each process has a part of its weights."""
    return any(_is_part(parameter) for parameter in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which wait for each other; as it is where it was not divided."""
    joined: Tensor = tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]
    return joined


def gathered(network: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The whole state of a network that was divided, copied to the CPU: for ``load_state_dict`` of one that was not.

    Call it in all processes, which wait for each other. The state of a network that was not divided is copied as it is.

    Args:
        network: divided or not.
        keep: whether this process needs the numbers; its tensors are empty otherwise.
    """
    state = network.state_dict()
    scalars = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        for name in module.__dict__.get(_WERE_SCALARS, ())
    }
    for name, value in state.items():  # a module's own extra state is no tensor
        state[name] = _on_host(value, name in scalars, keep) if isinstance(value, Tensor) else copy.deepcopy(value)
    return state


def load_gathered(network: nn.Module, state: Mapping[str, Any]) -> None:
    """``network.load_state_dict`` with the state of a whole network, into one that may be divided."""
    if is_divided(network):
        own, whole_state = network.state_dict(), state
        state = copy.copy(whole_state)  # with the versions of modules, which some of them look for
        for name, value in whole_state.items():
            if name in own:
                state[name] = _like(value, own[name])  # type: ignore[index]
    network.load_state_dict(state)


class WholeNetwork:
    """The state of a divided network in checkpoints, which know of no division.

    Args:
        network: divided.
        keep: whether this process writes it.
    """

    def __init__(self, network: nn.Module, *, keep: bool) -> None:
        self._network, self._keep = network, keep

    def state_dict(self) -> dict[str, Any]:
        """As of the whole network."""
        return gathered(self._network, keep=self._keep)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From that of a whole network."""
        load_gathered(self._network, state)


class WholeOptimizer:
    """The same of an optimizer of a divided network.

    Args:
        optimizer: of its parameters.
        network: divided.
        keep: whether this process writes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, network: nn.Module, *, keep: bool) -> None:
        self._optimizer, self._keep = optimizer, keep
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = _scalars(network)
        self._are_scalars = [id(parameter) in numbers for parameter in self._parameters]

    def state_dict(self) -> dict[str, Any]:
        """As for the whole network."""
        state = self._optimizer.state_dict()
        state["state"] = {
            index: {
                name: _on_host(value, self._are_scalars[index], self._keep) if isinstance(value, Tensor) else value
                for name, value in content.items()
            }
            for index, content in state["state"].items()
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From that for a whole network."""
        found = state["state"]
        # A number for a weight is one of the optimizer's own, such as "step", for a scale as well.
        numbers = {
            name
            for index, content in found.items()
            for name, value in content.items()
            if not self._are_scalars[index] and not (isinstance(value, Tensor) and value.ndim)
        }
        parts = {
            index: {
                name: value if name in numbers else _like(value, self._parameters[index]) for name, value in content.items()
            }
            for index, content in found.items()
        }
        self._optimizer.load_state_dict({**state, "state": parts})


class WholeEma:
    """The same of an average of a divided network.

    Args:
        ema: of its parameters.
        network: divided.
        keep: whether this process writes it.
    """

    def __init__(self, ema: Ema, network: nn.Module, *, keep: bool) -> None:
        self._ema, self._keep = ema, keep
        numbers = _scalars(network)
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._are_scalars = [id(parameter) in numbers for parameter in self._parameters]

    def state_dict(self) -> dict[str, Any]:
        """As of the whole network."""
        state = self._ema.state_dict()
        means = zip(state["means"], self._are_scalars, strict=True)
        return state | {"means": [_on_host(mean, scalar, self._keep) for mean, scalar in means]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From that of a whole network."""
        pairs = zip(state["means"], self._parameters, strict=True)
        self._ema.load_state_dict(state | {"means": [_like(mean, parameter) for mean, parameter in pairs]})


def require_divisible(network: nn.Module) -> None:
    """Raise QakdError where there are no processes, or a network cannot be divided; says why."""
    if not dist.is_initialized():
        raise QakdError(
            "shard divides a network among processes, and there are none. Launch with torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    name = type(network).__name__
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise QakdError(f"{name} has lazy layers, whose weights have no shape yet. Call it on a batch first.")
    try:
        toolkit = adapter_for(network).name
    except NotPreparedError:  # a teacher
        toolkit = None
    if (toolkit is None or toolkit in _SHARDED) and not any(isinstance(module, fx.GraphModule) for module in network.modules()):
        return
    what = "is a captured graph" if toolkit is None else f"was prepared by {toolkit}"
    raise QakdError(
        f"{name} {what} and cannot be divided: weights are read beside the layers that hold them, where each "
        "process has a part. Prepare with toolkit='modelopt' or 'torchao', or train data parallel: qakd.distill launched with "
        "torchrun, or DistributedDataParallel around the network."
    )


def _divide(network: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _in_divisible_form(network)
    # The root as well after its forward pass: between two of them what is written to parts of weights is what counts.
    for unit in (*_units(network), network):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def _units(network: nn.Module) -> list[nn.Module]:
    """Entries of every list that are called themselves and hold parameters; inner ones first, each once."""
    entries = [entry for module in network.modules() if isinstance(module, nn.ModuleList) for entry in module]
    called = [entry for entry in entries if not isinstance(entry, nn.ModuleList | nn.ModuleDict)]
    return [entry for entry in reversed(dict.fromkeys(called)) if next(entry.parameters(), None) is not None]


def _in_divisible_form(network: nn.Module) -> None:
    """Numbers as tensors of one element, and all parameters as they are counted in memory."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # one that several modules share stays shared
    for module in network.modules():
        scalars = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 0]
        for name in scalars:
            number = module._parameters[name]
            assert number is not None
            if number not in made:
                made[number] = nn.Parameter(number.detach().reshape(1), requires_grad=number.requires_grad)
            module._parameters[name] = made[number]
        if scalars:
            module.__dict__[_WERE_SCALARS] = tuple(scalars)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # channels_last is refused


def _scalars(network: nn.Module) -> set[int]:
    """Ids of the parameters that were numbers."""
    return {id(module._parameters[name]) for module in network.modules() for name in module.__dict__.get(_WERE_SCALARS, ())}


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module is slow to import


def _on_host(tensor: Tensor, scalar: bool, keep: bool) -> Tensor:
    """A copy on the CPU, whole. ``scalar``: a part of a parameter that was a number has its shape again."""
    joined = whole(tensor.detach())
    if not keep:
        return joined.new_empty(0, device="cpu")
    return (joined.reshape(()) if scalar and _is_part(tensor) else joined).to("cpu", copy=True)


def _like(value: Any, part: Any) -> Any:
    """A whole tensor divided as ``part`` is; as it is where that is no part. Nobody waits."""
    if not (isinstance(value, Tensor) and isinstance(part, Tensor) and _is_part(part)):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(part, DTensor)
    return distribute_tensor(value.reshape(part.shape), part.device_mesh, part.placements, src_data_rank=None)
