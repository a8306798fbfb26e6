"""A small detector without anchors, after FCOS (Tian et al., arXiv 1904.01355): its network, its loss, and its detections.

The network outputs what its heads compute, for each place of a grid: the part that is quantized and exported. Distances are in
units of the grid, STRIDE pixels. Decoding and non-maximum suppression stay outside of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import canvases
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_area, generalized_box_iou_loss, sigmoid_focal_loss

from qakd_plugin.demo.net import Block

CLASSES, STRIDE = 10, 4
HEADS = ("classes", "sides", "centres")
"""The last layers, and the network's outputs."""

RADIUS = 1.5
"""Places so near to a box's middle, in units of the grid, learn it."""

LOWEST_SCORE, MOST, SAME = 0.05, 50, 0.6
"""What a detection has at least, how many are kept of an image, and the overlap of two that are one."""


class Detector(nn.Module):
    """A residual backbone, a level at a quarter of the image's size that knows of an eighth, and a tower for three heads.

    Args:
        width: channels of the first stage.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        middle = 2 * width
        self.stem = _conv(1, width, 3, 2)
        self.fine = Block(width, middle, 2)
        self.coarse = nn.Sequential(Block(middle, 2 * middle, 2), Block(2 * middle, 2 * middle))
        self.lateral = _conv(2 * middle, middle, 1)
        self.tower = nn.Sequential(_conv(middle, middle, 3), _conv(middle, middle, 3))
        self.classes = nn.Conv2d(middle, CLASSES, 1)
        self.sides = nn.Conv2d(middle, 4, 1)
        self.centres = nn.Conv2d(middle, 1, 1)
        nn.init.constant_(self.classes.bias, -4.0)  # type: ignore[arg-type]  # most places are background
        nn.init.constant_(self.sides.bias, 2.5)  # type: ignore[arg-type]  # about the middle of the sizes
        nn.init.constant_(self.centres.bias, -1.0)  # type: ignore[arg-type]  # and off the middle of a box

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Of images (N, 1, H, W): logits (N, places, CLASSES), distances (N, places, 4) and centredness (N, places)."""
        fine = self.fine(self.stem(images))
        coarse = F.interpolate(self.lateral(self.coarse(fine)), scale_factor=2.0, mode="nearest")
        found = self.tower(fine + coarse)
        return {
            "classes": self.classes(found).flatten(2).transpose(1, 2),
            "sides": self.sides(found).flatten(2).transpose(1, 2),
            "centres": self.centres(found).flatten(1),
        }


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def places(side: int = canvases.SIDE) -> Tensor:
    """Middles (places, 2) of the grid's cells, x and y in pixels, row by row."""
    steps = (torch.arange(side // STRIDE) + 0.5) * STRIDE
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], 1)


def boxes_of(sides: Tensor) -> Tensor:
    """Left, top, right and bottom in pixels, of distances (N, places, 4) to them; none of them is negative."""
    middles = places().to(sides)
    distances = STRIDE * sides.clamp(min=0)
    return torch.cat([middles - distances[..., :2], middles + distances[..., 2:]], -1)


def assigned(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each place learns.

    Args:
        boxes: (N, M, 4).
        labels: (N, M); canvases.NOTHING where there is no box.

    Returns:
        Label (N, places) or NOTHING, box (N, places, 4), and how near the place is to its middle, 0 to 1, (N, places): the
        smallest of the boxes that a place is in, and in whose middle it is.
    """
    middles = places().to(boxes)[None, :, None]  # (1, places, 1, 2)
    corners = boxes[:, None]  # (N, 1, M, 4)
    distances = torch.cat([middles - corners[..., :2], corners[..., 2:] - middles], -1)
    off = (middles - (corners[..., :2] + corners[..., 2:]) / 2).abs().amax(-1)
    learned = (distances.amin(-1) > 0) & (off < RADIUS * STRIDE) & (labels != canvases.NOTHING)[:, None]
    area = box_area(boxes.flatten(0, 1)).view_as(labels)[:, None].expand_as(learned).masked_fill(~learned, torch.inf)
    smallest, which = area.min(-1)
    found = smallest.isfinite()
    label = labels.gather(1, which).masked_fill(~found, canvases.NOTHING)
    box = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    own = distances.gather(2, which[..., None, None].expand(-1, -1, 1, 4))[:, :, 0].clamp(min=0)
    pairs = own.view(*own.shape[:2], 2, 2)  # (left, top), (right, bottom)
    ratios = pairs.amin(2) / pairs.amax(2).clamp(min=1e-6)
    return label, box, ratios.prod(-1).sqrt().masked_fill(~found, 0)


def loss(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """FCOS's: focal loss of classes, GIoU of boxes, and cross-entropy of centredness, over the places with a box; a scalar.

    Args:
        outputs: of the network.
        targets: "boxes" and "labels" of canvases.
    """
    label, box, centredness = assigned(targets["boxes"], targets["labels"])
    found = label != canvases.NOTHING
    count = found.sum().clamp(min=1)
    classes = F.one_hot(label.clamp(min=0), CLASSES) * found[..., None]
    of_classes = sigmoid_focal_loss(outputs["classes"], classes.to(outputs["classes"]), reduction="sum")
    of_boxes = generalized_box_iou_loss(boxes_of(outputs["sides"])[found], box[found], reduction="sum")
    of_centres = F.binary_cross_entropy_with_logits(outputs["centres"][found], centredness[found], reduction="sum")
    return (of_classes + of_boxes + of_centres) / count


@torch.no_grad()
def detections(outputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Boxes (M, 4), scores and labels (M,) of each image, as metrics take them, of any network's or runtime's outputs."""
    scores = (outputs["classes"].sigmoid() * outputs["centres"].sigmoid()[..., None]).sqrt()
    found = []
    for own, boxes in zip(scores, boxes_of(outputs["sides"]).clamp(0, canvases.SIDE), strict=True):
        place, label = (own > LOWEST_SCORE).nonzero(as_tuple=True)
        kept = batched_nms(boxes[place], own[place, label], label, SAME)[:MOST]
        found.append({"boxes": boxes[place[kept]], "scores": own[place, label][kept], "labels": label[kept]})
    return found
