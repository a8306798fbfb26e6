"""How the processes of a run may have been started, and which networks they can train together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...errors import QakdError


def divides() -> bool:
    """Whether the launcher's environment asks to divide networks among processes, by FSDP2.

    Raises:
        QakdError: in another way, or with options that would be passed over.
    """
    for kind in ("DEEPSPEED", "MEGATRON_LM"):  # of which accelerate says nothing where it trains on CPUs
        if _is_on(f"ACCELERATE_USE_{kind}"):
            _refuse(kind)
    if not _is_on(_FSDP):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise QakdError(f"distill was launched for FSDP {version}: {_WAY}")
    for name, what in _NOT_DONE.items():
        if _is_on(name):
            raise QakdError(f"distill was launched with {name}=true, but {what}. Launch with {name.lower()} set to false.")
    return True


@contextmanager
def division_hidden() -> Iterator[None]:
    """Within the block accelerate sees processes that are launched for data parallel training: networks are divided here, and
    what it does otherwise is the same on CPUs, where it knows no division, and on GPUs."""
    value = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_FSDP] = value


def require_known(kind: DistributedType, *, divided: bool) -> None:
    """Raise QakdError where accelerate found another way to train than data parallel, or than FSDP if that was launched."""
    if kind not in _DATA_PARALLEL and not (divided and kind == DistributedType.FSDP):
        _refuse(kind.value)


def require_plain() -> None:
    """Raise QakdError where an Accelerator of this process, made before, computes otherwise than in plain float32."""
    if not is_initialized():
        return
    state = AcceleratorState()
    found = {"mixed_precision": state.mixed_precision, "dynamo_backend": state.dynamo_plugin.backend.value.lower()}
    for name, value in found.items():
        if value != "no":
            raise QakdError(
                f"an Accelerator that was made before in this process has {name}={value!r}, which all later ones share. Make "
                "it with 'no': distill(mixed_precision='bf16') is the switch here, torch.compile(teacher) compiles a teacher."
            )


def on_cpu() -> bool:
    """Whether several processes train on CPUs: accelerate takes each for a run of its own unless it is told."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def require_started(count: int) -> None:
    """Raise QakdError where more processes were started than the ``count`` that accelerate knows of."""
    started = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if started != count:
        raise QakdError(
            f"{started} processes were started, but accelerate knows of {count}, and each would train alone. Launch with "
            "torchrun or accelerate launch, which set RANK, LOCAL_RANK and WORLD_SIZE. Where a script makes an Accelerator or "
            "a PartialState before distill, make it with cpu=True on machines without an accelerator."
        )


def require_whole(name: str, network: nn.Module | None) -> None:
    """Refuse a network that is wrapped or sharded already.

    Raises:
        QakdError: names the argument and the wrapper.
    """
    if isinstance(network, DataParallel | DistributedDataParallel):
        raise QakdError(
            f"{name} is wrapped in {type(network).__name__}. Pass the network itself ({name}.module): distill wraps it where "
            "several processes run."
        )
    sharded = network is not None and (
        any("FSDP" in base.__name__ or "FullySharded" in base.__name__ for m in network.modules() for base in type(m).__mro__)
        or any(hasattr(parameter, "placements") for parameter in network.parameters())
    )
    if sharded:
        raise QakdError(
            f"{name} is sharded (FSDP, DTensor) already. Pass the whole network: distill divides it where it is launched with "
            "accelerate launch --use_fsdp --fsdp_version 2. A loop of your own with qakd.attach trains what "
            "qakd_plugin.training.distributed.sharding.shard has divided."
        )


def require_batch_norms_run(name: str, network: nn.Module | None, device: torch.device, count: int) -> None:
    """Raise QakdError for a SyncBatchNorm in several processes on CPUs, for which torch has none."""
    found = [] if network is None else [layer for layer, m in network.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if found and count > 1 and device.type == "cpu":
        raise QakdError(
            f"{name}: {found[0]} is a SyncBatchNorm, which several processes cannot train on CPUs. Train in one process or on "
            "GPUs, or put nn.BatchNorm2d with its state_dict in its place before preparing."
        )


def _refuse(kind: str) -> NoReturn:
    raise QakdError(
        f"distill was launched for {kind}, which divides the model in a way of its own. Launch with torchrun or accelerate "
        f"launch --multi_gpu (data parallel). {_WAY}"
    )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


_FSDP = "ACCELERATE_USE_FSDP"
_WAY = "Networks that fit no device are divided by FSDP2: accelerate launch --use_fsdp --fsdp_version 2."
_NOT_DONE = {
    "FSDP_OFFLOAD_PARAMS": "weights stay on their device here",
    "FSDP_ACTIVATION_CHECKPOINTING": "what a layer keeps is the network's own choice here (gradient_checkpointing_enable)",
}


_DATA_PARALLEL = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_HPU,
}
