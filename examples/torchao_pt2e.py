"""torchao PT2E: from its QAT tutorial to a distilled, exported student.

    python examples/torchao_pt2e.py [--epochs 5]

Source of the torchao part: "PyTorch 2 Export Quantization-Aware Training (QAT)" in torchao's documentation. Its quantizer is
XNNPACK's; the one here has what TensorRT takes: symmetric, per-channel weights, residual inputs quantized.
"""

import argparse
import copy
from pathlib import Path

import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 5, teacher_epochs: int = 10, width: int = 8, folder: Path = Path("runs/torchao_pt2e")) -> float:
    """Run the example; returns the student's accuracy on the test split."""
    torch.manual_seed(0)
    digits = load()
    loader = digits.loader("train", shuffle=True)
    float_model = train_float(DigitNet(width), loader, teacher_epochs)

    # As torchao documents it. Step 1: program capture, here with a batch of any size, and of a copy: a captured program shares
    # its tensors with the network that it was made of, and would take the teacher along as it trains.
    example_inputs = (digits.train[0][:64],)
    exported_model = torch.export.export(
        copy.deepcopy(float_model), example_inputs, dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    # Step 2: quantization-aware training.
    quantizer = qakd.configuration(float_model, "pt2e")  # in place of XNNPACKQuantizer()
    prepared_model = prepare_qat_pt2e(exported_model, quantizer)
    move_exported_model_to_eval(prepared_model)
    prepared_model(*example_inputs)  # observers see a first batch, and BatchNorm keeps its statistics

    # The two lines that are added, in place of "train omitted" and convert_pt2e: training (it also switches modes), export.
    result = qakd.distill(prepared_model, float_model, loader, epochs=epochs, val_loader=digits.loader("validation"))
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
