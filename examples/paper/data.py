"""Images of CIFAR, Tiny-ImageNet and ImageNet from a local folder. Nothing is downloaded.

CIFAR's batches are pickles, and unpickling runs whatever code a file holds. torchvision unpickles only files whose MD5 sums are
those of the published ones; other files are refused here as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config import Data
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

from qakd_plugin.errors import QakdError

LAYOUTS = {
    "cifar10": "cifar-10-batches-py/{batches.meta,data_batch_1..5,test_batch}, from cifar-10-python.tar.gz as published",
    "cifar100": "cifar-100-python/{meta,train,test}, from cifar-100-python.tar.gz as published",
    "tiny_imagenet": "tiny-imagenet-200/{train/WNID/images/*.JPEG,val/images/*.JPEG,val/val_annotations.txt}",
    "imagenet": "{train,val}/WNID/*.JPEG, the validation images sorted into folders of their classes",
}
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Splits:
    """Loaders of (images float32 (N, 3, H, W), labels int64 (N,)), and the number of classes."""

    train: DataLoader[Any]
    held_out: DataLoader[Any]
    test: DataLoader[Any]
    classes: int


class TinyValidation(Dataset[tuple[Any, int]]):
    """Tiny-ImageNet's validation images: one folder, and a table of their classes.

    Args:
        folder: ``val`` of the data set.
        class_to_idx: of the training images.
        transform: of an image.
    """

    def __init__(self, folder: Path, class_to_idx: dict[str, int], transform: Callable[[Any], Any]) -> None:
        rows = [line.split("\t") for line in (folder / "val_annotations.txt").read_text().splitlines() if line]
        unknown = sorted({row[1] for row in rows} - set(class_to_idx))
        if unknown:
            raise QakdError(f"{folder / 'val_annotations.txt'} names classes without training images: {unknown[:3]}.")
        self.items = [(folder / "images" / row[0], class_to_idx[row[1]]) for row in rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def load(data: Data, seed: int = 0) -> Splits:
    """Open a data set and hold out part of its training images.

    Raises:
        QakdError: the folder does not hold it; says how it must look.
    """
    augmented, plain = _transforms(data)
    try:
        train, held_out, test, classes = _OPEN[data.name](Path(data.root), augmented, plain)
    except (RuntimeError, OSError) as error:
        raise QakdError(
            f"data.root={data.root!r} does not hold {data.name} ({error}). Expected there: {LAYOUTS[data.name]}. Nothing is "
            "downloaded."
        ) from error
    if not 0 < data.held_out < len(train):
        raise QakdError(f"data.held_out={data.held_out} must lie between 1 and {len(train) - 1}, the training images less one.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, kept = order[data.held_out :], order[: data.held_out]

    def loader(images: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(images, data.batch_size, shuffle=shuffle, num_workers=data.workers, generator=generator)

    return Splits(loader(Subset(train, chosen), shuffle=True), loader(Subset(held_out, kept)), loader(test), classes)


def _transforms(data: Data) -> tuple[v2.Compose, v2.Compose]:
    """Of training images, and of all others."""
    size = data.image_size
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(list, _STATISTICS[data.name]))]
    if data.name == "imagenet":
        augmented = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        plain = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    elif data.name == "tiny_imagenet":
        augmented, plain = [v2.Resize((size, size)), v2.RandomHorizontalFlip()], [v2.Resize((size, size))]
    else:
        augmented, plain = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()], []
    return v2.Compose(augmented + to_tensor), v2.Compose(plain + to_tensor)


def _cifar(kind: type[datasets.CIFAR10]) -> Callable[..., tuple[Any, Any, Any, int]]:
    def opened(root: Path, augmented: Any, plain: Any) -> tuple[Any, Any, Any, int]:
        train, held_out = kind(root, train=True, transform=augmented), kind(root, train=True, transform=plain)
        return train, held_out, kind(root, train=False, transform=plain), len(train.classes)

    return opened


def _tiny_imagenet(root: Path, augmented: Any, plain: Any) -> tuple[Any, Any, Any, int]:
    folder = root / "tiny-imagenet-200"
    train, held_out = datasets.ImageFolder(folder / "train", augmented), datasets.ImageFolder(folder / "train", plain)
    return train, held_out, TinyValidation(folder / "val", train.class_to_idx, plain), len(train.classes)


def _imagenet(root: Path, augmented: Any, plain: Any) -> tuple[Any, Any, Any, int]:
    train, held_out = datasets.ImageFolder(root / "train", augmented), datasets.ImageFolder(root / "train", plain)
    test = datasets.ImageFolder(root / "val", plain)
    if test.classes != train.classes:
        raise QakdError(f"{root}: train and val have different folders of classes: {len(train.classes)}, {len(test.classes)}.")
    return train, held_out, test, len(train.classes)


_OPEN = {
    "cifar10": _cifar(datasets.CIFAR10),
    "cifar100": _cifar(datasets.CIFAR100),
    "tiny_imagenet": _tiny_imagenet,
    "imagenet": _imagenet,
}
