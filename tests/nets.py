"""Small networks with the structures that break exports."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.nn.quantized import FloatFunctional


class Structures(nn.Module):
    """MaxPool, residual add, depthwise, concatenation, a ReLU that is shared, pooling, linear layers; (N, 1, 32, 32) images.

    Args:
        functional: adds and concatenations as eager mode needs them.
    """

    def __init__(self, functional=False):
        super().__init__()

        def conv(inputs, outputs, size, stride=1, groups=1):
            layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs))

        self.relu = nn.ReLU()
        self.stem, self.pool = conv(1, 8, 3, 2), nn.MaxPool2d(2)
        self.first, self.second = nn.Sequential(conv(8, 8, 3), nn.ReLU()), conv(8, 8, 3)
        self.depthwise = nn.Sequential(conv(8, 8, 3, groups=8), nn.ReLU6())
        self.left, self.right = nn.Sequential(conv(8, 8, 1), nn.ReLU()), nn.Sequential(conv(8, 8, 3), nn.ReLU())
        self.last, self.mean = nn.Sequential(conv(16, 16, 3, 2), nn.ReLU()), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 10)
        self.add, self.cat = (FloatFunctional(), FloatFunctional()) if functional else (None, None)

    def forward(self, x):
        x = self.pool(self.relu(self.stem(x)))
        y = self.second(self.first(x))
        x = self.relu(y + x if self.add is None else self.add.add(y, x))
        x = self.depthwise(x)
        both = [self.left(x), self.right(x)]
        x = torch.cat(both, 1) if self.cat is None else self.cat.cat(both, 1)
        return self.head(self.hidden(self.mean(self.last(x)).flatten(1)))


class Transformer(nn.Module):
    """One block of a vision transformer over 4x4 patches; (N, 1, 32, 32) images."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(1, width, 8, 8)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


def trained(model, images, labels, steps=120, lr=5e-3):
    """A few steps on real data: BatchNorm statistics and weights as networks have them."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    for step in range(steps):
        start = 64 * step % (len(images) - 64)
        F.cross_entropy(model(images[start : start + 64]), labels[start : start + 64]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
