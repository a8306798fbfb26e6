"""Several labels at once: sigmoids and not a softmax, in the matched loss, in the loss of labels, and in what is counted.

    python examples/by_feature/multi_label.py

Two digits side by side; the labels say which digits there are.
"""

import torch
from torch import Tensor, nn
from torchmetrics.classification import MultilabelAveragePrecision

import qakd_plugin as qakd
from qakd_plugin.demo.data import load


def pairs(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of images (N, 1, 32, 64) and multi-hot labels (N, 10)."""
    right = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.cat([images, images[right]], 3)
    y = torch.zeros(len(x), 10).scatter_(1, torch.stack([labels, labels[right]], 1), 1.0)
    return list(zip(x.split(64), y.split(64), strict=True))


def main(epochs: int = 2, teacher_epochs: int = 8, width: int = 16) -> tuple[float, float]:
    """Run the example; returns the mean average precision of student and teacher."""
    torch.manual_seed(0)
    digits = load()
    train, held_out = pairs(*digits.train), pairs(*digits.validation)
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    teacher = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 8, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(teacher_epochs):
        for x, y in train:
            nn.functional.binary_cross_entropy_with_logits(teacher(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    result = qakd.distill(
        qakd.prepare(teacher, train[:4], weight_bits=4, activation_bits=4),
        teacher,
        train,
        method=qakd.KD(match={"logits": qakd.BinaryKL()}),
        task_loss=nn.BCEWithLogitsLoss(reduction="none"),
        epochs=epochs,
        val_loader=held_out,
        metric=MultilabelAveragePrecision(10),
        metric_fn=lambda outputs, labels: (outputs, labels.long()),
    )
    own, other = (result.metrics[f"val_{whose}multilabel_average_precision"] for whose in ("", "teacher_"))
    print(f"mean average precision of the W4A4 student {own:.3f}, of its teacher {other:.3f}")
    return own, other


if __name__ == "__main__":
    main()
