"""Garments pasted on canvases: images for a detector, with exact boxes.

Garments are Fashion-MNIST's, of any size between MIN_SIDE and MAX_SIDE and of any contrast, one to OBJECTS on a canvas. The
background is a smooth pattern with noise, and scraps of other garments, which are no objects and look like parts of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
"""Pixels of a canvas."""

MIN_SIDE, MAX_SIDE, OBJECTS = 18, 32, 4
SCRAPS, SCRAP = 5, 10
"""Scraps on a canvas, and pixels of a side."""

OVERLAP = 0.15
"""Of two boxes, as a share of the smaller one: a garment that finds no such place is left out."""

TRIES = 20
NOTHING = -1
"""Label of the rows that fill up a canvas's boxes."""

MEAN, STD = 0.38, 0.19
"""About those of their pixels."""


@dataclass(frozen=True)
class Canvases:
    """Images and what is on them.

    Attributes:
        images: uint8 (N, 1, SIDE, SIDE).
        boxes: float (N, OBJECTS, 4), left, top, right and bottom in pixels; zeros where a canvas has fewer.
        labels: int64 (N, OBJECTS); NOTHING where a canvas has fewer.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> Canvases:
        return Canvases(self.images[rows], self.boxes[rows], self.labels[rows])


def normalized(images: Tensor) -> Tensor:
    """What networks read of images (uint8)."""
    return (images.float() / 255 - MEAN) / STD


def targets_of(boxes: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Of each canvas, the boxes (M, 4) and labels (M,) of what is on it, as metrics take them."""
    return [
        {"boxes": own[kinds != NOTHING], "labels": kinds[kinds != NOTHING]} for own, kinds in zip(boxes, labels, strict=True)
    ]


def paste(garments: Tensor, kinds: Tensor, count: int, seed: int) -> Canvases:
    """Make canvases.

    Args:
        garments: float (M, 1, 28, 28), 0 to 1, on black.
        kinds: int64 (M,), their classes.
        count: of canvases.
        seed: of everything that is drawn.
    """
    draw = np.random.default_rng(seed)
    found = Canvases(
        torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8),
        torch.zeros(count, OBJECTS, 4),
        torch.full((count, OBJECTS), NOTHING),
    )
    for index in range(count):
        canvas = _background(garments, draw)
        taken: list[tuple[int, int, int, int]] = []
        for garment in draw.integers(len(garments), size=draw.integers(1, OBJECTS + 1)).tolist():
            picture = _resized(garments[garment, 0], int(draw.integers(MIN_SIDE, MAX_SIDE + 1)))
            place = _place(picture.shape, taken, draw)
            if place is None:
                continue
            found.boxes[index, len(taken)] = torch.tensor(place)
            found.labels[index, len(taken)] = kinds[garment]
            taken.append(place)
            _blend(canvas, picture, place, draw.uniform(0.7, 1.0))
        noisy = canvas + draw.normal(0, 0.04, canvas.shape)
        found.images[index, 0] = torch.from_numpy((noisy.clip(0, 1) * 255).round().astype(np.uint8))
    return found


def _background(garments: Tensor, draw: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE), 0 to 1."""
    coarse = torch.from_numpy(draw.uniform(0.0, 0.7, (1, 1, 5, 5)))
    canvas: np.ndarray = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0].numpy()
    for garment in draw.integers(len(garments), size=SCRAPS).tolist():
        top, left = draw.integers(0, 28 - SCRAP, 2)
        y, x = draw.integers(0, SIDE - SCRAP, 2)
        scrap = garments[garment, 0, top : top + SCRAP, left : left + SCRAP].numpy()
        _blend(canvas, scrap, (x, y, x + SCRAP, y + SCRAP), draw.uniform(0.5, 1.0))
    return canvas


def _resized(garment: Tensor, side: int) -> np.ndarray:
    """Larger or smaller, and cut to what is not black."""
    picture = F.interpolate(garment[None, None], (side, side), mode="bilinear", antialias=True)[0, 0].numpy()
    seen = picture > 0.1
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows):
        return picture
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # type: ignore[no-any-return]


def _place(
    shape: tuple[int, ...], taken: list[tuple[int, int, int, int]], draw: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom where it covers hardly anything; None where there is no such place."""
    height, width = shape
    for _ in range(TRIES):
        x, y = int(draw.integers(0, SIDE - width + 1)), int(draw.integers(0, SIDE - height + 1))
        place = x, y, x + width, y + height
        if all(_overlap(place, other) <= OVERLAP for other in taken):
            return place
    return None


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """Of two boxes, as a share of the smaller one."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return max(width, 0) * max(height, 0) / smaller


def _blend(canvas: np.ndarray, picture: np.ndarray, place: tuple[int, int, int, int], contrast: float) -> None:
    """Put a picture on a canvas; what is black in it stays as it was."""
    left, top, right, bottom = place
    opaque = (4 * picture).clip(0, 1)
    under = canvas[top:bottom, left:right]
    canvas[top:bottom, left:right] = (1 - opaque) * under + opaque * contrast * picture
