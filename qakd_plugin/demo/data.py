"""scikit-learn's handwritten digits: 1,797 real 8x8 images, which it ships."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .._common.optional import require


class ImagesOnly(Dataset[Tensor]):
    """The images of a data set, without its labels."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True)
class Digits:
    """Train, validation and test split: images float32 (N, 1, 32, 32) in [0, 1], labels int64 (N,)."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loader(
        self, split: str, *, labels: bool = True, batch_size: int = 64, shuffle: bool = False, seed: int = 0
    ) -> DataLoader[Tensor]:
        """Batches of a split: (images, labels), or images alone."""
        images, targets = getattr(self, split)
        data: Dataset[Tensor] = TensorDataset(images, targets) if labels else ImagesOnly(images)  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)


def load(seed: int = 0) -> Digits:
    """Load the digits, upscale them to 32x32 and split them once: 60 % train, 15 % validation, 25 % test, stratified.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    purpose = "load the handwritten digits that it ships"
    digits = require("sklearn.datasets", extra="demo", purpose=purpose).load_digits()
    train_test_split = require("sklearn.model_selection", extra="demo", purpose=purpose).train_test_split
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    train, validation = train_test_split(rest, test_size=0.2, random_state=seed, stratify=labels[rest])
    parts = [(images[indices], labels[indices]) for indices in (train, validation, test)]
    return Digits(*parts)
