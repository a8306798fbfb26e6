"""torchao QATConfig: from its documented use to a distilled, exported student with 4-bit weights in blocks.

    python examples/torchao_qatconfig.py [--epochs 5]

Source of the torchao part: the documentation of ``torchao.quantization.qat.QATConfig``. It takes linear layers only, so the
network here is a perceptron; activations stay in floating point, because torchao's are dynamic, which no target takes.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import train_float


def main(epochs: int = 5, teacher_epochs: int = 10, width: int = 128, folder: Path = Path("runs/torchao_qatconfig")) -> float:
    """Run the example; returns the student's accuracy on the test split."""
    torch.manual_seed(0)
    digits = load()
    loader = digits.loader("train", shuffle=True)
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 10))
    teacher = train_float(network, loader, teacher_epochs)

    # As torchao documents it, with symmetric weights: zero point 0 is what targets take.
    model = copy.deepcopy(teacher)
    weight_config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    quantize_(model, QATConfig(weight_config=weight_config, step="prepare"))

    # The two lines that are added, in place of train_loop(model) and step="convert": training, export.
    result = qakd.distill(model, teacher, loader, epochs=epochs, val_loader=digits.loader("validation"))
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
