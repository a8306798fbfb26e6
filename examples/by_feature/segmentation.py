"""Segmentation: the student learns the teacher's pixels, and mIoU picks the best epoch.

    python examples/by_feature/segmentation.py

Digits; the class of a pixel is the digit that it belongs to, or background. The network returns a dict, as torchvision's do.
"""

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

import qakd_plugin as qakd
from qakd_plugin.demo.data import load


class Segmenter(nn.Module):
    """Logits (N, 11, H, W) under "out", and an auxiliary head under "aux"."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.aux, self.out = nn.Conv2d(width, 11, 1), nn.Conv2d(2 * width, 11, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Both heads, at the size of the image."""
        low = self.stem(x)
        heads = {"out": self.out(self.body(low)), "aux": self.aux(low)}
        return {name: nn.functional.interpolate(head, x.shape[-2:]) for name, head in heads.items()}


def main(epochs: int = 3, teacher_epochs: int = 4, width: int = 16) -> tuple[float, float]:
    """Run the example; returns both mIoU."""
    torch.manual_seed(0)
    digits = load()
    (images, labels), (held_out, held_labels) = digits.train, digits.validation
    masks = torch.where(images[:, 0] > 0.3, labels[:, None, None] + 1, 0)
    held_masks = torch.where(held_out[:, 0] > 0.3, held_labels[:, None, None] + 1, 0)
    batches = [(images[start : start + 64], masks[start : start + 64]) for start in range(0, len(images), 64)]

    teacher = Segmenter(width)
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(teacher_epochs):
        for x, mask in batches:
            nn.functional.cross_entropy(teacher(x)["out"], mask).backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    print(qakd.outputs_of(teacher, images[:8]))
    student = qakd.prepare(teacher, [x for x, _ in batches[:4]], weight_bits=4, activation_bits=4)
    result = qakd.distill(
        student,
        teacher,
        [x for x, _ in batches],  # no labels
        method=qakd.SQAKD(match={"out": qakd.KL(dim=1), "aux": qakd.KL(dim=1, weight=0.4)}),
        epochs=epochs,
        val_loader=[(held_out, held_masks)],
        metric=MulticlassJaccardIndex(11),
        metric_fn=lambda outputs, mask: (outputs["out"], mask),
    )
    own, other = (result.metrics[f"val_{whose}multiclass_jaccard_index"] for whose in ("", "teacher_"))
    print(f"mIoU of the W4A4 student {own:.3f}, of its teacher {other:.3f}")
    return own, other


if __name__ == "__main__":
    main()
