"""bfloat16 for convolutions, float32 for quantizers, losses and weights.

    python examples/by_feature/bf16.py [--epochs 4]

It pays on processors with AVX512-BF16 or AMX, and on GPUs.
"""

import argparse

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 4, teacher_epochs: int = 10, width: int = 8) -> tuple[float, set[torch.dtype]]:
    """Run the example; returns the student's accuracy on the test split, and the types of its parameters."""
    torch.manual_seed(0)
    digits = load()
    teacher = train_float(DigitNet(width), digits.loader("train", shuffle=True), teacher_epochs)
    student = qakd.prepare(teacher, [digits.train[0][:256]], weight_bits=4, activation_bits=4)
    qakd.use_quantizers(student, qakd.LSQ())

    result = qakd.distill(
        student,
        teacher,
        digits.loader("train", labels=False, shuffle=True),
        epochs=epochs,
        val_loader=digits.loader("validation"),
        mixed_precision="bf16",
    )
    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())  # in float32, as it is deployed
    print(f"accuracy {accuracy:.4f}")
    return accuracy, {parameter.dtype for parameter in result.model.parameters()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
