"""Layers that stay in floating point, and layers that keep the toolkit's quantizer at eight bits.

    python examples/by_feature/excluded_layers.py [--epochs 4]

``keep`` takes names and patterns in both places. ``describe`` shows what came of it before anything is trained.
"""

import argparse

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(
    epochs: int = 4, teacher_epochs: int = 10, width: int = 8, toolkit: str = "modelopt"
) -> tuple[float, dict[str, int], dict[str, int]]:
    """Run the example; returns the student's test accuracy, and the bits of weight quantizers before and after the swap."""
    torch.manual_seed(0)
    digits = load()
    loader = digits.loader("train", shuffle=True)
    teacher = train_float(DigitNet(width), loader, teacher_epochs)

    # In floating point: the classifier, and everything in the first stage.
    student = qakd.prepare(
        teacher, [digits.train[0][:256]], toolkit, weight_bits=4, activation_bits=4, keep=("head", "stages.0.*")
    )
    prepared = weight_bits(student)
    # At the toolkit's own quantizer and its bits: the stem. All others learn their ranges, at three bits.
    qakd.use_quantizers(student, qakd.LSQ(weight_bits=3), keep=("stem.*",))
    print(qakd.describe(student))

    result = qakd.distill(student, teacher, loader, epochs=epochs, val_loader=digits.loader("validation"))
    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())
    print(f"accuracy {accuracy:.4f}")
    return accuracy, prepared, weight_bits(result.model)


def weight_bits(model: torch.nn.Module) -> dict[str, int]:
    """Bits of each weight quantizer, by its name."""
    return {quantizer.name: quantizer.bits for quantizer in qakd.describe(model).quantizers if quantizer.role == "weight"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
