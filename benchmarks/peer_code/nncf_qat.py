"""NNCF: ``nncf.quantize``, then training in a loop with a distillation loss, and OpenVINO's own conversion.

From "Use NNCF for Quantization Aware Training" in NNCF's documentation.
"""

from __future__ import annotations

import copy
from pathlib import Path

import nncf
import openvino
import torch
import torch.nn.functional as F
from nncf.quantization.advanced_parameters import QuantizationParameters
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader


@torch.no_grad()
def accuracy(student: nn.Module, loader: DataLoader) -> float:
    """Share of correct answers."""
    student.eval()
    correct = [student(images).argmax(1) == labels for images, labels in loader]
    return torch.cat(correct).float().mean().item()


def train(
    teacher: nn.Module, calibration: list[Tensor], loader: DataLoader, val_loader: DataLoader, epochs: int, bits: int, lr: float
) -> nn.Module:
    """The best student of all epochs. Other numbers of bits than 8 can be asked for, and are refused by ``nncf.quantize``."""
    width = QuantizationParameters(num_bits=bits)
    widths = nncf.AdvancedQuantizationParameters(weights_quantization_params=width, activations_quantization_params=width)
    student = nncf.quantize(copy.deepcopy(teacher), nncf.Dataset(calibration), advanced_parameters=widths)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-4)
    steps = epochs * len(loader)
    warmup = max(1, round(0.05 * steps))
    rise, fall = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup), CosineAnnealingLR(optimizer, steps - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    best, best_accuracy = None, -1.0
    for _ in range(epochs):
        student.train()
        for images, _ in loader:
            with torch.no_grad():
                target = F.softmax(teacher(images) / 4.0, dim=1)
            loss = 16.0 * F.kl_div(F.log_softmax(student(images) / 4.0, dim=1), target, reduction="batchmean")
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        reached = accuracy(student, val_loader)
        if reached > best_accuracy:
            best, best_accuracy = copy.deepcopy(student.state_dict()), reached
    student.load_state_dict(best)
    return student.eval()


def export(student: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """A file for OpenVINO."""
    path = folder / "student.xml"
    converted = openvino.convert_model(student, example_input=images, input=[-1, *images.shape[1:]])
    openvino.save_model(converted, path, compress_to_fp16=False)
    return {"openvino": path}
