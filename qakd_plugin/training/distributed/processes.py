"""What several processes that train one model have to agree on. With a single process nothing here does anything.

Data parallel training averages gradients; everything else that a joined batch would have made equal is made equal here: means
over all samples, statistics of BatchNorm, ranges of observers, what is written and what is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...errors import QakdError
from ...toolkits import Adapter

T = TypeVar("T")


class Processes:
    """The processes of this run, as many as torchrun or ``accelerate launch`` started.

    Raises:
        QakdError: they were started for FSDP, DeepSpeed or another way to divide a model, or do not know of each other.
    """

    def __init__(self) -> None:
        for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):  # of which accelerate says nothing where it trains on CPUs
            if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
                _refuse(kind)
        # Not every phase trains every parameter, and quantizers may leave some unused; buffers are shared below.
        handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        _require_plain()
        # What accelerate's own configuration says would change the model's forward pass, and outlast the training.
        self.accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", cpu=_on_cpu(), kwargs_handlers=[handler])
        if (kind := self.accelerator.distributed_type) not in _DATA_PARALLEL:
            _refuse(kind.value)
        self.count: int = self.accelerator.num_processes
        _require_started(self.count)
        self.index: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process

    def joined(self, values: dict[str, float], samples: int) -> tuple[dict[str, float], int]:
        """Means over the samples of all processes, from the mean of each, and how many samples that are."""
        if self.count == 1:
            return values, samples
        mine = [samples * value for value in values.values()]
        sums = torch.tensor([*mine, samples], dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(sums)
        *totals, number = sums.tolist()
        return dict(zip(values, (total / number for total in totals), strict=True)), int(number)

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        return number if self.count == 1 else self.joined({}, number)[1]

    @torch.no_grad()
    def share_buffers(self, network: nn.Module) -> None:
        """Set each floating-point buffer to its mean over all processes, bit for bit the same everywhere, and others to the
        first process's.

        A buffer that is equal everywhere keeps its bits.
        """
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        for dtype, buffers in by_type.items():
            mine = torch.cat([buffer.reshape(-1) for buffer in buffers])
            first = mine.clone()
            dist.broadcast(first, 0)
            if dtype.is_floating_point:
                # Not mine - first alone: a range that saw nothing yet is infinite.
                difference = torch.where(mine == first, torch.zeros_like(mine), mine - first)
                dist.all_reduce(difference)
                first = first + difference / self.count
            for buffer, value in zip(buffers, torch.split(first, [buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(value.reshape(buffer.shape))

    @contextmanager
    def shared_ranges(self, adapter: Adapter, model: nn.Module) -> Iterator[None]:
        """Within the block, observers of activations see the smallest and largest value of all processes in training.

        A moving average of the joined batch's minimum is the smallest of the averages, so what each has observed can be
        reduced before the scale is computed from it.
        """
        observers = [] if self.count == 1 else _observers(adapter, model)
        handles = [observer.register_forward_hook(_join_range) for observer in observers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gather(self, item: T) -> list[T]:
        """What each process has, in the order of processes."""
        if self.count == 1:
            return [item]
        gathered: list[T] = gather_object([item])
        return gathered

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the first process do something, and give its result, or its error, to all.

        Raises:
            QakdError: of the same class as the first process's, everywhere: nobody is left waiting.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        own: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                own = error
                named = QakdError(f"the first process failed: {type(error).__name__}: {error}")
                outcome[1] = error if isinstance(error, QakdError) else named
        broadcast_object_list(outcome)
        if own is not None:
            raise own
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def require_equal(self, what: str, value: object) -> None:
        """Raise QakdError where ``value`` is not the same in all processes."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise QakdError(f"{what} must be the same in all {self.count} processes, but they have {values}.")


def _refuse(kind: str) -> NoReturn:
    raise QakdError(
        f"distill was launched for {kind}, which divides the model itself among processes; quantizers need whole weights. "
        "Launch with torchrun, or with accelerate launch --multi_gpu (data parallel)."
    )


def _require_plain() -> None:
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


def process_index() -> int:
    """This process's number, before anything else of the run exists."""
    index: int = PartialState(cpu=_on_cpu()).process_index
    return index


def _on_cpu() -> bool:
    """Whether several processes train on CPUs: accelerate takes each for a run of its own unless it is told."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def _require_started(count: int) -> None:
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
            f"{name} is sharded (FSDP, DTensor): its quantizers would see a part of each weight. Pass the whole network, and "
            "launch with torchrun: distill trains it data parallel."
        )


def _observers(adapter: Adapter, model: nn.Module) -> Sequence[nn.Module]:
    """Modules below quantizers of activations that keep a smallest and a largest value."""
    found = {}
    for quantizer in adapter.quantizers(model):
        for module in quantizer.module.modules():
            both = (getattr(module, name, None) for name in ("min_val", "max_val"))
            if quantizer.role == "activation" and all(isinstance(value, Tensor) and value.numel() for value in both):
                found[id(module)] = module
    return list(found.values())


def _join_range(observer: Any, *_: object) -> None:
    if not torch.is_grad_enabled():  # one process alone looks for the layer that went wrong
        return
    dist.all_reduce(observer.min_val, dist.ReduceOp.MIN)
    dist.all_reduce(observer.max_val, dist.ReduceOp.MAX)


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
