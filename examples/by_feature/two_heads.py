"""Two heads: the student learns the teacher's classes by KL and its boxes by a smooth L1, without labels.

    python examples/by_feature/two_heads.py

A digit at a random place; the heads say which one it is, and where: the middle of it, in halves of the image.
"""

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import qakd_plugin as qakd
from qakd_plugin.demo.data import load


class Detector(nn.Module):
    """Logits (N, 10) under "classes", positions (N, 2) in -1 to 1 under "places"."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.classes, self.places = nn.Linear(4 * width * 36, 10), nn.Linear(4 * width * 36, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Both heads."""
        features = self.body(x)
        return {"classes": self.classes(features), "places": self.places(features)}


def placed(images: Tensor, labels: Tensor) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Batches of canvases (N, 1, 48, 48), and of (labels, places)."""
    corners = torch.randint(17, (len(images), 2), generator=torch.Generator().manual_seed(0))
    canvases = torch.zeros(len(images), 1, 48, 48)
    for canvas, image, (top, left) in zip(canvases, images, corners.tolist(), strict=True):
        canvas[:, top : top + 32, left : left + 32] = image
    parts = (column.split(64) for column in (canvases, labels, corners / 8 - 1))
    return [(x, (label, place)) for x, label, place in zip(*parts, strict=True)]


def main(epochs: int = 2, teacher_epochs: int = 6, width: int = 8) -> tuple[float, float, float]:
    """Run the example; returns the accuracy of student and teacher, and the SQNR of places in dB."""
    torch.manual_seed(0)
    digits = load()
    train, held_out = placed(*digits.train), placed(*digits.validation)
    teacher = Detector(width)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(teacher_epochs):
        for x, (label, place) in train:
            found = teacher(x)
            loss = nn.functional.cross_entropy(found["classes"], label) + nn.functional.mse_loss(found["places"], place)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    print(qakd.outputs_of(teacher, train[0][0]))
    result = qakd.distill(
        qakd.prepare(teacher, train[:4], weight_bits=4, activation_bits=4),
        teacher,
        [x for x, _ in train],
        method=qakd.SQAKD(match={"classes": qakd.KL(), "places": qakd.SmoothL1(weight=2.0)}),
        epochs=epochs,
        val_loader=held_out,
        metric=MulticlassAccuracy(10),
        metric_fn=lambda outputs, targets: (outputs["classes"], targets[0]),
    )
    own, other = (float(result.metrics[f"val_{whose}multiclass_accuracy"]) for whose in ("", "teacher_"))
    places = float(result.metrics["val_sqnr_db_places"])
    print(f"accuracy of the W4A4 student {own:.3f}, of its teacher {other:.3f}; places agree to {places:.1f} dB")
    return own, other, places


if __name__ == "__main__":
    main()
