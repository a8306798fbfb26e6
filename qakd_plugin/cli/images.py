"""Images of a classifier: what is done to a file before the network sees it, and which files a folder holds.

Needs no torch, so that whoever runs a file prepares its images as training did.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .._common.files import read_whole
from ..errors import QakdError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
"""Of image files, as torchvision's ImageFolder has them."""

KEY = "qakd.images"
"""Metadata of an ONNX file: JSON of a :class:`Preprocessing`, and "classes", names by index."""

_MOST_PIXELS = 2**26
"""Of an image, resized or cropped: one that is a few pixels wide and long without end would take all memory."""

_HELD_OUT = 10
"""Of one folder without val/, every so manieth image of each class is held out."""

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the network's input: resized, its middle cropped, scaled to [0, 1], normalized per channel.

    Attributes:
        size: height and width of the input.
        resize: length of the shorter edge before cropping; or height and width, whatever the image's own shape.
        mean: per channel, of values in [0, 1]; three for RGB, one for gray.
        std: likewise.
        interpolation: "bilinear", "bicubic" or another one of Pillow's, by its name.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        edges = (*self.size, *(self.resize if isinstance(self.resize, tuple) else (self.resize,)))
        if len(self.size) != 2 or min(edges) < 1 or max(math.prod(self.size), *edges) > _MOST_PIXELS:
            raise QakdError(
                f"size={self.size}, resize={self.resize}: expected two positive whole numbers, height and width, of 2^26 "
                "pixels at most."
            )
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3) or not finite or min(self.std) <= 0:
            raise QakdError(
                f"mean={self.mean}, std={self.std}: expected a number for each channel, three or one; std positive."
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise QakdError(f"interpolation={self.interpolation!r} is unknown: use one of {', '.join(_INTERPOLATIONS)}.")

    def __call__(self, path: Path) -> npt.NDArray[np.float32]:
        """A file as (C, H, W).

        Raises:
            QakdError: it is no image that can be read.
        """
        try:
            with Image.open(io.BytesIO(read_whole(path))) as file:
                image = self._cropped(self._resized(file.convert("RGB" if len(self.mean) == 3 else "L")))
        except Exception as error:  # Pillow raises many kinds on foreign bytes; all mean the same here
            reason = str(error) or type(error).__name__
            raise QakdError(f"{path} cannot be read as an image: {reason[:300]}. Remove it, or save it again.") from error
        values = np.asarray(image, dtype=np.float32) / np.float32(255)
        mean, std = (np.asarray(numbers, dtype=np.float32) for numbers in (self.mean, self.std))
        normalized = (np.atleast_3d(values) - mean) / std
        return np.ascontiguousarray(normalized.transpose(2, 0, 1), dtype=np.float32)

    def __str__(self) -> str:
        height, width = self.size
        numbers = ", ".join(f"{name} {', '.join(f'{one:.4g}' for one in getattr(self, name))}" for name in ("mean", "std"))
        return f"{height}x{width}, {numbers}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for YAML and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if isinstance(self.resize, tuple):
            new = (self.resize[1], self.resize[0])
        elif width <= height:
            new = (self.resize, int(self.resize * height / width))
        else:
            new = (int(self.resize * width / height), self.resize)
        if new[0] * new[1] > _MOST_PIXELS:
            raise ValueError(f"it has {width}x{height} pixels, {new[0]}x{new[1]} with the shorter edge resized")
        return image if new == image.size else image.resize(new, _INTERPOLATIONS[self.interpolation])

    def _cropped(self, image: Image.Image) -> Image.Image:
        """The middle; what is outside of the image is black."""
        height, width = self.size
        left, top = (_start(have, want) for have, want in zip(image.size, (width, height), strict=True))
        return image.crop((left, top, left + width, top + height))


def _start(have: int, want: int) -> int:
    """Where the middle begins; below zero where there is less than is wanted. As torchvision rounds it."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def preprocessing_from(data: Any, where: str) -> Preprocessing:
    """The inverse of :meth:`Preprocessing.as_dict`.

    Raises:
        QakdError: it is something else.
    """
    try:
        edges = data["resize"]
        return Preprocessing(
            _whole(data["size"]),
            _whole(edges) if isinstance(edges, list) else int(edges),
            tuple(map(float, data["mean"])),
            tuple(map(float, data["std"])),
            str(data["interpolation"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise QakdError(f"{where} does not say how images are prepared: {error!r}. Pass --size, --mean and --std.") from error


def _whole(pair: Any) -> tuple[int, int]:
    height, width = pair
    return int(height), int(width)


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images.

    Attributes:
        paths: of the files.
        labels: index of each one's class.
        classes: names by index.
        text: what they are, in words.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    text: str

    def batches(self, preprocessing: Preprocessing, size: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """(images (N, C, H, W) float32, labels (N,) int64), in the order of the files."""
        for start in range(0, len(self.paths), size):
            images = [preprocessing(path) for path in self.paths[start : start + size]]
            yield np.stack(images), np.array(self.labels[start : start + size], dtype=np.int64)


def training_files(data: Path) -> tuple[ImageFiles, ImageFiles]:
    """What a network is trained with, and what is held out.

    Args:
        data: a folder with train/ and val/, each with a folder of images for each class; or one with the classes themselves,
            of which each tenth image is held out, in the order of digests of their names: the same ones each time.

    Raises:
        QakdError: there is no such folder, a class has no image, or val/ has other classes than train/.
    """
    root = data / "train" if (data / "train").is_dir() else data
    classes = _classes(root)
    files = _files(root, classes)
    if (data / "val").is_dir() and root != data:
        held_out = labelled_files(data / "val", classes)
        return _joined(root, files, classes), held_out
    few = next((name for name in classes if len(files[name]) < 2), None)
    if few is not None:
        raise QakdError(f"--data: {root / few} holds one image: none can be held out. Add images, or make train/ and val/.")
    ordered = {name: sorted(paths, key=_digest) for name, paths in files.items()}
    counts = {name: math.ceil(len(paths) / _HELD_OUT) for name, paths in files.items()}
    held = {name: ordered[name][: counts[name]] for name in classes}
    rest = {name: sorted(ordered[name][counts[name] :]) for name in classes}
    return _joined(root, rest, classes), _joined(root, held, classes, f"held out of {root}, which has no val/ beside it")


def labelled_files(folder: Path, classes: Sequence[str] | None = None) -> ImageFiles:
    """All images below a folder of classes.

    Args:
        folder: with a folder of images for each class.
        classes: that the network knows, by index; some of them may be absent. None: those of the folder, by name.

    Raises:
        QakdError: there is no such folder, or a class that the network does not know.
    """
    found = _classes(folder)
    if classes is not None and (unknown := [name for name in found if name not in classes]):
        raise QakdError(
            f"--data: {folder / unknown[0]} is no class of the network, which knows {', '.join(list(classes)[:8])}"
            f"{' ...' if len(classes) > 8 else ''}. Remove that folder, or rename it."
        )
    return _joined(folder, _files(folder, found), found if classes is None else tuple(classes))


def _joined(root: Path, files: Mapping[str, Sequence[Path]], classes: Sequence[str], text: str = "") -> ImageFiles:
    pairs = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    paths, labels = zip(*pairs, strict=True)
    return ImageFiles(paths, labels, tuple(classes), f"{len(paths):,} images {text or f'of {root}'}")


def _digest(path: Path) -> bytes:
    """Of the file's name, whatever folder it lies in."""
    return hashlib.sha256(os.fsencode(path.name)).digest()


def _classes(root: Path) -> tuple[str, ...]:
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise QakdError(f"--data: {root} cannot be read: {error.strerror}. Check the path.") from error
    if len(names) < 2:
        raise QakdError(
            f"--data: {root} holds {len(names)} folders, and one with images is needed for each class: {root}/cat/1.png, "
            f"{root}/dog/2.png; or {root}/train/cat/1.png with {root}/val beside train."
        )
    return tuple(names)


def _files(root: Path, classes: Sequence[str]) -> dict[str, list[Path]]:
    found = {name: sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES) for name in classes}
    empty = next((name for name, paths in found.items() if not paths), None)
    if empty is not None:
        raise QakdError(f"--data: {root / empty} holds no image ({', '.join(sorted(SUFFIXES))}). Add some, or remove it.")
    return found


def image_metadata(preprocessing: Preprocessing, classes: Sequence[str]) -> dict[str, str]:
    """Entries of an ONNX file's metadata."""
    return {KEY: json.dumps({**preprocessing.as_dict(), "classes": list(classes)})}


def from_metadata(metadata: Mapping[str, str], path: Path) -> tuple[Preprocessing, tuple[str, ...]] | None:
    """What :func:`image_metadata` wrote into a file; None where it is not there.

    Raises:
        QakdError: it says something else.
    """
    if KEY not in metadata:
        return None
    where = f"{path}: its metadata {KEY}"
    try:
        data = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise QakdError(f"{where} is no JSON: {error}. Pass --size, --mean and --std.") from error
    preprocessing = preprocessing_from(data, where)
    classes = data.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise QakdError(f"{where} names no classes. Export the file again.")
    return preprocessing, tuple(classes)
