"""ModelOpt alone: its quantization-aware training with its distillation mode, and its export by ``torch.onnx.export``.

From "PyTorch Quantization" and "Distillation" in ModelOpt's guides. ModelOpt's ONNX symbolics belong to the TorchScript
exporter; the newer one stops at its quantizers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.distill as mtd
import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader


def configuration(bits: int) -> dict:
    """ModelOpt's INT8 defaults, or fewer bits between the first layer and the last."""
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if "cfg" in entry:
            entry["cfg"]["num_bits"] = bits
    for layer in ("stem", "head"):
        config["quant_cfg"].append({"quantizer_name": f"{layer}*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
        config["quant_cfg"].append({"quantizer_name": f"{layer}*input_quantizer", "cfg": {"num_bits": 8, "axis": None}})
    return config


@torch.no_grad()
def accuracy(student: mtd.DistillationModel, loader: DataLoader) -> float:
    """Share of correct answers; the teacher is not asked."""
    student.eval()
    with student.only_student_forward():
        correct = [student(images).argmax(1) == labels for images, labels in loader]
    return torch.cat(correct).float().mean().item()


def train(
    teacher: nn.Module, calibration: list[Tensor], loader: DataLoader, val_loader: DataLoader, epochs: int, bits: int, lr: float
) -> nn.Module:
    """The best student of all epochs."""

    def forward_loop(model: nn.Module) -> None:
        for images in calibration:
            model(images)

    student = mtq.quantize(copy.deepcopy(teacher), configuration(bits), forward_loop)
    criterion = mtd.LogitsDistillationLoss(temperature=4.0, reduction="batchmean")
    student = mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion})])
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-4)
    steps = epochs * len(loader)
    warmup = max(1, round(0.05 * steps))
    rise, fall = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup), CosineAnnealingLR(optimizer, steps - warmup)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    best, best_accuracy = None, -1.0
    for _ in range(epochs):
        student.train()
        for images, _ in loader:
            student(images)
            student.compute_kd_loss().backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        reached = accuracy(student, val_loader)
        if reached > best_accuracy:
            best, best_accuracy = copy.deepcopy(student.state_dict()), reached
    student.load_state_dict(best)
    return mtd.export(student).eval()


def export(student: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """One file for both runtimes."""
    path = folder / "student.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["input"], "output_names": ["logits"], "dynamic_axes": axes}
    torch.onnx.export(student, (images,), path, dynamo=False, **names)
    return {"onnxruntime": path, "openvino": path}
