"""The papers' networks: torchvision's, and the four for 32x32 images."""

from __future__ import annotations

import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from qakd_plugin.demo.net import Block
from qakd_plugin.errors import QakdError


class CifarResNet(nn.Module):
    """Residual network for (N, 3, 32, 32) images: He et al., CVPR 2016, section 4.2; shortcuts with 1x1 convolutions.

    Args:
        depth: 6n + 2 layers: 20, 32.
        classes: how many.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        widths, count = (16, 32, 64), (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for stage, width in enumerate(widths):
            for index in range(count):
                blocks.append(Block(inputs, width, stride=2 if stage and not index else 1))
                inputs = width
        self.blocks, self.pool, self.fc = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(F.relu(self.bn1(self.conv1(x))))).flatten(1))


class CifarVGG(nn.Module):
    """VGG for (N, 3, 32, 32) images: five stages of 3x3 convolutions with BatchNorm, one linear layer.

    Args:
        convolutions: in each stage: 1 for VGG-8, 2 for VGG-13.
        classes: how many.
    """

    def __init__(self, convolutions: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage, width in enumerate((64, 128, 256, 512, 512)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
        self.features, self.pool, self.fc = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


_NETWORKS = {
    "resnet20": lambda classes: CifarResNet(20, classes),
    "resnet32": lambda classes: CifarResNet(32, classes),
    "vgg8": lambda classes: CifarVGG(1, classes),
    "vgg13": lambda classes: CifarVGG(2, classes),
    "resnet18": lambda classes: torchvision.models.resnet18(num_classes=classes),
    "vgg11": lambda classes: torchvision.models.vgg11_bn(num_classes=classes),
    "mobilenet_v2": lambda classes: torchvision.models.mobilenet_v2(num_classes=classes),
    "shufflenet_v2_x0_5": lambda classes: torchvision.models.shufflenet_v2_x0_5(num_classes=classes),
    "squeezenet1_0": lambda classes: torchvision.models.squeezenet1_0(num_classes=classes),
}


def make_network(name: str, classes: int) -> nn.Module:
    """A network with random weights.

    Raises:
        QakdError: there is none of that name.
    """
    if name not in _NETWORKS:
        raise QakdError(f"network: {name!r} is unknown: use one of {sorted(_NETWORKS)}.")
    return _NETWORKS[name](classes)
