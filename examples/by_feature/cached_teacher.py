"""The teacher's logits are computed once and kept in a file: later epochs and later runs do without its forward pass.

    python examples/by_feature/cached_teacher.py [--epochs 4]

For images that look the same in every epoch. A file that belongs to another teacher or to other data is refused.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 4, teacher_epochs: int = 10, width: int = 8) -> tuple[float, list[int]]:
    """Run the example; returns the student's test accuracy, and how many images the teacher saw in each of two runs."""
    torch.manual_seed(0)
    digits = load()
    teacher = train_float(DigitNet(width), digits.loader("train", shuffle=True), teacher_epochs)
    calibration = [digits.train[0][:256]]
    students = [qakd.prepare(teacher, calibration, weight_bits=bits, activation_bits=bits) for bits in (8, 4)]
    seen = 0

    def count(_module: torch.nn.Module, args: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        nonlocal seen
        seen += len(args[0])

    teacher.register_forward_hook(count)
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        for student in students:  # the second reads what the first has left
            seen = 0
            result = qakd.distill(
                student,
                teacher,
                digits.loader("train", labels=False, shuffle=True),
                epochs=epochs,
                cache_teacher=Path(folder) / "logits.pt",
            )
            counts.append(seen)
    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())
    print(f"W4A4 accuracy {accuracy:.4f}; the teacher saw {counts[0]} images in the first run, {counts[1]} in the second")
    return accuracy, counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
