"""Real photographs that packages carry, and crops of them: images without labels.

Of each scene one photograph. pip brings those of scikit-image, scikit-learn and matplotlib, Debian the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OPENCV = (
    "alphamat/input_images/plant.jpg", "data/aero1.jpg", "data/aloeL.jpg", "data/apple.jpg", "data/baboon.jpg",
    "data/basketball1.png", "data/board.jpg", "data/box_in_scene.png", "data/building.jpg", "data/butterfly.jpg",
    "data/chicky_512.png", "data/ela_original.jpg", "data/fruits.jpg", "data/graf1.png", "data/leuvenA.jpg",
    "data/licenseplate_motion.jpg", "data/messi5.jpg", "data/orange.jpg", "data/rubberwhale1.png", "data/smarties.png",
    "data/squirrel_cls.jpg", "dnn_superres/butterfly.png", "hfs/data/000.jpg", "reg/home.png", "text/scenetext01.jpg",
    "text/scenetext02.jpg", "text/scenetext03.jpg", "text/scenetext04.jpg", "text/scenetext05.jpg", "text/scenetext06.jpg",
)  # fmt: skip
MATE = (
    "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings", "Wood",
    "YellowFlower",
)  # fmt: skip
SKIMAGE = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
           "motorcycle_left.png", "rocket.jpg")  # fmt: skip
SOURCES = {
    "opencv-doc": ("usr/share/doc/opencv-doc/examples", OPENCV),
    "mate-backgrounds": ("usr/share/backgrounds/mate/nature", tuple(f"{name}.jpg" for name in MATE)),
    "skimage": ("data", SKIMAGE),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
}
"""By package: the folder in it, and the photographs there."""

INSTALL = (
    "apt-get download opencv-doc mate-backgrounds && for f in *.deb; do dpkg -x $f FOLDER; done; "
    "pip install scikit-image scikit-learn matplotlib"
)


def find(folder: Path = Path("/")) -> list[Path]:
    """Files of all photographs, always in the same order.

    Args:
        folder: that Debian's packages were unpacked to.

    Raises:
        SystemExit: some are missing; says how to get them.
    """
    found = [_root(package, folder) / inside / name for package, (inside, names) in SOURCES.items() for name in names]
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise SystemExit(f"{len(missing)} photographs are missing, the first is {missing[0]}: {INSTALL}; then --data FOLDER")
    return found


def _root(package: str, folder: Path) -> Path:
    if "-" in package:  # one of Debian's
        return folder
    found = importlib.util.find_spec(package)
    return Path("/missing") / package if found is None or found.origin is None else Path(found.origin).parent


def read(path: Path, longest: int = 1024) -> Image.Image:
    """In colours, and not much larger than crops need."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((longest, longest))
    return image


def crops(images: Sequence[Image.Image], count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random crops, of all photographs as many as of any: (count, 3, side, side), float32 in [0, 1].

    A crop takes 15 to 100 % of the area of the largest square, at a random place, mirrored half of the time.

    Args:
        images: to crop.
        count: of crops.
        side: of a crop, pixels.
        generator: of the random numbers.
    """
    batch = torch.empty(count, 3, side, side)
    for index in range(count):
        image = images[index % len(images)]
        share, x, y, mirrored = torch.rand(4, generator=generator).tolist()
        edge = round(min(image.size) * (0.15 + 0.85 * share) ** 0.5)
        left, top = round(x * (image.width - edge)), round(y * (image.height - edge))
        crop = image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + edge, top + edge))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
        batch[index] = pixels.flip(2) if mirrored < 0.5 else pixels
    return batch
