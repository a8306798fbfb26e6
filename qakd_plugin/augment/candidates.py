"""Augmentations to choose from: torchvision's, one draw per image, each alone and with CutMix; and whatever the user names."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from ..errors import QakdError
from .data import Extremes

Transform: TypeAlias = Callable[[Tensor], Tensor]
Candidates: TypeAlias = Mapping[str, "Transform | None"] | Sequence["Candidate | Transform | str"]
"""What users may pass: {name: callable}, or a sequence of Candidates, callables and names of the default list."""

MIXES = {"cutmix": v2.CutMix, "mixup": v2.MixUp}
OVERSHOOT = 1e-3
"""So far beyond [0, 1] is rounding of an interpolation, and is clamped; more is an error."""


@dataclass(frozen=True)
class Candidate:
    """One augmentation of images in [0, 1], possibly followed by a mix of each image with another of its batch.

    Args:
        name: for tables, history and messages.
        transform: keeps shape and dtype; None leaves images as they are.
        mix: "cutmix", "mixup" or None.
        per_image: True calls ``transform`` on each image (C, H, W), so that every one gets its own draw; False on the batch
            (N, C, H, W).
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None
    mix: str | None = None
    per_image: bool = True

    def __post_init__(self) -> None:
        if self.mix is not None and self.mix not in MIXES:
            raise QakdError(f"candidate {self.name!r}: mix={self.mix!r} is unknown: use one of {sorted(MIXES)} or None.")
        if self.transform is not None and not callable(self.transform):
            raise QakdError(f"candidate {self.name!r} must be a callable on images, got {type(self.transform).__name__}.")

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_classes: int | None = None,
        seeds: Sequence[int] | None = None,
        partner: int = 1,
        extremes: Extremes | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Augment a batch.

        Args:
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,), float (N, K), or None.
            num_classes: K, needed to mix labels that are indices.
            seeds: one per image: equal seeds make equal draws, whatever the batch. None draws from the global generators.
            partner: an image is mixed with the one so many places before it.
            extremes: from :meth:`extremes`, to judge what the transform makes without waiting for a device each time.

        Returns:
            Images of the same shape and dtype in [0, 1]; labels as they were, or float (N, K) after a mix.

        Raises:
            QakdError: the transform fails, changes shape or dtype, or leaves [0, 1]; names the candidate.
        """
        augmented = self._transformed(images, seeds, self.extremes() if extremes is None else extremes)
        if self.mix is None:
            return augmented, labels
        return self._mixed(augmented, labels, num_classes, seeds, partner)

    def extremes(self) -> Extremes:
        """Judges that what the transform makes lies in [0, 1]."""
        return Extremes(self._require)

    def _transformed(self, images: Tensor, seeds: Sequence[int] | None, extremes: Extremes) -> Tensor:
        if self.transform is None:
            return images
        try:
            if not self.per_image:
                _seed(images, seeds, 0)
                augmented = self.transform(images)
            else:
                augmented = torch.stack([self._one(image, seeds, index) for index, image in enumerate(images)])
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise QakdError(
                f"candidate {self.name!r} failed on images {tuple(images.shape)} {images.dtype}: {error} "
                "Leave it out, or adapt it."
            ) from error
        return self._checked(images, augmented, extremes)

    def _one(self, image: Tensor, seeds: Sequence[int] | None, index: int) -> Tensor:
        _seed(image, seeds, index)
        assert self.transform is not None
        return self.transform(image)

    def _checked(self, before: Tensor, after: object, extremes: Extremes) -> Tensor:
        if not isinstance(after, Tensor) or after.shape != before.shape or after.dtype != before.dtype:
            made = f"{tuple(after.shape)} {after.dtype}" if isinstance(after, Tensor) else type(after).__name__
            raise QakdError(
                f"candidate {self.name!r} must keep shape and dtype: it made {made} of {tuple(before.shape)} {before.dtype}."
            )
        return extremes.clamped(after)

    def _require(self, low: float, high: float) -> None:
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also true of NaN
            raise QakdError(
                f"candidate {self.name!r} must keep images in [0, 1]: it made values from {low:.4g} to {high:.4g}. "
                "Clamp them, and leave normalisation to input_stats."
            )

    def _mixed(
        self, images: Tensor, labels: Tensor | None, classes: int | None, seeds: Sequence[int] | None, partner: int
    ) -> tuple[Tensor, Tensor | None]:
        """Mix by torchvision's transform on pairs: on a whole batch it would give every image the same box."""
        assert self.mix is not None
        mix = MIXES[self.mix]()
        soft = images.new_zeros(len(images), 1) if labels is None else one_hot(labels, classes)
        mixed, targets = [], []
        for index in range(len(images)):
            _seed(images, seeds, index, stream=1)  # so that the pictures below a mix are those of the plain candidate
            # Not images[[i, j]]: that copies the list to the device, and waits for it.
            both, of_both = mix(*(torch.stack([rows[index], rows[index - partner]]) for rows in (images, soft)))
            mixed.append(both[0])
            targets.append(of_both[0])
        return torch.stack(mixed), None if labels is None else torch.stack(targets)


def one_hot(labels: Tensor, num_classes: int | None) -> Tensor:
    """Labels as float32 (N, K); probabilities stay as they are."""
    if labels.is_floating_point():
        return labels
    if num_classes is None:
        raise QakdError("num_classes is needed to mix labels that are class indices.")
    return torch.nn.functional.one_hot(labels.long(), num_classes).float()


def default_candidates() -> tuple[Candidate, ...]:
    """The sixteen of the paper: none, AugMix, AutoAugment (three policies), RandAugment, TrivialAugmentWide, RandomErasing,
    each alone and followed by CutMix; with torchvision's default settings, on top of what the loader does (crop, flip).

    Source: Kur and Zhao, 2025, arXiv 2509.03850.
    """
    policy = v2.AutoAugmentPolicy
    plain = (
        Candidate("none"),
        Candidate("augmix", v2.AugMix()),
        Candidate("autoaugment-cifar10", v2.AutoAugment(policy.CIFAR10)),
        Candidate("autoaugment-imagenet", v2.AutoAugment(policy.IMAGENET)),
        Candidate("autoaugment-svhn", v2.AutoAugment(policy.SVHN)),
        Candidate("randaugment", v2.RandAugment()),
        Candidate("trivialaugment", v2.TrivialAugmentWide()),
        Candidate("randomerasing", v2.RandomErasing()),
    )
    return (*plain, *(with_cutmix(candidate) for candidate in plain))


def with_cutmix(candidate: Candidate) -> Candidate:
    """The same, followed by CutMix."""
    name = "cutmix" if candidate.transform is None else f"{candidate.name}+cutmix"
    return replace(candidate, name=name, mix="cutmix")


def resolve_candidates(candidates: Candidates | None) -> tuple[Candidate, ...]:
    """What a user passed, as candidates with unique names.

    torchvision's transforms are called on each image, other callables on the batch, as ``distill(augment=...)`` calls them.

    Raises:
        QakdError: there are none, two have the same name, or something is no callable and no known name.
    """
    if candidates is None:
        return default_candidates()
    if isinstance(candidates, Mapping):
        found = [_candidate(name, item) for name, item in candidates.items()]
    elif isinstance(candidates, Sequence) and not isinstance(candidates, str):
        found = [_candidate(None, item) for item in candidates]
    else:
        raise QakdError(f"candidates must be a dict of callables by name or a sequence, got {type(candidates).__name__}.")
    names = [candidate.name for candidate in found]
    if not names:
        raise QakdError("candidates is empty: name at least one, or leave it at None for the default list.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise QakdError(f"candidates: {twice!r} appears more than once. Pass a dict, or Candidates with names of their own.")
    return tuple(found)


def _candidate(name: str | None, item: object) -> Candidate:
    if isinstance(item, Candidate):
        return item if name is None else replace(item, name=name)
    if isinstance(item, str):
        known = {candidate.name: candidate for candidate in default_candidates()}
        if item not in known:
            raise QakdError(f"candidate {item!r} is unknown. Known: {', '.join(known)}.")
        return known[item] if name is None else replace(known[item], name=name)
    if item is None:
        return Candidate(name or "none")
    if not callable(item):
        raise QakdError(f"candidate {name or item!r} must be a callable on images, got {type(item).__name__}.")
    name = name or str(getattr(item, "__name__", type(item).__name__))
    if isinstance(item, v2.CutMix | v2.MixUp):
        return Candidate(name, mix="cutmix" if isinstance(item, v2.CutMix) else "mixup")
    return Candidate(name, item, per_image=isinstance(item, v2.Transform))


def _seed(images: Tensor, seeds: Sequence[int] | None, index: int, stream: int = 0) -> None:
    """Seed what augmentations draw from, for one image. The caller puts the generators back."""
    if seeds is None:
        return
    seed = (2 * seeds[index] + stream) % 2**63
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what a user's callable may draw from
    if images.is_cuda:
        torch.cuda.manual_seed(seed)
