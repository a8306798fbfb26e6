"""A vision transformer whose linear layers are 4-bit weights times 8-bit activations, from float network to TensorRT engine.

    python examples/by_feature/int4_vit.py

Torchvision's ViT, made small, on scikit-learn's digits; LSQ learns the scales. What is not quantized computes in FP16. An
engine is built where TensorRT or TensorRT-RTX is installed; the latter needs no GPU for it. `benchmarks/engines.py` does the
same with ViT-B/16.
"""

import tempfile
from pathlib import Path

import torch
import torchvision

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import train_float


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose label a model in eval mode finds."""
    return float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 5, teacher_epochs: int = 20, width: int = 64) -> float:
    """Run the example; returns the student's accuracy on the test split."""
    torch.manual_seed(0)
    digits = load()
    network = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=width, mlp_dim=2 * width, num_classes=10
    )
    network.conv_proj = torch.nn.Conv2d(1, width, 8, 8)  # the digits are grey
    torch.nn.init.normal_(network.heads.head.weight, std=0.02)  # torchvision starts it at zero
    teacher = train_float(network, digits.loader("train", shuffle=True), teacher_epochs)

    batches = list(digits.loader("train", labels=False, batch_size=128))
    student = qakd.prepare(teacher, batches, weight_bits=4, activation_bits=8)
    qakd.use_quantizers(student, qakd.LSQ())
    loader = digits.loader("train", labels=False, shuffle=True)
    student = qakd.distill(student, teacher, loader, method=qakd.SQAKD(), epochs=epochs).model.eval()
    reached = accuracy(student, *digits.test)
    print(f"teacher {accuracy(teacher, *digits.test):.4f}, W4A8 student {reached:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        file = qakd.export_onnx(student, digits.test[0][:64], Path(folder) / "vit.onnx", float16=True)
        print(f"exact up to rounding ties in float32; FP16 agrees on {file.float16.top1:.1%} of the labels")
        try:
            manifest = qakd.build_engine(file, Path(folder) / "vit.engine").manifest
        except qakd.MissingPackageError as missing:
            print(missing)
            return reached
        print(f"engine of {manifest['bytes'] / 1e6:.1f} MB for {', '.join(manifest['capabilities'])}")
        for layer in manifest["layers"]:
            print(f"  {layer['name']}: {' x '.join(layer['inputs'])}, weights stored in {layer['stored'] or '- (none)'}")
    return reached


if __name__ == "__main__":
    main()
