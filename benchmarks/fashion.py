"""Fashion-MNIST, and two networks for its images: a residual and a depthwise one."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from qakd_plugin.demo.net import Block

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install dataset-fashion-mnist, or --data FOLDER with the four files *-ubyte.gz of Fashion-MNIST"
MEAN, STD = 0.2860, 0.3530
"""Of the pixels of the training split."""


def load(folder: Path = DEBIAN) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test split: normalised images (N, 1, 28, 28) and labels (N,), always in the same shuffled order.

    Raises:
        SystemExit: files are missing; says how to install them.
    """
    return _read(folder, "train"), _read(folder, "t10k")


def _read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images, labels = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not (images.is_file() and labels.is_file()):
        raise SystemExit(f"No Fashion-MNIST in {folder}: {INSTALL}")
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).numpy()
    x = torch.from_numpy(pixels[order].astype(np.float32) / 255)
    return (x - MEAN) / STD, torch.from_numpy(classes[order].astype(np.int64))


class ResNet(nn.Module):
    """Of He et al.'s family for small images: three stages of ``blocks`` blocks each; 3 make ResNet-20, 9 ResNet-56.

    Args:
        blocks: per stage.
        width: channels of the first stage; 16 in the paper.
    """

    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, *(stage * width for stage in (1, 2, 4) for _ in range(blocks))]
        strides = [2 if index in (blocks, 2 * blocks) else 1 for index in range(3 * blocks)]
        self.blocks = nn.Sequential(*map(Block, widths, widths[1:], strides))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


def mobilenet() -> nn.Module:
    """MobileNetV2 at width 0.5, for one channel and with a first convolution of stride 1; no dropout."""
    network: nn.Module = mobilenet_v2(num_classes=10, width_mult=0.5, dropout=0.0)
    stem = network.features[0]  # type: ignore[index]
    stem[0] = nn.Conv2d(1, stem[0].out_channels, 3, 1, 1, bias=False)
    return network
