"""Letters and digits in the fonts that come with matplotlib: 62 classes, rendered, with background and noise.

    images, labels = load(16_000, seed=0)

Small enough for a CPU, and hard enough that a small network in full precision reaches about 90 % (I, l and 1, or O and 0, can
hardly be told apart). Rendered once and kept as .npz in the temporary folder.
"""

from __future__ import annotations

import string
import tempfile
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qakd_plugin._common.files import atomic_path

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIZE = 24
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
_VERSION = 1
"""Of the rendering: another number makes other files."""


def load(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images float32 (count, 1, 24, 24) in [0, 1] and labels int64 (count,), the same for equal arguments."""
    path = Path(tempfile.gettempdir()) / "glyphs" / f"v{_VERSION}-{count}-{seed}.npz"
    if not path.is_file():
        images, labels = render(count, seed)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, images=images, labels=labels)
    with np.load(path) as data:
        return torch.from_numpy(data["images"]).float()[:, None] / 255, torch.from_numpy(data["labels"]).long()


def render(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (count, 24, 24) and labels int64 (count,)."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % len(CLASSES))
    return np.stack([_glyph(CLASSES[label], draw) for label in labels]), labels


def _glyph(character: str, draw: np.random.Generator) -> np.ndarray:
    """One character: font, size, place, grey levels, a background with a gradient and blobs, and noise are drawn."""
    mask = Image.new("L", (SIZE, SIZE))
    font = _font(str(draw.choice(FONTS)), int(draw.integers(14, 21)))
    place = SIZE / 2 + draw.uniform(-2.5, 2.5, 2)
    ImageDraw.Draw(mask).text(tuple(place), character, fill=255, font=font, anchor="mm")
    ink = np.asarray(mask, dtype=np.float64) / 255
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    slope, coarse = draw.normal(0, 0.2, 2), Image.fromarray(draw.normal(0, 0.09, (4, 4)).astype(np.float32))
    background = draw.uniform(0.25, 0.75) + slope[0] * x + slope[1] * y + np.asarray(coarse.resize((SIZE, SIZE), Image.BICUBIC))
    contrast = draw.choice((-1, 1)) * draw.uniform(0.3, 0.65)
    image = background + contrast * ink + draw.normal(0, draw.uniform(0.03, 0.09), (SIZE, SIZE))
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)
