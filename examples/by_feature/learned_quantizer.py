"""Learned quantizers (EWGS here; LSQ, PACT and DoReFa likewise) at two bits, and the way back to the toolkit's own.

    python examples/by_feature/learned_quantizer.py [--epochs 6]

Two bits are where a learned range matters; first and last layer stay at the eight bits that ``prepare`` gave them.
"""

import argparse

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 6, teacher_epochs: int = 10, width: int = 8) -> tuple[float, float]:
    """Run the example; returns the student's accuracy on the test split, and what the way back changes in its logits."""
    torch.manual_seed(0)
    digits = load()
    loader = digits.loader("train", shuffle=True)
    teacher = train_float(DigitNet(width), loader, teacher_epochs)
    student = qakd.prepare(teacher, [digits.train[0][:256]], weight_bits=2, activation_bits=2)

    qakd.use_quantizers(student, qakd.EWGS(delta=1e-3, refresh_every=2))
    print(qakd.describe(student))
    # Weights, weight quantizers and activation quantizers have learning rates of their own; those of quantizers are relative.
    rates = {"lr": 3e-3, "quantizer_lr": 1e-3, "activation_quantizer_lr": 1e-2}
    result = qakd.distill(
        student, teacher, loader, epochs=epochs, val_loader=digits.loader("validation"), recalibrate_batches=16, **rates
    )

    images, labels = digits.test
    with torch.no_grad():
        learned = result.model(images)
        restored = qakd.restore_quantizers(result.model)(images)  # what mto.save stores without this package
    accuracy = float((learned.argmax(1) == labels).float().mean())
    change = float((learned - restored).abs().max() / learned.abs().max())
    print(f"accuracy {accuracy:.4f}; the toolkit's own quantizers change logits by {change:.1e} of their range")
    return accuracy, change


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    main(parser.parse_args().epochs)
