"""torch.ao alone: FX graph mode quantization-aware training in a loop with a distillation loss, and an ONNX export.

From ``torch.ao.quantization.quantize_fx`` and PyTorch's tutorial on quantization-aware training, which freezes BatchNorm's
statistics after three epochs and the ranges after four, and scores the converted model after each. Fewer bits than 8 are asked
for by codes of their own; a converted model holds its activations in 8 bits all the same, and clips none of them to fewer
codes. It is traced before it is exported: the exporter takes it no other way.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    disable_observer,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader


def configuration(bits: int) -> QConfigMapping:
    """torch.ao's defaults, or fewer bits between the first layer and the last."""
    mapping = get_default_qat_qconfig_mapping("x86")
    if bits == 8:
        return mapping
    half = 2 ** (bits - 1)
    activation = FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=2 * half - 1, dtype=torch.quint8
    )
    weight = FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-half,
        quant_max=half - 1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    edges = mapping.global_qconfig
    mapping.set_global(QConfig(activation=activation, weight=weight))
    return mapping.set_module_name("stem", edges).set_module_name("head", edges)


@torch.no_grad()
def accuracy(student: nn.Module, loader: DataLoader) -> float:
    """Share of correct answers."""
    correct = [student(images).argmax(1) == labels for images, labels in loader]
    return torch.cat(correct).float().mean().item()


def train(
    teacher: nn.Module, calibration: list[Tensor], loader: DataLoader, val_loader: DataLoader, epochs: int, bits: int, lr: float
) -> nn.Module:
    """The best student of all epochs, converted."""
    student = prepare_qat_fx(copy.deepcopy(teacher).train(), configuration(bits), (calibration[0],))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-4)
    steps = epochs * len(loader)
    warmup = max(1, round(0.05 * steps))
    rise, fall = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup), CosineAnnealingLR(optimizer, steps - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    best, best_accuracy = None, -1.0
    for epoch in range(epochs):
        student.train()
        if epoch > 2:
            student.apply(freeze_bn_stats)
        if epoch > 3:
            student.apply(disable_observer)
        for images, _ in loader:
            with torch.no_grad():
                target = F.softmax(teacher(images) / 4.0, dim=1)
            loss = 16.0 * F.kl_div(F.log_softmax(student(images) / 4.0, dim=1), target, reduction="batchmean")
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        converted = convert_fx(copy.deepcopy(student).eval())
        reached = accuracy(converted, val_loader)
        if reached > best_accuracy:
            best, best_accuracy = converted, reached
    return best


def export(student: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """One file for both runtimes."""
    path = folder / "student.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(torch.jit.trace(student, images), (images,), path, dynamo=False, **names)
    return {"onnxruntime": path, "openvino": path}
