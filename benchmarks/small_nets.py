"""Networks and data of the studies: small enough for two cores, hard enough that 2 bits cost accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import glyphs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qakd_plugin._common.files import atomic_path
from qakd_plugin.demo.data import load as load_digits
from qakd_plugin.demo.net import DigitNet

BATCH = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Split = tuple[Tensor, Tensor]
Augment = Callable[[Tensor], tuple[Tensor, Any]]


def data(name: str) -> tuple[Split, Split]:
    """Training and test split: (images, labels) each."""
    if name == "glyphs":
        return glyphs.load(16_000, seed=0), glyphs.load(4000, seed=1)
    digits = load_digits(seed=0)
    return digits.train, digits.test


def teacher(
    name: str, path: Path, augment: Augment | None = None, *, train: Split | None = None, epochs: int | None = None
) -> nn.Module:
    """The full-precision network of a data set, trained once and kept at ``path``.

    Args:
        name: of the data set.
        path: of its weights.
        augment: a batch of images -> (images, anything), in its training.
        train: what it learns from; the data set's whole training split by default.
        epochs: of its training; 6 on glyphs and 15 on digits by default.
    """
    torch.manual_seed(0)
    network = DigitNet(width=8)
    network.head = nn.Linear(32, len(glyphs.CLASSES) if name == "glyphs" else 10)
    if not path.is_file():
        images, labels = data(name)[0] if train is None else train
        _train_teacher(network.to(DEVICE), images, labels, augment, epochs or (6 if name == "glyphs" else 15))
        with atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return network.cpu().eval()


def _train_teacher(network: nn.Module, images: Tensor, labels: Tensor, augment: Augment | None, epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            x = images[rows] if augment is None else augment(images[rows])[0]
            F.cross_entropy(network(x.to(DEVICE)), labels[rows].to(DEVICE)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of correct answers."""
    device = next(network.parameters()).device
    answers = torch.cat([network(x.to(device)).argmax(1).cpu() for x in images.split(500)])
    return int((answers == labels).sum()) / len(labels)
