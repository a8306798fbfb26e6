"""This package on a model prepared by ModelOpt: learned quantizers, distillation without labels, proven exports."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

import qakd_plugin as qakd


def train(
    teacher: nn.Module, calibration: list[Tensor], loader: DataLoader, val_loader: DataLoader, epochs: int, bits: int, lr: float
) -> nn.Module:
    """The best student of all epochs."""
    student = qakd.prepare(teacher, calibration, "modelopt", weight_bits=bits, activation_bits=bits)
    student = qakd.use_quantizers(student, qakd.LSQ())
    return qakd.distill(student, teacher, loader, epochs=epochs, val_loader=val_loader, lr=lr).model


def export(student: nn.Module, images: Tensor, folder: Path) -> dict[str, Path]:
    """A file for each runtime."""
    files = {"onnxruntime": folder / "student.ort.onnx", "openvino": folder / "student.onnx"}
    for runtime, path in files.items():
        qakd.export_onnx(student, images, path, target=runtime)
    return files
