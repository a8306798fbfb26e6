"""What several processes that train one model have to agree on. With a single process nothing here does anything.

Data parallel training averages gradients; everything else that a joined batch would have made equal is made equal here: means
over all samples, statistics of BatchNorm, what is written and what is read, and errors: where one process fails, all end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn

from ...errors import QakdError
from .launch import on_cpu, require_data_parallel, require_not_divided, require_plain, require_started

T = TypeVar("T")


class Processes:
    """The processes of this run, as many as torchrun or ``accelerate launch`` started.

    Raises:
        QakdError: they were started for FSDP, DeepSpeed or another way to divide a model, or do not know of each other.
    """

    def __init__(self) -> None:
        require_not_divided()
        require_plain()
        # A network may leave parameters unused, some only in some steps; buffers are shared below.
        handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        # What accelerate's own configuration says would change the model's forward pass, and outlast the training.
        self.accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", cpu=on_cpu(), kwargs_handlers=[handler])
        require_data_parallel(self.accelerator.distributed_type)
        self.device: torch.device = self.accelerator.device
        self.count: int = self.accelerator.num_processes
        require_started(self.count)
        self.index: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process

    # -- work

    def together(self, work: Callable[[], tuple[T, Sequence[float]]], size: int = 0) -> tuple[T, list[float]]:
        """Let every process do its part, and sum numbers over all. An error in one ends all, with that process's message.

        Args:
            work: gives a result, which stays in its process, and ``size`` numbers. It must not wait for other processes.
            size: how many numbers, the same everywhere.

        Raises:
            QakdError: where this process's work went well, of the same class as another's error, with its message.
        """
        if self.count == 1:
            result, numbers = work()
            return result, list(numbers)
        done: list[T] = []
        problem: Exception | None = None
        numbers = [0.0] * size
        try:
            result, numbers = work()
            done.append(result)
        except Exception as error:  # noqa: BLE001
            problem = error
        sums = torch.tensor([*numbers, float(problem is not None)], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        *totals, failed = sums.tolist()
        if failed:
            self._end(problem)
        return done[0], totals

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
            except Exception as error:  # noqa: BLE001
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

    def from_main(self, item: T) -> T:
        """What the first process has, in all."""
        return self.on_main(lambda: item)

    def gather(self, item: T) -> list[T]:
        """What each process has, in the order of processes."""
        if self.count == 1:
            return [item]
        gathered: list[T] = gather_object([item])
        return gathered

    def require_equal(self, what: str, value: object) -> None:
        """Raise QakdError where ``value`` is not the same in all processes."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise QakdError(f"{what} must be the same in all {self.count} processes, but they have {values}.")

    # -- tensors

    def weighted_mean(self, values: Tensor, mine: Sequence[int], total: Sequence[int]) -> Tensor:
        """Means over the samples of all processes, from the means of each.

        Args:
            values: (M, K): K means over each of M batches of this process.
            mine: (M,): samples in each batch of this process.
            total: (M,): samples in each batch of all processes together.
        """
        if self.count == 1:
            return values
        sums = values * values.new_tensor(mine)[:, None]
        dist.all_reduce(sums)
        return sums / values.new_tensor(total)[:, None]

    @torch.no_grad()
    def average_buffers(self, network: nn.Module) -> None:
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

    def _end(self, problem: Exception | None) -> NoReturn:
        """Raise this process's own problem, or else the first of the others'."""
        kind = type(problem) if isinstance(problem, QakdError) else QakdError
        text = str(problem) if isinstance(problem, QakdError) else f"{type(problem).__name__}: {problem}"
        found = self.gather(None if problem is None else (kind, text))
        if problem is not None:
            raise problem
        index, (kind, text) = next((index, error) for index, error in enumerate(found) if error is not None)
        raise kind(f"process {index} of {self.count} failed: {text}")
