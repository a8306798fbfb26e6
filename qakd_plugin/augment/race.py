"""A race of augmentations: the teacher scores all of them on growing subsets, and losers leave early."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import QakdError
from ..tasks.inputs import device_of_network
from ..tasks.outputs import logits_for
from .candidates import Candidate, one_hot
from .cmi import AugmentationScore, CmiStatistics
from .data import CHUNK, Chunk, Source, require_dataset_labels
from .jackknife import Jackknife
from .statistics import Figures

_log = logging.getLogger(__name__)
_GROWTH = 1.5
"""Of the subset from one look to the next."""
_PARTNER = 20
"""CutMix mixes an image with the one so many places before it in its chunk: of the same jackknife block."""


class Entrant:
    """A candidate in the race, with its statistics.

    Args:
        candidate: an augmentation.
        form: of the score.
    """

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

    def difference_to(self, leader: Entrant) -> tuple[float, Jackknife]:
        """How far its score lies below the leader's, on the same images."""
        (own, own_parts), (top, top_parts) = self.figures(), leader.figures()
        parts = [first - second for first, second in zip(top_parts, own_parts, strict=True)]
        return top - own, Jackknife.of(top - own, parts)


class Race:
    """Scores candidates on the images of a source.

    Args:
        teacher: in eval mode.
        source: of images.
        labels: "dataset" or "teacher".
        form: of the score.
        confidence: of ties, and that the best is not given up.
        student: in eval mode, which form "pair" compares with the teacher; None for the other forms.
    """

    def __init__(
        self,
        teacher: nn.Module,
        source: Source,
        labels: str,
        form: str,
        confidence: float,
        student: nn.Module | None = None,
    ) -> None:
        self.teacher, self.source, self.labels, self.student = teacher, source, labels, student
        self.form, self.confidence = form, confidence
        self.forwards, self.classes = 0, 0
        parameter = next(teacher.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def run(self, candidates: Sequence[Candidate], *, losers_leave: bool) -> list[Entrant]:
        """Score all candidates; if losers leave, each of them on as few images as its loss needs."""
        entrants = [Entrant(candidate, self.form) for candidate in candidates]
        running, looks = list(entrants), 0
        goal, seen = 0, 0
        for chunk in self.source.chunks():
            self._score(chunk, running)
            seen += len(chunk.images)
            goal = goal or self._first_goal()
            if losers_leave and seen >= goal and len(running) > 1 and seen != self.source.total:
                looks += 1
                running = self._look(running, looks, len(entrants), seen)
                goal = math.ceil(_GROWTH * seen)
                if len(running) == 1:
                    break
        if not seen:
            raise QakdError("data is empty: no image could be scored. Pass batches of images.")
        if seen < self.classes:
            _log.warning(
                "Augmentations were scored on %d images of %d classes: centroids of fewer than one image per class say little. "
                "Take more images.",
                seen,
                self.classes,
            )
        return entrants

    def score(self, candidate: Candidate, images: int) -> list[Entrant]:
        """Score one more candidate on the first images."""
        entrant = Entrant(candidate, self.form)
        for chunk in self.source.chunks():
            if entrant.count >= images:
                break
            self._score(chunk, [entrant])
        return [entrant]

    def _first_goal(self) -> int:
        return max(CHUNK, CHUNK * math.ceil(2 * self.classes / CHUNK))

    def _look(self, running: list[Entrant], look: int, candidates: int, seen: int) -> list[Entrant]:
        """Who stays: all that may still win."""
        leader = max(running, key=Entrant.corrected)
        tail = (1 - self.confidence) / (look * (look + 1)) / (candidates - 1)
        # The rest of a finite set can overturn less the smaller it is.
        rest = 1.0 if self.source.total is None else math.sqrt(1 - seen / self.source.total)
        stay = []
        for entrant in running:
            _, difference = entrant.difference_to(leader)
            margin = difference.upper_quantile(tail) * difference.error * rest if difference.freedom else math.inf
            entrant.dropped = entrant is not leader and difference.corrected > margin
            if entrant.dropped:
                entrant.tied = self._is_tied(entrant, leader, candidates)
            else:
                stay.append(entrant)
        return stay

    def _is_tied(self, entrant: Entrant, leader: Entrant, candidates: int) -> bool:
        """Whether the difference to the leader could be nothing, among so many candidates."""
        if entrant is leader:
            return False
        below, difference = entrant.difference_to(leader)
        tail = (1 - self.confidence) / max(candidates - 1, 1)
        return difference.freedom == 0 or below <= difference.upper_quantile(tail) * difference.error

    def order(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """The best first; who was given up comes after those who were not."""
        return sorted(entrants, key=lambda entrant: (entrant.dropped, -entrant.figures()[0]))

    def records(self, entrants: Sequence[Entrant]) -> list[AugmentationScore]:
        """Of entrants in their :meth:`order`."""
        for entrant in entrants:
            if not entrant.dropped:
                entrant.tied = self._is_tied(entrant, entrants[0], len(entrants))
        return [self._record(entrant) for entrant in entrants]

    def _record(self, entrant: Entrant) -> AugmentationScore:
        assert entrant.statistics is not None
        record = entrant.statistics.result(entrant.candidate.name, self.form, self.confidence)
        return replace(record, tied_with_best=entrant.tied, dropped=entrant.dropped)

    # -- one chunk

    def _score(self, chunk: Chunk, entrants: Sequence[Entrant]) -> None:
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
        if any(entrant.candidate.mix for entrant in entrants):
            labels_for_mix = self._checked_one_hot(labels)
        for entrant in entrants:
            candidate = entrant.candidate
            if candidate.transform is None and candidate.mix is None:
                clean = self._logits(images) if clean is None else clean
                self._count(entrant, images, clean, labels)
                continue
            targets = labels_for_mix if candidate.mix else labels
            augmented, mixed = candidate(images, targets, seeds=chunk.seeds, partner=min(_PARTNER, len(images) - 1))
            assert mixed is not None
            self._count(entrant, augmented, self._logits(augmented), mixed)

    def _checked_one_hot(self, labels: Tensor) -> Tensor:
        if not labels.is_floating_point() and not ((labels >= 0) & (labels < self.classes)).all():
            wrong = labels[(labels < 0) | (labels >= self.classes)][0]
            raise QakdError(f"label {int(wrong)} is out of range: it must lie in the teacher's classes, 0..{self.classes - 1}.")
        return one_hot(labels, self.classes)

    def _count(self, entrant: Entrant, images: Tensor, logits: Tensor, targets: Tensor) -> None:
        if entrant.statistics is None:
            device = "cpu" if logits.device.type == "mps" else logits.device  # which knows no float64
            entrant.statistics = CmiStatistics(self.classes, device=device)
        try:
            entrant.statistics.update(logits, targets, self._student_logits(images))
        except QakdError as error:
            raise QakdError(f"candidate {entrant.candidate.name!r}: {error}") from error

    def _logits(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        return self._of(self.teacher, images, "teacher")

    def _student_logits(self, images: Tensor) -> Tensor | None:
        if self.student is None:
            return None
        return self._of(self.student, images.to(device_of_network(self.student)), "student").to(self.device)

    def _of(self, network: nn.Module, images: Tensor, name: str) -> Tensor:
        logits = logits_for(network, self.source.unit_range.normalised(images), name)
        if logits.ndim != 2:
            raise QakdError(f"{name} must output logits (N, C), got shape {tuple(logits.shape)}.")
        return logits.float()
