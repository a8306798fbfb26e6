"""The one training loop: phases, evaluation, checkpoints. It knows tensors, a method's phases and an adapter; no toolkit."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._common.console import Progress
from .._common.rng_state import generators_of, random_state, restore_random_state, samplers_of, undisturbed
from ..augment.selector import Augmentation
from ..errors import TrainingError
from ..quantizers import refresh_delta
from ..tasks.batches import BatchFn
from ..tasks.evaluation import evaluate
from ..tasks.outputs import frozen_logits, logits_of
from ..toolkits import Adapter
from .attached import teacher_logits
from .checkpoint import CheckpointStore
from .distributed.processes import Processes
from .distributed.shards import shared
from .ema import Ema
from .features import FeatureTaps
from .methods import Method, Phase, require_labels, total_loss
from .optimizers import Settings, clip_gradients, cosine_schedule, quantizer_parameters, student_optimizer, teacher_optimizer
from .preflight import blame, check_against_teacher, check_exportable, check_first_batch, require_finite_input
from .teacher_cache import TeacherCache

_EMPTY = "loader is empty: it yielded no batch. Check the data set and drop_last."


@dataclass
class Position:
    """Where a run stands: everything here is plain data and goes into checkpoints."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Best:
    """The best epoch so far, by the held-out split."""

    epoch: int = -1
    value: float = -math.inf
    state: dict[str, Any] | None = None


class Trainer:
    """One run of one method on one student.

    Args:
        adapter: of the toolkit that prepared ``student``.
        student: the prepared model.
        teacher: already the run's own copy where it learns too; None where no phase needs one.
        processes: that train together.
        method: for messages.
        phases: of the method.
        loader: re-iterable, with a length.
        val_loader: held-out batches, or None.
        batch_fn: splits a batch.
        augment: of training batches.
        settings: numbers of the run.
        cache: of the teacher's logits, or None.
        store: where checkpoints go, or None.
        checkpoint_every: also after so many optimizer steps.
        callbacks: objects; their methods ``on_step_end(step, losses)`` and ``on_epoch_end(row)`` are called where they exist.
    """

    def __init__(
        self,
        adapter: Adapter,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        processes: Processes,
        method: Method,
        phases: Sequence[Phase],
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        batch_fn: BatchFn,
        augment: Augmentation,
        settings: Settings,
        cache: TeacherCache | None,
        store: CheckpointStore | None,
        checkpoint_every: int | None,
        callbacks: Sequence[object],
    ) -> None:
        self.adapter, self.model, self.teacher = adapter, student, teacher
        self.method, self.phases, self.settings = method, list(phases), settings
        self.batch_fn, self.augment = batch_fn, augment
        self.store, self.checkpoint_every, self.callbacks = store, checkpoint_every, callbacks
        self.cache = cache
        self.processes, self.accelerator = processes, processes.accelerator
        self.device = self.accelerator.device
        self.student: nn.Module = self.accelerator.prepare_model(student)
        if teacher is not None:
            self.teacher = self._prepared_teacher(teacher)
        self.loader, self.val_loader = shared(loader, self.processes), self._shared_val_loader(val_loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / settings.accumulate)  # type: ignore[arg-type]
        self.epochs = [phase for phase in self.phases for _ in range(phase.epochs)]
        self.position, self.best, self.history = Position(), Best(), list[dict[str, Any]]()
        self.last_grad_norm = math.nan
        self.samplers, self.generators = samplers_of(loader), generators_of(loader)
        self._require_agreement(loader)
        self._epoch_start: dict[str, Any] = {}
        self._resumed_state: dict[str, Any] | None = None

    def run(self, *, resume: bool) -> None:
        """Train all epochs that are left, and load the best weights."""
        self._first_batch()
        self.taps = self._feature_taps()
        try:
            self._run(resume)
        finally:
            if self.taps is not None:
                self.taps.remove()

    def _run(self, resume: bool) -> None:
        self._make_optimizers()
        self._fill_cache()
        self._begin(resume)
        bar = Progress(len(self.epochs) * self.steps_per_epoch, enabled=self.processes.is_main)
        with self.processes.shared_ranges(self.adapter, self.model), bar as progress:
            progress.advance(self.position.step)
            while self.position.epoch < len(self.epochs) and not self._has_stalled():
                self._epoch(self.epochs[self.position.epoch], progress)
        if self.best.state is None:
            with self._as_deployed():
                self.best.state = self._state()
        # First, because the state of some toolkits' quantizers says whether their ranges are frozen: freezing remembers which
        # were free, for whoever goes on training.
        self.adapter.freeze_ranges(self.model, True)
        self.model.load_state_dict(self.best.state)
        self.adapter.set_mode(self.model, False)
        if self.teacher is not None and any(phase.teacher for phase in self.phases):
            self.teacher.eval()  # whether or not this process is the one that trained it

    # -- one epoch, one step

    def _epoch(self, phase: Phase, progress: Progress) -> None:
        if self.position.step_in_epoch == 0:
            teacher = None if self.teacher is None else self.accelerator.unwrap_model(self.teacher)
            self.augment.prepare(self.position.epoch, teacher, phase.needs_labels)
            if self._curvature_is_due():
                self._refresh_curvature(phase)
        self.adapter.freeze_ranges(self.model, False)
        self.adapter.set_mode(self.model, True)
        if self.teacher is not None and phase.teacher:
            self.teacher.train()
        if self.cache is not None:
            self.cache.start_epoch()
        started, first = time.perf_counter(), self.position.samples
        left = len(self.loader) - self.position.step_in_epoch  # type: ignore[arg-type]
        for group in _groups(self._batches(), self.settings.accumulate, left):
            losses = self._step(phase, group)
            progress.update(phase.name, losses, self._rate(started, first), self._agreement())
            for callback in self.callbacks:
                _call(callback, "on_step_end", self.position.step, losses)
            if self.checkpoint_every and self.position.step % self.checkpoint_every == 0:
                self._checkpoint()
        row = self._row(phase, self._rate(started, first))
        with self._as_deployed():
            row |= self._evaluate()
            self._remember_best(row)
        self.history.append(row | self.augment.row())
        self.position = Position(epoch=self.position.epoch + 1, step=self.position.step)
        self._checkpoint()
        for callback in self.callbacks:
            _call(callback, "on_epoch_end", self.history[-1])

    def _step(self, phase: Phase, group: Sequence[tuple[Any, bool]]) -> dict[str, float]:
        """One optimizer step on one batch, or on several whose gradients add up to that of their union."""
        batches = [(*self._on_device(batch, phase), counts) for batch, counts in group]
        samples = self.processes.total(sum(len(x) for x, _, counts in batches if counts))
        values: dict[str, float] = {}
        for index, (x, labels, counts) in enumerate(batches):
            with self._gradients_stay_here(index + 1 < len(batches)):
                found, number = self._backward(phase, x, labels, len(x) if counts else 0, samples)
            for name, value in found.items():
                values[name] = values.get(name, 0.0) + number / samples * value
            self._share_statistics(phase)
        self._update(self.optimizer, self.student, phase, values["loss"])
        if phase.teacher:
            assert self.teacher is not None
            self._update(self.teacher_optimizer, self.teacher, phase, values["loss"])
            self.teacher_scheduler.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update()
        self.position.step_in_epoch += len(group)
        self.position.step += 1
        return values

    def _backward(
        self, phase: Phase, x: Tensor, labels: Tensor | None, mine: int, samples: int
    ) -> tuple[dict[str, float], int]:
        """Losses of one batch in all processes, of how many samples; gradients in proportion to the step's ``samples``."""
        with self._autocast():
            student = logits_of(self.student(x), "prepared_model")
            other = self._teach(phase, x) if phase.needs_teacher else None
        loss, parts = total_loss(phase.student, student, other, labels)
        if phase.features is not None:
            assert self.taps is not None
            loss = self.taps.added(loss, parts)
        losses = {"loss": loss, **parts}
        if phase.teacher:
            assert other is not None
            teacher_loss, teacher_parts = total_loss(phase.teacher, other, student, labels)
            losses |= {"teacher_loss": teacher_loss, **{f"teacher_{name}": value for name, value in teacher_parts.items()}}
        values = {name: float(value.detach()) for name, value in losses.items()}
        if other is not None:
            values["agreement"] = float((student.argmax(1) == other.argmax(1)).sum()) / len(x)
        # Before the gradients, so that all processes stop where one meets a loss that is not finite.
        values, number = self.processes.joined(values, mine)
        if not all(math.isfinite(value) for value in values.values()):
            self._explain(x, phase, values)
        share = mine * self.processes.count / samples  # gradients are averaged over processes
        self.accelerator.backward(loss if share == 1 else share * loss)
        if phase.teacher:
            self.accelerator.backward(teacher_loss if share == 1 else share * teacher_loss)
        self._count(number, values)
        return {name: value for name, value in values.items() if name != "agreement"}, number

    def _share_statistics(self, phase: Phase) -> None:
        self.processes.share_buffers(self.model)
        if phase.teacher:
            assert self.teacher is not None
            self.processes.share_buffers(self.teacher)

    def _teach(self, phase: Phase, x: Tensor) -> Tensor:
        if self.cache is None:
            return teacher_logits(self.teacher, phase, (x,), {})
        return self.cache.logits(x, lambda images: teacher_logits(self.teacher, phase, (images,), {}))

    @contextmanager
    def _gradients_stay_here(self, more: bool) -> Iterator[None]:
        """Within the block processes do not average gradients, if there are ``more`` to come before the step."""
        with ExitStack() as stack:
            for network in (self.student, self.teacher):
                if more and network is not None:
                    stack.enter_context(self.accelerator.no_sync(network))
            yield

    def _update(self, optimizer: torch.optim.Optimizer, network: nn.Module, phase: Phase, loss: float) -> None:
        self.last_grad_norm = clip_gradients(network.parameters(), self.of_quantizers, self.settings.grad_clip)
        if not math.isfinite(self.last_grad_norm):
            raise TrainingError(
                f"the gradient is not finite at step {self.position.step} of phase {phase.name!r} (its norm is "
                f"{self.last_grad_norm}, the loss {loss:.4g}). Lower lr={self.settings.lr:g}.{self._last_checkpoint()}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _explain(self, x: Tensor, phase: Phase, values: dict[str, float]) -> None:
        """Raise the error for a loss that is not finite."""
        require_finite_input(x, self.position.step_in_epoch)
        bad = next(name for name, value in values.items() if not math.isfinite(value))
        raise TrainingError(
            f"{bad} is {values[bad]} at step {self.position.step} (batch {self.position.step_in_epoch} of epoch "
            f"{self.position.epoch}), "
            f"phase {phase.name!r}; the last gradient norm was {self.last_grad_norm:.3g}. {blame(self.model, x)} "
            f"Lower lr={self.settings.lr:g} or clip gradients harder (grad_clip).{self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        path = None if self.store is None else self.store.newest()
        return "" if path is None else f" The last good checkpoint is {path}."

    def _count(self, samples: int, values: dict[str, float]) -> None:
        sums = self.position.sums
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * samples
        self.position.samples += samples

    def _curvature_is_due(self) -> bool:
        """Whether some EWGS quantizer wants a new delta before this epoch."""
        rules = [self.adapter.learned(quantizer) for quantizer in self.adapter.quantizers(self.model)]
        periods = {getattr(rule, "refresh_every", 0) for rule in rules} - {0}
        return any(self.position.epoch % period == 0 for period in periods)

    def _refresh_curvature(self, phase: Phase) -> None:
        """EWGS's delta from the curvature of this phase's loss on one batch, in eval mode. Draws nothing from training."""

        def loss() -> Tensor:
            return total_loss(phase.student, logits_of(self.model(x), "prepared_model"), other, labels)[0]

        with undisturbed(self.generators), self._evaluated():
            x, labels = self._on_device(next(iter(self.loader)), phase)
            other = None if self.teacher is None or not phase.needs_teacher else frozen_logits(self.teacher, x)
            refresh_delta(loss)
        self.processes.share_buffers(self.model)

    # -- data

    def _batches(self) -> Iterator[tuple[Any, bool]]:
        """Batches of this epoch, and whether they count: a resumed epoch draws and drops what it has seen already."""
        resumed, self._resumed_state = self._resumed_state, None
        if resumed is not None:
            restore_random_state(resumed["epoch_start"], self.generators)
        self._epoch_start = random_state(self.generators)
        for sampler in self.samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.position.epoch)
        batches = iter(self.loader)
        for _ in range(self.position.step_in_epoch):
            next(batches)
        if resumed is not None:
            restore_random_state(resumed["now"], self.generators)
        for batch in batches:
            yield batch, getattr(self.loader, "counts", True)
        if self.position.step_in_epoch == 0:
            raise TrainingError(_EMPTY)

    def _on_device(self, batch: Any, phase: Phase) -> tuple[Tensor, Tensor | None]:
        x, labels = self.batch_fn(batch)
        x = x.to(self.device, non_blocking=True)
        targets = require_labels(self.method, labels).to(self.device, non_blocking=True) if phase.needs_labels else None
        return self.augment(x, targets)

    def _shared_val_loader(self, val_loader: Iterable[Any] | None) -> Iterable[Any] | None:
        """Held-out batches that this process evaluates: a share where each gets one, else all."""
        if isinstance(val_loader, Sized) and len(val_loader) >= self.processes.count:
            return shared(val_loader, self.processes)
        return val_loader

    def _val_batches(self) -> Iterator[Any]:
        assert self.val_loader is not None
        for batch in self.val_loader:
            if getattr(self.val_loader, "counts", True):
                yield batch

    # -- set-up

    def _first_batch(self) -> None:
        """One forward pass of both networks before anything is trained: checks, and lazily made parameters."""
        with undisturbed(self.generators):
            batch = next(iter(self.loader), None)
            if batch is None:
                raise TrainingError(_EMPTY)
            self._check(*self.batch_fn(batch))

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        if any(phase.needs_labels for phase in self.phases):
            require_labels(self.method, labels)
        x = x.to(self.device)
        require_finite_input(x, 0)
        with self._evaluated(), torch.no_grad(), self._autocast():
            student = logits_of(self.model(x), "prepared_model")
            teacher = None if self.teacher is None else frozen_logits(self.teacher, x)
            check_first_batch(self.model, student, teacher, x)
        with self._evaluated(), torch.no_grad():
            if teacher is not None and self.teacher is not None and self.settings.mixed_precision == "no":
                check_against_teacher(self.adapter, self.model, self.teacher, teacher, x)
            check_exportable(self.adapter, self.model, x)

    def _make_optimizers(self) -> None:
        self.of_quantizers = quantizer_parameters(self.adapter, self.model)
        self.optimizer = student_optimizer(self.adapter, self.model, self.settings)
        self.scheduler = cosine_schedule(self.optimizer, len(self.epochs) * self.steps_per_epoch, self.settings.warmup)
        self.ema = None if self.settings.ema is None else Ema(self.model, self.settings.ema)
        together = sum(phase.epochs for phase in self.phases if phase.teacher)
        if together:
            assert self.teacher is not None
            self.teacher_optimizer = teacher_optimizer(self.teacher, self.settings)
            self.teacher_scheduler = cosine_schedule(
                self.teacher_optimizer, together * self.steps_per_epoch, self.settings.warmup
            )

    def _feature_taps(self) -> FeatureTaps | None:
        wanted = next((phase.features for phase in self.phases if phase.features is not None), None)
        if wanted is None:
            return None
        assert self.teacher is not None
        return FeatureTaps(self.adapter, self.model, self.accelerator.unwrap_model(self.teacher), wanted)

    def _fill_cache(self) -> None:
        if self.cache is None:
            return
        phase = self.phases[0]

        def logits(x: Tensor) -> Tensor:
            with self._autocast():
                return teacher_logits(self.teacher, phase, (x,), {}).float()

        with undisturbed(self.generators):  # beginning to iterate draws already
            self.cache.fill((self._on_device(batch, phase)[0] for batch in self.loader), logits, self.processes)

    def _prepared_teacher(self, teacher: nn.Module) -> nn.Module:
        """Only a teacher that learns is wrapped for data parallel training."""
        if any(phase.teacher for phase in self.phases):
            wrapped: nn.Module = self.accelerator.prepare_model(teacher)
            return wrapped
        return teacher.to(self.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # -- evaluation

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Within the block the student is in eval mode with frozen ranges."""
        self.adapter.set_mode(self.model, False)
        self.adapter.freeze_ranges(self.model, True)
        try:
            yield
        finally:
            self.adapter.freeze_ranges(self.model, False)
            self.adapter.set_mode(self.model, True)

    @contextmanager
    def _as_deployed(self) -> Iterator[None]:
        """Within the block the student is what would be deployed now: averaged weights, fresh statistics, eval mode."""
        with self._averaged(), self._recalibrated(), self._evaluated():
            yield

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else self.ema.applied()

    @contextmanager
    def _recalibrated(self) -> Iterator[None]:
        """Statistics of BatchNorm follow weights with a delay, and averaged or oscillating ones not at all.

        Some training batches pass in training mode, without gradients and with frozen ranges; works with every toolkit, whether
        it keeps modules or not. Statistics and sources of randomness are put back.
        """
        if not self.settings.recalibrate_batches:
            yield
            return
        saved = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.adapter.set_mode(self.model, True)
        self.adapter.freeze_ranges(self.model, True)
        with undisturbed(self.generators), torch.no_grad(), self._autocast():
            for batch in itertools.islice(self.loader, self.settings.recalibrate_batches):
                self.model(self._on_device(batch, self.epochs[0])[0])
        self.processes.share_buffers(self.model)
        try:
            yield
        finally:
            for buffer, value in saved:
                buffer.copy_(value)

    def _row(self, phase: Phase, images_per_second: float) -> dict[str, Any]:
        means = {name: total / self.position.samples for name, total in self.position.sums.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        return {"epoch": self.position.epoch, "phase": phase.name, **means, "lr": lr, "images_per_second": images_per_second}

    def _evaluate(self) -> dict[str, float]:
        if self.val_loader is None:
            return {}
        return evaluate(self.model, self.teacher, self._val_batches(), self.batch_fn, self.device)

    def _rate(self, started: float, first: int) -> float:
        return (self.position.samples - first) / (time.perf_counter() - started)

    def _agreement(self) -> float | None:
        agreed = self.position.sums.get("agreement")
        return None if agreed is None else agreed / self.position.samples

    def _remember_best(self, row: dict[str, Any]) -> None:
        value = row.get("val_accuracy", row.get("val_agreement"))
        if value is not None and value > self.best.value:
            self.best = Best(row["epoch"], value, self._state())

    def _state(self) -> dict[str, Any]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def _has_stalled(self) -> bool:
        """Whether the last phase has gone on for ``patience`` epochs without a better one. Earlier phases run to their end."""
        if self.settings.patience is None:
            return False
        start = len(self.epochs) - self.phases[-1].epochs
        return self.position.epoch - max(self.best.epoch + 1, start) >= self.settings.patience

    # -- checkpoints

    def _require_agreement(self, loader: Iterable[Any]) -> None:
        """Several processes make their steps and their checkpoints together, or wait for each other for ever."""
        self.processes.require_equal("the length of loader", len(loader))  # type: ignore[arg-type]
        where = None if self.store is None else str(self.store.folder)
        self.processes.require_equal("checkpoint_dir and checkpoint_every", (where, self.checkpoint_every))
        if self.store is not None:
            self.store.fingerprint["processes"] = self.processes.count

    def _begin(self, resume: bool) -> None:
        """Go on from the newest checkpoint, or start a run of its own. The first process reads for all."""
        if self.store is None:
            return
        if not resume:
            self.processes.on_main(self.store.begin)
        elif (state := self.processes.on_main(self.store.load)) is not None:
            self._restore(state)

    def _checkpoint(self) -> None:
        if self.store is None:
            return
        epoch_start = self.processes.gather(self._epoch_start)  # with it, a resumed epoch shuffles alike
        now = self.processes.gather(random_state(self.generators))
        self.processes.on_main(lambda: self._write({"epoch_start": epoch_start, "now": now}))

    def _write(self, randomness: dict[str, Any]) -> None:
        """Write a checkpoint and the history; the first process does, for all."""
        assert self.store is not None
        state: dict[str, Any] = {
            "student": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "position": vars(self.position),
            "best": vars(self.best),
            "history": self.history,
            "augmentation": self.augment.state_dict(),
            **randomness,
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if any(phase.teacher for phase in self.phases):
            assert self.teacher is not None
            state["teacher"] = self.accelerator.unwrap_model(self.teacher).state_dict()
            state["teacher_optimizer"] = self.teacher_optimizer.state_dict()
            state["teacher_scheduler"] = self.teacher_scheduler.state_dict()
        self.store.save(self.position.step, state)
        self.store.save_history(self.history)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.augment.load_state_dict(state["augmentation"])
        if "teacher" in state:
            assert self.teacher is not None
            self.accelerator.unwrap_model(self.teacher).load_state_dict(state["teacher"])
            self.teacher_optimizer.load_state_dict(state["teacher_optimizer"])
            self.teacher_scheduler.load_state_dict(state["teacher_scheduler"])
        self.position, self.best = Position(**state["position"]), Best(**state["best"])
        self.history = state["history"]
        assert self.store is not None
        # A run that was killed may have left a history of before this checkpoint, or of after it.
        store = self.store
        self.processes.on_main(lambda: store.save_history(self.history))
        mine = {name: state[name][self.processes.index] for name in ("epoch_start", "now")}
        if self.position.step_in_epoch:
            self._resumed_state = mine
        else:
            restore_random_state(mine["now"], self.generators)


def _groups(batches: Iterator[Any], size: int, left: int) -> Iterator[list[Any]]:
    """Lists of so many batches; the last may be shorter.

    Never asks for more than the ``left`` there are before the last list is done with: a sampler that is asked once more draws
    again, and a checkpoint in between would hold what it drew.
    """
    while group := list(itertools.islice(batches, min(size, max(left, 1)))):
        left -= len(group)
        yield group


def _call(callback: object, name: str, *args: Any) -> None:
    method = getattr(callback, name, None)
    if method is not None:
        method(*args)
