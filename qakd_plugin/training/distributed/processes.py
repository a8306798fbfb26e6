"""What several processes that train one model have to agree on. With a single process nothing here does anything.

Data parallel training averages gradients; everything else that a joined batch would have made equal is made equal here: means
over all samples, statistics of BatchNorm, what is written and what is read, and errors: where one process fails, all end.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn

from ... import errors
from ..._common.files import write_atomic
from ...errors import QakdError
from .launch import divides, division_hidden, on_cpu, require_known, require_plain, require_started

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Processes:
    """The processes of this run, as many as torchrun or ``accelerate launch`` started.

    Attributes:
        divide: whether networks are divided among them, by FSDP2; else each has all weights.

    Raises:
        QakdError: they were started for DeepSpeed or another way to divide a model, or do not know of each other.
    """

    def __init__(self) -> None:
        divided = divides()
        require_plain()
        # A network may leave parameters unused, some only in some steps; buffers are shared below.
        handler = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        # What accelerate's own configuration says would change the model's forward pass, and outlast the training.
        with division_hidden():
            self.accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", cpu=on_cpu(), kwargs_handlers=[handler])
        require_known(self.accelerator.distributed_type, divided=divided)
        self.device: torch.device = self.accelerator.device
        self.count: int = self.accelerator.num_processes
        self.divide = divided and self.count > 1
        require_started(self.count)
        self.index: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        self._hosts: Any = None  # their group; None for all
        self._messages: Path | None = None  # the folder for errors that cannot be told
        self._is_waiting = self._is_over = False

    # -- errors

    def __enter__(self) -> Self:
        if self.count > 1:
            # On the host: agreeing waits for no device, and never meets what other libraries exchange.
            timeout = dist.distributed_c10d._get_default_group()._get_backend(self.device).options._timeout
            self._hosts = dist.new_group(backend="gloo", timeout=timeout)
            self._messages = Path(self.on_main(lambda: tempfile.mkdtemp(prefix="qakd-")))
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End all processes with this one's error; or end where all others have come to their end."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.agree()
            elif self._is_waiting:
                self._read_messages(error)
                self._leave_message(error)
            elif not self._is_over:
                self._tell(error)
        finally:
            if self.is_main and self._messages is not None and not self._is_waiting:  # else others may read it still
                shutil.rmtree(self._messages, ignore_errors=True)
            dist.destroy_process_group(self._hosts)

    def agree(self) -> None:
        """Wait until all processes are here. Called before whatever else they wait for each other in.

        Raises:
            QakdError: another process has failed: of its error's class, with its message.
        """
        if self.count > 1:
            self._agree(None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block processes wait for each other without agreeing, as a backward pass does.

        An error within it cannot be told, since others do not listen: it is left in a file, where those on the same machine
        find it once this process's end has broken what they wait in.

        At the end of the run a QakdError of another process that has failed so takes its place, with its message.
        """
        self._is_waiting = True
        yield
        self._is_waiting = False  # after an error it is read at the end

    def compute_together(self, network: nn.Module) -> None:
        """Let processes agree before they call a network that is divided among them, and wait for each other in the call."""

        def begin(*_: object) -> None:
            self.agree()
            self._is_waiting = True

        def end(*_: object) -> None:
            self._is_waiting = False

        network.register_forward_pre_hook(begin, prepend=True)
        network.register_forward_hook(end)

    def _read_messages(self, error: BaseException) -> None:
        for path in sorted(self._messages.glob("*.json")) if self._messages is not None else ():
            kind, text = json.loads(path.read_text())
            known: type[QakdError] = getattr(errors, kind, QakdError)
            raise known(f"process {path.stem} of {self.count} failed: {text}") from error

    def _leave_message(self, error: BaseException) -> None:
        if self._messages is not None and self._messages.is_dir():  # not on another machine
            content = json.dumps([type(error).__name__, _described(error)])
            try:
                write_atomic(self._messages / f"{self.index}.json", content)
            except QakdError as problem:  # this process's own error is what counts
                _log.error("process %d of %d could not leave its error for the others: %s", self.index, self.count, problem)

    def _tell(self, error: BaseException) -> None:
        _log.error("process %d of %d failed, and tells the others: %s", self.index, self.count, _described(error))
        try:
            self._agree(error)
        except RuntimeError as problem:  # of the connection, which may be what the error says, too
            self._read_messages(error)
            _log.error("process %d of %d could not tell the others: %s", self.index, self.count, problem)

    def _agree(self, error: BaseException | None) -> None:
        failed = torch.tensor(float(error is not None))
        dist.all_reduce(failed, group=self._hosts)
        if not failed:
            return
        self._is_over = True
        told: list[Any] = [None] * self.count
        kind = type(error) if isinstance(error, QakdError) else QakdError
        dist.all_gather_object(told, None if error is None else (kind, _described(error)), group=self._hosts)
        if error is None:
            index, (kind, text) = next((index, problem) for index, problem in enumerate(told) if problem is not None)
            raise kind(f"process {index} of {self.count} failed: {text}")

    # -- work

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all processes; as many everywhere."""
        if self.count == 1:
            return list(numbers)
        self.agree()
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._hosts)
        totals: list[float] = sums.tolist()
        return totals

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the first process do something, and give its result, or its error, to all.

        Raises:
            QakdError: of the same class as the first process's, everywhere: nobody is left waiting.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [work() if self.is_main else None]
        self.agree()
        broadcast_object_list(outcome)
        result: T = outcome[0]
        return result

    def from_main(self, item: T) -> T:
        """What the first process has, in all."""
        return self.on_main(lambda: item)

    def gather(self, item: T) -> list[T]:
        """What each process has, in the order of processes."""
        if self.count == 1:
            return [item]
        self.agree()
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


def _described(error: BaseException) -> str:
    return str(error) if isinstance(error, QakdError) else f"{type(error).__name__}: {error}"
