"""torch.ao in FX graph mode: from its documented QAT to a distilled, exported student.

    python examples/torch_ao_fx.py [--epochs 5]

Source of the torch.ao part: the documentation of ``torch.ao.quantization.quantize_fx.prepare_qat_fx``. It uses the default
mapping of "fbgemm", whose activations have a zero point that TensorRT refuses; here the mapping and the backend configuration
are the ones for TensorRT. Without that ``backend_config`` FX drops every symmetric activation quantizer and says nothing.
"""

import argparse
import copy
import warnings
from pathlib import Path

import torch
from torch.ao.quantization.backend_config import get_tensorrt_backend_config
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 5, teacher_epochs: int = 10, width: int = 8, folder: Path = Path("runs/torch_ao_fx")) -> float:
    """Run the example; returns the student's accuracy on the test split."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.ao is deprecated, and says so at every call
    torch.manual_seed(0)
    digits = load()
    train_loader = digits.loader("train", shuffle=True)
    teacher = train_float(DigitNet(width), train_loader, teacher_epochs)

    # As torch.ao documents it: a mapping, example inputs, prepare_qat_fx on a model in training mode.
    float_model = copy.deepcopy(teacher).train()
    qconfig_mapping = qakd.configuration(float_model, "torch_ao")  # in place of get_default_qat_qconfig_mapping("fbgemm")
    example_inputs = (digits.train[0][:64],)
    prepared_model = prepare_qat_fx(float_model, qconfig_mapping, example_inputs, backend_config=get_tensorrt_backend_config())
    prepared_model.eval()(*example_inputs)  # observers see a first batch, and BatchNorm keeps its statistics

    # The two lines that are added, in place of train_loop(prepared_model, train_loader) and convert_fx: training, export.
    result = qakd.distill(prepared_model, teacher, train_loader, epochs=epochs, val_loader=digits.loader("validation"))
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
