"""Ranking augmentations by the teacher alone, on as few images as the decision needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from .._common.arguments import positive_whole
from .._common.module_mode import eval_mode
from .._common.one_at_a_time import one_at_a_time
from .._common.rng_state import generators_of, undisturbed
from .._common.score_parts import PARTS
from ..errors import QakdError
from ..tasks.batches import BatchFn, default_batch
from ..toolkits import adapter_for
from .candidates import Candidate, Candidates, resolve_candidates
from .choices import LABELS
from .cmi import DEFAULT_FORM, AugmentationScore, check_form
from .compositions import Search, mixture
from .data import Source, Stats, UnitRange
from .race import Race


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
        part, against = PARTS[best.form]
        line = (
            f"{best.name}: score {best.score:.4f} (CMI {best.cmi:.4f} - {against} {getattr(best, part):.4f}) on "
            f"{best.num_samples} images, first of {len(self)}"
        )
        tied = [record.name for record in self.records[1:] if record.tied_with_best]
        if tied:
            return f"{line}, tied with {', '.join(tied)} at {self.confidence:.0%} confidence"
        if len(self) == 1:
            return line
        return f"{line}; next {self.records[1].name} with {self.records[1].score:.4f}"


@one_at_a_time
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
    student: nn.Module | None = None,
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
        form: "ce", "centroid" or "pair": what is subtracted from CMI; see :func:`cmi_score`.
        race: False scores every candidate on all images.
        confidence: of intervals, ties and the race.
        input_stats: (mean, std) per channel when the data are normalised.
        batch_fn: splits a batch into (images, labels or None).
        search: also compositions of two operations with magnitudes; see :class:`~qakd_plugin.augment.Search`.
        student: prepared and calibrated, for form="pair"; used, and left, in eval mode with frozen ranges, as ``prepare``
            returns it.

    Returns:
        Records with name, score, cmi, centroid_divergence, cross_entropy, variance, num_samples, interval, and with a student
        student_divergence; best first. It is a sequence, with ``explanation`` and ``teacher_forwards``.

    Raises:
        LabelsRequiredError: labels="dataset", and there are none.
        NotPreparedError: no toolkit prepared the student.
        QakdError: a candidate changes shape or dtype or leaves [0, 1], images are not in [0, 1], labels are out of range, or an
            argument is wrong; names it.

    Source: Kur and Zhao, 2025, arXiv 2509.03850; racing: Maron and Moore, 1993; Even-Dar et al., JMLR 2006.
    """
    if labels not in LABELS:
        raise QakdError(f'labels={labels!r} is unknown: use "dataset" or "teacher".')
    if not 0 < confidence < 1:
        raise QakdError(f"confidence={confidence} must lie between 0 and 1.")
    positive_whole("max_samples", max_samples, none=True)
    if search is not None and isinstance(data, Iterator):
        raise QakdError(
            "search= reads the data twice, but data is an iterator: pass a Dataset, a DataLoader or a list of batches."
        )
    if check_form(form) == "pair" and student is None:
        raise QakdError('form="pair" compares a student with the teacher: pass student=prepared, or form="ce".')
    if form != "pair" and student is not None:
        raise QakdError(f'student= is asked with form="pair" alone: pass that, or leave it out with form={form!r}.')
    found = resolve_candidates(candidates)
    composed = () if search is None else search.candidates(seed)
    source = Source(data, batch_fn, UnitRange(input_stats), seed, max_samples)
    if student is not None:
        adapter = adapter_for(student)
        adapter.set_mode(student, False)
        adapter.freeze_ranges(student, True)
    contest = Race(teacher, source, labels, form, confidence, student)
    with undisturbed(generators_of(data)), eval_mode(teacher), torch.no_grad():
        entrants = contest.run([*found, *composed], losers_leave=race)
        if search is not None:
            best = [entrant.candidate for entrant in contest.order(entrants) if entrant.candidate in composed]
            entrants += contest.score(mixture(best[: search.keep]), images=contest.order(entrants)[0].count)
    ordered = contest.order(entrants)
    candidates_in_order = tuple(entrant.candidate for entrant in ordered)
    return Ranking(tuple(contest.records(ordered)), candidates_in_order, contest.forwards, contest.classes, confidence)
