"""Detection: a RetinaNet of torchvision learns what the heads of its teacher output, and mAP picks the best epoch.

    python examples/by_feature/detection.py

Scenes with one digit each. Quantized and exported is the part from images to the heads' outputs; anchors, decoding and
non-maximum suppression stay outside. The last layers of the heads stay in floating point.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import qakd_plugin as qakd
from qakd_plugin.demo.data import load

SIZE = 64


class RawHeads(nn.Module):
    """A RetinaNet, FCOS or SSD from images of its own size, normalized, to what its heads output: the part that is deployed.

    Called with targets it computes the detector's own loss as well, for ``task_loss="model"``.
    """

    def __init__(self, detector: RetinaNet | FCOS | SSD) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """Logits (N, anchors, classes) under "cls_logits", boxes (N, anchors, 4) under "bbox_regression"."""
        features = list(self.detector.backbone(images).values())
        outputs: dict[str, Tensor] = self.detector.head(features)
        if targets is not None:
            outputs["loss"] = self.loss(targets, outputs, self.anchors(images, features), features)
        return outputs

    def loss(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor], features: list[Tensor]
    ) -> Tensor:
        """What the detector learns from: a scalar."""
        more: list[object] = []
        if isinstance(self.detector, FCOS):  # its anchors on each level, one at each place
            more = [[level.shape[2] * level.shape[3] for level in features]]
        elif isinstance(self.detector, SSD):  # to which box each anchor belongs
            pairs = zip(targets, anchors, strict=True)
            more = [[self.detector.proposal_matcher(box_iou(target["boxes"], own)) for target, own in pairs]]
        return sum(self.detector.compute_loss(targets, outputs, anchors, *more).values(), torch.zeros(()))

    def anchors(self, images: Tensor, features: list[Tensor]) -> list[Tensor]:
        """(anchors, 4) for each image."""
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        found: list[Tensor] = self.detector.anchor_generator(ImageList(images, sizes), features)
        return found

    @torch.no_grad()
    def detections(self, outputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Boxes, scores and labels of each image, of any network's raw outputs."""
        image = next(self.parameters()).new_zeros(1, 3, SIZE, SIZE)
        anchors = self.anchors(image, list(self.detector.backbone(image).values())) * len(outputs["cls_logits"])
        sizes = [(SIZE, SIZE)] * len(anchors)
        if isinstance(self.detector, SSD):
            found: list[dict[str, Tensor]] = self.detector.postprocess_detections(outputs, anchors, sizes)
        else:  # these take a list of levels
            levels = {name: [output] for name, output in outputs.items()}
            found = self.detector.postprocess_detections(levels, [[own] for own in anchors], sizes)
        return found


class Backbone(nn.Module):
    """Two levels of features, as torchvision's detectors take them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_channels = 2 * width

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

        self.stem = nn.Sequential(block(3, width), block(width, 2 * width))
        self.fine, self.coarse = block(2 * width, 2 * width), block(2 * width, 2 * width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """At an eighth and a sixteenth of the image's size."""
        fine = self.fine(self.stem(images))
        return OrderedDict(fine=fine, coarse=self.coarse(fine))


def scenes(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (N, 3, 64, 64) with a digit of 32x32 somewhere, and where it is."""
    corners = torch.randint(0, SIZE - 32, (len(images), 2), generator=torch.Generator().manual_seed(seed))
    canvas, targets = torch.zeros(len(images), 3, SIZE, SIZE), []
    for index, (x, y) in enumerate(corners.tolist()):
        canvas[index, :, y : y + 32, x : x + 32] = images[index]
        box = torch.tensor([[x, y, x + 32, y + 32]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": labels[index : index + 1]})
    return canvas, targets


def main(epochs: int = 2, teacher_epochs: int = 20, width: int = 16) -> tuple[float, float]:
    """Run the example; returns both mAP."""
    torch.manual_seed(0)
    digits = load()
    images, targets = scenes(*digits.train, seed=0)
    held_out = scenes(*digits.validation, seed=1)
    batches = [(images[start : start + 32], targets[start : start + 32]) for start in range(0, len(images), 32)]

    anchors = AnchorGenerator(sizes=((24,), (36,)), aspect_ratios=((1.0,), (1.0,)))
    teacher = RawHeads(RetinaNet(Backbone(width), num_classes=10, anchor_generator=anchors))
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    for _ in range(teacher_epochs):
        for x, boxes in batches:
            teacher(x, boxes)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    student = qakd.prepare(teacher, [x for x, _ in batches[:4]], weight_bits=4, activation_bits=4)
    foreground = lambda inputs, own, other: other["cls_logits"].sigmoid().amax(-1) > 0.1  # noqa: E731
    match = {"cls_logits": qakd.BinaryKL(), "bbox_regression": qakd.SmoothL1(beta=0.1, where=foreground)}
    print(qakd.sensitivity(student, teacher, [x for x, _ in batches[:2]], match=match, blocks=["detector.head.*"]))
    result = qakd.distill(
        student,
        teacher,
        [x for x, _ in batches],  # no labels
        method=qakd.SQAKD(match=match),
        epochs=epochs,
        val_loader=[held_out],
        metric=MeanAveragePrecision(),
        metric_fn=lambda outputs, boxes: (teacher.detections(outputs), boxes),
        monitor="map",
    )
    own, other = (result.metrics[f"val_{whose}map"] for whose in ("", "teacher_"))
    print(f"mAP of the W4A4 student {own:.3f}, of its teacher {other:.3f}")
    return own, other


if __name__ == "__main__":
    main()
