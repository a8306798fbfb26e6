"""NVIDIA ModelOpt: from its own quick start to a distilled, exported student.

    python examples/modelopt_qat.py [--epochs 5]

Source of the ModelOpt part: https://nvidia.github.io/Model-Optimizer, "Quick Start: Quantization".
"""

import argparse
import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 5, teacher_epochs: int = 10, width: int = 8, folder: Path = Path("runs/modelopt_qat")) -> float:
    """Run the example; returns the student's accuracy on the test split."""
    torch.manual_seed(0)
    digits = load()
    data_loader = digits.loader("train", shuffle=True)
    teacher = train_float(DigitNet(width), data_loader, teacher_epochs)

    # As ModelOpt documents it: a configuration, and a loop that calibrates.
    def forward_loop(model: torch.nn.Module) -> None:
        for images, _ in data_loader:
            model(images)

    model = mtq.quantize(copy.deepcopy(teacher), mtq.INT8_DEFAULT_CFG, forward_loop)

    # The three lines that are added: learned quantizers (optional), distillation, export with proof.
    model = qakd.use_quantizers(model, qakd.LSQ())
    result = qakd.distill(model, teacher, data_loader, epochs=epochs, val_loader=digits.loader("validation"))
    exported = qakd.export_onnx(result.model, digits.test[0][:64], folder / "student.onnx", target="tensorrt")

    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())
    print(f"accuracy {accuracy:.4f}, {exported.parity.weight_codes} weight codes equal: {exported.path}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
