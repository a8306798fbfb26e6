"""Ranking augmentations by the teacher alone, on as few images as the decision needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from .._common.module_mode import eval_mode
from .._common.rng_state import generators_of, undisturbed
from ..errors import QakdError
from ..tasks.batches import BatchFn, default_batch
from .candidates import Candidate, Candidates, one_hot, resolve_candidates
from .choices import LABELS
from .cmi import DEFAULT_FORM, AugmentationScore, CmiStatistics, Figures, Jackknife, check_form
from .compositions import Search, mixture
from .data import CHUNK, Chunk, Source, Stats, UnitRange, require_dataset_labels

_log = logging.getLogger(__name__)
_GROWTH = 1.5
"""Of the subset from one look to the next."""
_PARTNER = 20
"""CutMix mixes an image with the one so many places before it in its chunk: of the same jackknife block."""


@dataclass(frozen=True)
class Ranking(Sequence[AugmentationScore]):
    """Records, the best first; those that a race gave up come last.

    Attributes:
        records: one per candidate.
        candidates: the candidates, in the same order.
        teacher_forwards: images that went through the teacher.
        num_classes: of the teacher.
        confidence: of intervals, of ties, and of the race.
    """

    records: tuple[AugmentationScore, ...]
    candidates: tuple[Candidate, ...]
    teacher_forwards: int
    num_classes: int
    confidence: float

    @overload
    def __getitem__(self, index: int) -> AugmentationScore: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AugmentationScore, ...]: ...
    def __getitem__(self, index: int | slice) -> AugmentationScore | tuple[AugmentationScore, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def explanation(self) -> str:
        """One line: what came first, by how much, and what the data leave open."""
        best = self.records[0]
        against, value = (
            ("centroid divergence", best.centroid_divergence)
            if best.form == "centroid"
            else ("cross-entropy", best.cross_entropy)
        )
        line = (
            f"{best.name}: score {best.score:.4f} (CMI {best.cmi:.4f} - {against} {value:.4f}) on {best.num_samples} images, "
            f"first of {len(self)}"
        )
        tied = [record.name for record in self.records[1:] if record.tied_with_best]
        if tied:
            return f"{line}, tied with {', '.join(tied)} at {self.confidence:.0%} confidence"
        if len(self) == 1:
            return line
        return f"{line}; next {self.records[1].name} with {self.records[1].score:.4f}"


def rank_augmentations(
    teacher: nn.Module,
    data: Any,
    candidates: Candidates | None = None,
    *,
    labels: str = "dataset",
    max_samples: int | None = None,
    seed: int = 0,
    form: str = DEFAULT_FORM,
    race: bool = True,
    confidence: float = 0.95,
    input_stats: Stats | None = None,
    batch_fn: BatchFn = default_batch,
    search: Search | None = None,
) -> Ranking:
    """Rank augmentations for distillation by what the teacher says about augmented images; nothing is trained.

    Every candidate sees the same images with the same draws: image number i of the order that ``seed`` gives has a seed of its
    own. A race scores them on growing subsets (40 images or two per class, then half as many again each time) and gives up a
    candidate as soon as the interval of its difference to the leader lies below zero. The probability that the candidate that
    would come first on all images is given up is at most about 1 - ``confidence``: look k spends 1/(k (k + 1)) of it, shared by
    all pairs with the leader (Bonferroni). Intervals are a jackknife's, by Student's t, and so approximate for few images per
    class.

    Args:
        teacher: full-precision network; used in eval mode and left as it was.
        data: Dataset, DataLoader, or batches; float images (N, C, H, W). Their own transforms (crop, flip) stay in force. Data
            that can be indexed are shuffled, iterables are taken in their order.
        candidates: {name: callable}, or a sequence of callables, ``Candidate`` and names; None for the sixteen of
            :func:`~qakd_plugin.augment.default_candidates`. torchvision transforms are called on each image, others on a batch.
        labels: "dataset", or "teacher": its own answers on the images before augmentation; then no labels are read.
        max_samples: images per candidate at most; None for all.
        seed: of the order of images and of all draws.
        form: "ce" or "centroid": what is subtracted from CMI.
        race: False scores every candidate on all images.
        confidence: of intervals, ties and the race.
        input_stats: (mean, std) per channel when the data are normalised.
        batch_fn: splits a batch into (images, labels or None).
        search: also compositions of two operations with magnitudes; see :class:`~qakd_plugin.augment.Search`.

    Returns:
        Records with name, score, cmi, centroid_divergence, cross_entropy, variance, num_samples, interval; best first. It is a
        sequence, with ``explanation`` and ``teacher_forwards``.

    Raises:
        LabelsRequiredError: labels="dataset", and there are none.
        QakdError: a candidate changes shape or dtype or leaves [0, 1], images are not in [0, 1], labels are out of range, or an
            argument is wrong; names it.

    Source: Kur and Zhao, 2025, arXiv 2509.03850; racing: Maron and Moore, 1993; Even-Dar et al., JMLR 2006.
    """
    if labels not in LABELS:
        raise QakdError(f'labels={labels!r} is unknown: use "dataset" or "teacher".')
    if not 0 < confidence < 1:
        raise QakdError(f"confidence={confidence} must lie between 0 and 1.")
    if max_samples is not None and max_samples < 1:
        raise QakdError(f"max_samples={max_samples} must be positive, or None for all images.")
    if search is not None and isinstance(data, Iterator):
        raise QakdError(
            "search reads the data twice, but data is an iterator: pass a Dataset, a DataLoader or a list of batches."
        )
    found = resolve_candidates(candidates)
    composed = () if search is None else search.candidates(seed)
    source = Source(data, batch_fn, UnitRange(input_stats), seed, max_samples)
    contest = _Contest(teacher, source, labels, check_form(form), confidence)
    with undisturbed(generators_of(data)), eval_mode(teacher), torch.no_grad():
        runners = contest.run([*found, *composed], race=race)
        if search is not None:
            best = [runner.candidate for runner in contest.order(runners) if runner.candidate in composed]
            runners += contest.score(mixture(best[: search.keep]), images=contest.order(runners)[0].count)
    return contest.ranking(runners)


class _Runner:
    """A candidate in the race, with its statistics."""

    def __init__(self, candidate: Candidate, form: str) -> None:
        self.candidate, self.form = candidate, form
        self.statistics: CmiStatistics | None = None
        self.dropped = self.tied = False
        self._cache: tuple[int, Figures, list[Figures]] | None = None

    @property
    def count(self) -> int:
        return 0 if self.statistics is None else self.statistics.num_samples

    def figures(self) -> tuple[float, list[float]]:
        """The score, and the scores without each block."""
        assert self.statistics is not None
        if self._cache is None or self._cache[0] != self.count:
            self._cache = (self.count, self.statistics.figures(), self.statistics.without_each_block())
        return self._cache[1].score(self.form), [part.score(self.form) for part in self._cache[2]]

    def corrected(self) -> float:
        return Jackknife.of(*self.figures()).corrected

    def behind(self, leader: _Runner) -> tuple[float, Jackknife]:
        """How far its score lies below the leader's, on the same images."""
        (own, own_parts), (top, top_parts) = self.figures(), leader.figures()
        parts = [first - second for first, second in zip(top_parts, own_parts, strict=True)]
        return top - own, Jackknife.of(top - own, parts)


class _Contest:
    """Scores candidates on the images of a source."""

    def __init__(self, teacher: nn.Module, source: Source, labels: str, form: str, confidence: float) -> None:
        self.teacher, self.source, self.labels = teacher, source, labels
        self.form, self.confidence = form, confidence
        self.forwards, self.classes = 0, 0
        parameter = next(teacher.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def run(self, candidates: Sequence[Candidate], *, race: bool) -> list[_Runner]:
        """Score all candidates; with a race, losers leave early."""
        runners = [_Runner(candidate, self.form) for candidate in candidates]
        running, looks = list(runners), 0
        goal, seen = 0, 0
        for chunk in self.source.chunks():
            self._score(chunk, running)
            seen += len(chunk.images)
            goal = goal or self._first_goal()
            if race and seen >= goal and len(running) > 1 and seen != self.source.total:
                looks += 1
                running = self._look(running, looks, len(runners), seen)
                goal = math.ceil(_GROWTH * seen)
                if len(running) == 1:
                    break
        if not seen:
            raise QakdError("data is empty: no image could be scored.")
        if seen < self.classes:
            _log.warning(
                "Augmentations were scored on %d images of %d classes: centroids of fewer than one image per class say little. "
                "Take more images.",
                seen,
                self.classes,
            )
        return runners

    def score(self, candidate: Candidate, images: int) -> list[_Runner]:
        """Score one more candidate on the first images."""
        runner = _Runner(candidate, self.form)
        for chunk in self.source.chunks():
            if runner.count >= images:
                break
            self._score(chunk, [runner])
        return [runner]

    def _first_goal(self) -> int:
        return max(CHUNK, CHUNK * math.ceil(2 * self.classes / CHUNK))

    def _look(self, running: list[_Runner], look: int, candidates: int, seen: int) -> list[_Runner]:
        """Who stays: all that may still win."""
        leader = max(running, key=_Runner.corrected)
        tail = (1 - self.confidence) / (look * (look + 1)) / (candidates - 1)
        # The rest of a finite set can overturn less the smaller it is.
        rest = 1.0 if self.source.total is None else math.sqrt(1 - seen / self.source.total)
        stay = []
        for runner in running:
            _, difference = runner.behind(leader)
            margin = difference.upper_quantile(tail) * difference.error * rest if difference.freedom else math.inf
            runner.dropped = runner is not leader and difference.corrected > margin
            if runner.dropped:
                runner.tied = self._is_tied(runner, leader, candidates)
            else:
                stay.append(runner)
        return stay

    def _is_tied(self, runner: _Runner, leader: _Runner, candidates: int) -> bool:
        """Whether the difference to the leader could be nothing, among so many candidates."""
        if runner is leader:
            return False
        behind, difference = runner.behind(leader)
        tail = (1 - self.confidence) / max(candidates - 1, 1)
        return difference.freedom == 0 or behind <= difference.upper_quantile(tail) * difference.error

    def order(self, runners: Sequence[_Runner]) -> list[_Runner]:
        """The best first; who was given up comes after those who were not."""
        return sorted(runners, key=lambda runner: (runner.dropped, -runner.figures()[0]))

    def ranking(self, runners: Sequence[_Runner]) -> Ranking:
        """Records of all runners."""
        ordered = self.order(runners)
        for runner in ordered:
            if not runner.dropped:
                runner.tied = self._is_tied(runner, ordered[0], len(ordered))
        return Ranking(
            tuple(self._record(runner) for runner in ordered),
            tuple(runner.candidate for runner in ordered),
            self.forwards,
            self.classes,
            self.confidence,
        )

    def _record(self, runner: _Runner) -> AugmentationScore:
        assert runner.statistics is not None
        record = runner.statistics.result(runner.candidate.name, self.form, self.confidence)
        return replace(record, tied_with_best=runner.tied, dropped=runner.dropped)

    # -- one chunk

    def _score(self, chunk: Chunk, runners: Sequence[_Runner]) -> None:
        images = chunk.images.to(self.device)
        clean: Tensor | None = None
        if self.labels == "teacher" or self.classes == 0:
            clean = self._logits(images)
            self.classes = clean.shape[1]
        if self.labels == "teacher":
            assert clean is not None
            labels = clean.argmax(1)
        else:
            labels = require_dataset_labels(chunk.labels).to(self.device)
        if any(runner.candidate.mix for runner in runners):
            labels_for_mix = self._checked_one_hot(labels)
        for runner in runners:
            candidate = runner.candidate
            if candidate.transform is None and candidate.mix is None:
                clean = self._logits(images) if clean is None else clean
                self._count(runner, clean, labels)
                continue
            targets = labels_for_mix if candidate.mix else labels
            augmented, mixed = candidate(images, targets, seeds=chunk.seeds, partner=min(_PARTNER, len(images) - 1))
            assert mixed is not None
            self._count(runner, self._logits(augmented), mixed)

    def _checked_one_hot(self, labels: Tensor) -> Tensor:
        if not labels.is_floating_point() and not ((labels >= 0) & (labels < self.classes)).all():
            wrong = labels[(labels < 0) | (labels >= self.classes)][0]
            raise QakdError(f"label {int(wrong)} is out of range: the teacher knows classes 0..{self.classes - 1}.")
        return one_hot(labels, self.classes)

    def _count(self, runner: _Runner, logits: Tensor, targets: Tensor) -> None:
        if runner.statistics is None:
            device = "cpu" if logits.device.type == "mps" else logits.device  # which knows no float64
            runner.statistics = CmiStatistics(self.classes, device=device)
        try:
            runner.statistics.update(logits, targets)
        except QakdError as error:
            raise QakdError(f"candidate {runner.candidate.name!r}: {error}") from error

    def _logits(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits = self.teacher(self.source.unit_range.normalised(images))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise QakdError(f"teacher must return logits (N, C), got {shape}.")
        return logits.float()
