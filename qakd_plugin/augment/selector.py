"""Augmentations in training: one that the user gives, or the best by a ranking with the teacher (``CMISelector``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .._common.arguments import positive_whole
from .._common.console import say
from ..errors import CheckpointError, QakdError
from ..tasks.batches import BatchFn
from .candidates import Candidate, Candidates, resolve_candidates
from .choices import WORTH
from .cmi import DEFAULT_FORM, AugmentationScore, check_form
from .compositions import Composition, Mixture, Search
from .data import Extremes, Stats, UnitRange
from .ranking import rank_augmentations

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CMISelector:
    """Ranks augmentations by the teacher's contextual mutual information, and trains with the first.

    Args:
        candidates: as for ``rank_augmentations``; None for the paper's sixteen.
        max_samples: images per candidate at most; None for all.
        every: rank again every so many epochs, on other images and draws and, where it learns, with the teacher as it is then;
            None ranks once, before training.
        form: "ce", "centroid" or "pair", which asks the student as it is then beside the teacher; see ``cmi_score``.
        labels: "dataset", "teacher", or "auto": the data set's where the method reads labels anyway, else the teacher's
            answers.
        search: also compositions of two operations; see :class:`~qakd_plugin.augment.Search`.
        seed: of images and draws of the ranking.
        confidence: of the race and of ties.

    Source: Kur and Zhao, 2025, arXiv 2509.03850.
    """

    candidates: Candidates | None = None
    max_samples: int | None = 2000
    every: int | None = None
    form: str = DEFAULT_FORM
    labels: str = "auto"
    search: Search | None = None
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        check_form(self.form)
        resolve_candidates(self.candidates)
        if self.labels not in {"auto", "dataset", "teacher"}:
            raise QakdError(f'CMISelector: labels={self.labels!r} is unknown: use "auto", "dataset" or "teacher".')
        for name in ("max_samples", "every"):
            positive_whole(f"CMISelector: {name}", getattr(self, name), none=True)
        if not 0 < self.confidence < 1:
            raise QakdError(f"CMISelector: confidence={self.confidence} must lie between 0 and 1.")


class Augmentation(Protocol):
    """What a training loop needs of an augmentation: see :class:`FixedAugmentation` and :class:`SelectedAugmentation`."""

    def prepare(self, epoch: int, teacher: nn.Module | None, student: nn.Module, needs_labels: bool) -> None:
        """Called before an epoch; the student may be left in eval mode with frozen ranges."""

    def __call__(self, x: Tensor, labels: Any) -> tuple[Tensor, Any]:
        """Images as the loader yields them, and labels, as both networks and the losses get them."""

    def row(self) -> dict[str, Any]:
        """What the epoch's row of the history says of it."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""


class FixedAugmentation:
    """A callable of the user's, on images taken to [0, 1] and normalised again after it; or none.

    Args:
        transform: keeps shape and dtype of a batch; None changes nothing.
        input_stats: (mean, std) of normalised images.

    Raises:
        QakdError: it is not callable.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor] | None, input_stats: Stats | None) -> None:
        if transform is not None and not callable(transform):
            raise QakdError(f"augment must be a callable on a batch of [0, 1] images, got {type(transform).__name__}.")
        self.transform, self.unit_range = transform, UnitRange(input_stats)

    def prepare(self, epoch: int, teacher: nn.Module | None, student: nn.Module, needs_labels: bool) -> None:
        """Nothing is chosen."""

    def __call__(self, x: Tensor, labels: Any) -> tuple[Tensor, Any]:
        """Augment a batch; labels stay as they are.

        Raises:
            QakdError: the images are not in [0, 1], or the transform made something else of them.
        """
        if self.transform is None:
            return x, labels
        if not isinstance(x, Tensor):
            raise QakdError(
                f"augment works on a batch of images, and the inputs here are {type(x).__name__}. Augment in the data set, "
                "or leave augment out."
            )
        images = self.transform(self.unit_range.unit(x))
        if images.shape != x.shape or images.dtype != x.dtype:
            raise QakdError(
                f"augment must keep shape and dtype: it made {tuple(images.shape)} {images.dtype} of {tuple(x.shape)} "
                f"{x.dtype}."
            )
        return self.unit_range.normalised(images), labels

    def row(self) -> dict[str, Any]:
        """Nothing changes from epoch to epoch.

        Raises:
            QakdError: some images of the epoch were not in [0, 1].
        """
        self.unit_range.settle()
        return {}

    def state_dict(self) -> dict[str, Any]:
        """It has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has no state."""


class SelectedAugmentation:
    """What a run does with a :class:`CMISelector`: an augmentation with a choice that is made before an epoch.

    Args:
        selector: the configuration.
        loader: the whole training data, as the user passed them.
        batch_fn: splits a batch.
        input_stats: (mean, std) of normalised images.
        agreed: gives every process what the first one passes; a single process keeps its own.
    """

    def __init__(
        self,
        selector: CMISelector,
        loader: Iterable[Any],
        batch_fn: BatchFn,
        input_stats: Stats | None,
        agreed: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        self.selector, self.loader, self.batch_fn, self._agreed = selector, loader, batch_fn, agreed
        self.unit_range = UnitRange(input_stats)
        self.chosen: Candidate | None = None
        self._extremes: Extremes | None = None  # of what the chosen one makes
        self.classes = 0
        self._records: list[dict[str, Any]] | None = None  # of this epoch's ranking
        self._score = 0.0

    def prepare(self, epoch: int, teacher: nn.Module | None, student: nn.Module, needs_labels: bool) -> None:
        """Rank where an epoch calls for it. Draws nothing from training, so that a resumed run repeats it.

        Args:
            epoch: that begins, from 0.
            teacher: on its device, in any mode.
            student: likewise; where it is asked, it is left in eval mode with frozen ranges.
            needs_labels: whether the phase reads labels.
        """
        every = self.selector.every
        if self.chosen is not None and (epoch == 0 or every is None or epoch % every):
            return
        if teacher is None:
            raise QakdError("augment=CMISelector() ranks augmentations with the teacher: pass one, or another augment.")
        labels = self.selector.labels
        if labels == "auto":
            labels = "dataset" if needs_labels else "teacher"
        ranking = rank_augmentations(
            teacher,
            self.loader,
            self.selector.candidates,
            labels=labels,
            max_samples=self.selector.max_samples,
            seed=self.selector.seed + 1_000_003 * epoch,
            form=self.selector.form,
            confidence=self.selector.confidence,
            input_stats=self.unit_range.input_stats,
            batch_fn=self.batch_fn,
            search=self.selector.search,
            student=student if self.selector.form == "pair" else None,
        )
        # Processes score the same images, but a last bit may differ between devices: the first one decides.
        found: list[Any] = [_plain(ranking.candidates[0]), list(ranking.records), ranking.num_classes, ranking.explanation]
        self._choose(*self._agreed(found))

    def _choose(self, plain: dict[str, Any], records: list[AugmentationScore], classes: int, explanation: str) -> None:
        self.chosen, self._extremes = self._candidate(plain), None
        self.classes = classes
        parts = ["name", "score", "cmi", "cross_entropy", "centroid_divergence", "form"]
        if records[0].student_divergence is not None:
            parts.append("student_divergence")
        self._records = [{part: getattr(record, part) for part in parts} for record in records]
        self._score = records[0].score
        line = f"augmentation by contextual mutual information: {explanation}. {WORTH[records[0].form]}"
        _log.info("%s", line)
        say(line)

    def __call__(self, x: Tensor, labels: Any) -> tuple[Tensor, Any]:
        """Augment a batch as the loader yields it; labels become probabilities where images are mixed."""
        if self.chosen is None:
            return x, labels
        if self._extremes is None:
            self._extremes = self.chosen.extremes()
        images, mixed = self.chosen(self.unit_range.unit(x), labels, num_classes=self.classes, extremes=self._extremes)
        return self.unit_range.normalised(images), mixed

    def row(self) -> dict[str, Any]:
        """For this epoch's row of the history: what was chosen, and after a ranking all scores.

        Raises:
            QakdError: some images of the epoch, or what was made of them, were not in [0, 1].
        """
        if self.chosen is None:
            return {}
        self.unit_range.settle()
        if self._extremes is not None:
            self._extremes.settle()
        row: dict[str, Any] = {"augmentation": self.chosen.name, "augmentation_score": self._score}
        if self._records is not None:
            row["augmentation_scores"] = {record["name"]: record["score"] for record in self._records}
            row["augmentation_ranking"] = self._records
        self._records = None
        return row

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        chosen = None if self.chosen is None else _plain(self.chosen)
        return {"chosen": chosen, "classes": self.classes, "records": self._records, "score": self._score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the choice of a checkpoint."""
        self.chosen = None if state["chosen"] is None else self._candidate(state["chosen"])
        self.classes, self._records, self._score = state["classes"], state["records"], state["score"]

    def _candidate(self, plain: dict[str, Any]) -> Candidate:
        """A candidate of this run by name, or a composition that a search made."""
        if plain["parts"]:
            parts = tuple(Composition(tuple((name, magnitude) for name, magnitude in steps)) for steps in plain["parts"])
            return Candidate(plain["name"], parts[0] if plain["single"] else Mixture(parts))
        known = {candidate.name: candidate for candidate in resolve_candidates(self.selector.candidates)}
        if plain["name"] not in known:
            raise CheckpointError(
                f"the checkpoint was trained with augmentation {plain['name']!r}, which is not among the candidates now: "
                f"{', '.join(known)}."
            )
        return known[plain["name"]]


def _plain(candidate: Candidate) -> dict[str, Any]:
    """A candidate as data that a checkpoint may hold: its name, and the steps of what a search composed."""
    transform: Callable[[Tensor], Tensor] | None = candidate.transform
    parts: tuple[Composition, ...] = ()
    if isinstance(transform, Composition):
        parts = (transform,)
    elif isinstance(transform, Mixture):
        parts = transform.parts
    steps = [[list(step) for step in part.steps] for part in parts]
    return {"name": candidate.name, "parts": steps, "single": isinstance(transform, Composition)}
