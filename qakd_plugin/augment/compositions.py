"""Augmentations beyond the fixed list: two operations in a row, each with a magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import QakdError
from .candidates import Candidate


def _affine(
    image: Tensor, *, x: float = 0.0, y: float = 0.0, shear: Sequence[float] = (0.0, 0.0), scale: float = 1.0
) -> Tensor:
    height, width = image.shape[-2:]
    shift = [round(x * width), round(y * height)]
    moved: Tensor = F.affine(image, angle=0.0, translate=shift, scale=scale, shear=list(shear))
    return moved


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "rotate": lambda image, m: F.rotate(image, 45 * m),
    "shear-x": lambda image, m: _affine(image, shear=(math.degrees(math.atan(0.6 * m)), 0.0)),
    "shear-y": lambda image, m: _affine(image, shear=(0.0, math.degrees(math.atan(0.6 * m)))),
    "shift-x": lambda image, m: _affine(image, x=0.4 * m),
    "shift-y": lambda image, m: _affine(image, y=0.4 * m),
    "scale": lambda image, m: _affine(image, scale=1 + 0.5 * m),
    "brightness": lambda image, m: F.adjust_brightness(image, 1 + 0.9 * m),
    "contrast": lambda image, m: F.adjust_contrast(image, 1 + 0.9 * m),
    "saturation": lambda image, m: F.adjust_saturation(image, 1 + 0.9 * m),
    "sharpness": lambda image, m: F.adjust_sharpness(image, 1 + 0.9 * m),
    "blur": lambda image, m: F.gaussian_blur(image, [5, 5], [0.1 + 1.9 * abs(m)]),
    "noise": lambda image, m: F.gaussian_noise(image, sigma=0.3 * abs(m)),
    "posterize": lambda image, m: F.posterize(image, 8 - round(6 * abs(m))),
    "solarize": lambda image, m: F.solarize(image, 1 - abs(m)),
    "erase": lambda image, m: _erase(image, abs(m)),
}
"""By name: (image (C, H, W), magnitude from -1 to 1) -> image. torchvision's functions; 0 changes (almost) nothing."""


def _erase(image: Tensor, magnitude: float) -> Tensor:
    height, width = image.shape[-2:]
    h, w = max(1, round(0.6 * magnitude * height)), max(1, round(0.6 * magnitude * width))
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    erased: Tensor = F.erase(image, top, left, h, w, torch.zeros((), dtype=image.dtype, device=image.device))
    return erased


@dataclass(frozen=True)
class Composition:
    """Operations in a row; the sign of each magnitude is drawn.

    Args:
        steps: (operation, magnitude from 0 to 1) of each.
    """

    steps: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        for name, magnitude in self.steps:
            if name not in OPERATIONS:
                raise QakdError(f"operation {name!r} is unknown. Known: {', '.join(OPERATIONS)}.")
            if not 0 <= magnitude <= 1:
                raise QakdError(f"magnitude {magnitude} of {name!r} must lie in [0, 1].")

    def __call__(self, image: Tensor) -> Tensor:
        for name, magnitude in self.steps:
            sign = 1 if torch.rand(()) < 0.5 else -1
            image = OPERATIONS[name](image, sign * magnitude)
        return image

    def __str__(self) -> str:
        return " > ".join(f"{name} {magnitude:g}" for name, magnitude in self.steps)


@dataclass(frozen=True)
class Mixture:
    """One of several compositions, drawn for each image.

    Args:
        parts: to draw from, with equal probabilities.
    """

    parts: tuple[Composition, ...]

    def __call__(self, image: Tensor) -> Tensor:
        return self.parts[int(torch.randint(len(self.parts), ()))](image)


@dataclass(frozen=True)
class Search:
    """Also score random compositions of two operations, and a mixture of the best few.

    Args:
        budget: compositions to score.
        keep: how many of the best are mixed at random.
        magnitudes: to draw from.
    """

    budget: int = 24
    keep: int = 3
    magnitudes: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.budget:
            raise QakdError(f"Search: keep={self.keep} must lie between 1 and budget={self.budget}.")
        if not self.magnitudes or not all(0 <= magnitude <= 1 for magnitude in self.magnitudes):
            raise QakdError(f"Search: magnitudes={self.magnitudes} must be numbers from 0 to 1.")
        possible = math.comb(len(OPERATIONS), 2) * len(set(self.magnitudes)) ** 2
        if self.budget > possible:
            raise QakdError(f"Search: budget={self.budget} is more than the {possible} compositions there are. Lower it.")

    def candidates(self, seed: int) -> tuple[Candidate, ...]:
        """So many different compositions, the same for equal seeds."""
        draws, names = torch.Generator().manual_seed(seed), list(OPERATIONS)
        found: dict[tuple[tuple[str, float], ...], Composition] = {}
        while len(found) < self.budget:
            first, second = sorted(torch.randperm(len(names), generator=draws)[:2].tolist())
            sizes = torch.randint(len(self.magnitudes), (2,), generator=draws).tolist()
            steps = tuple((names[name], self.magnitudes[size]) for name, size in zip((first, second), sizes, strict=True))
            found[steps] = Composition(steps)
        return tuple(Candidate(str(composition), composition) for composition in found.values())


def mixture(candidates: Sequence[Candidate]) -> Candidate:
    """A candidate that draws one of several compositions for each image."""
    parts = tuple(candidate.transform for candidate in candidates if isinstance(candidate.transform, Composition))
    return Candidate(f"mixture of {' | '.join(map(str, parts))}", Mixture(parts))
