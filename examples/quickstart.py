"""From a float model to an integer file that provably computes what was trained.

    python examples/quickstart.py

Trains a small network on scikit-learn's handwritten digits, distills it to W4A4 without labels, exports it and measures it.
"""

from pathlib import Path

import torch
from rich.console import Console

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(folder: Path = Path("runs/quickstart"), epochs: int = 5) -> None:
    """Run the example; files go to ``folder``."""
    torch.manual_seed(0)
    digits = load()
    teacher = train_float(DigitNet(), digits.loader("train", shuffle=True), epochs)

    # The three lines a user adds to a pipeline of their own.
    images_only = digits.loader("train", labels=False, shuffle=True)
    student = qakd.prepare(teacher, list(images_only)[:8], toolkit="modelopt", weight_bits=4, activation_bits=4)
    result = qakd.distill(student, teacher, images_only, epochs=epochs, val_loader=digits.loader("validation"))

    example = digits.test[0][:64]
    exported = qakd.export_onnx(result.model, example, folder / "student.onnx", target="onnxruntime")
    print(f"{exported.parity.weight_codes} weight codes equal, {exported.parity.ties_runtime} rounding ties")
    float_file = qakd.export_float(teacher, example, folder / "fp32.onnx")
    student_file = qakd.Candidate(exported, "SQAKD", toolkit="modelopt", weight_bits=4, activation_bits=4)
    files = [qakd.Candidate(float_file, "FP32"), student_file]
    rows = qakd.benchmark(files, loader=digits.loader("test"))
    Console().print(qakd.console_table(rows))
    print(qakd.write_report(rows, folder / "report.html", title="Quickstart"))


if __name__ == "__main__":
    main()
