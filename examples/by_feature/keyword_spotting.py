"""A sequence network: Conv1d layers are quantized, the GRU after them stays in floating point, and the summary says so.

    python examples/by_feature/keyword_spotting.py

A digit read column by column stands for a spectrogram: (N, 32 bands, 32 frames). torch.ao's FX mode prepares it.
"""

import torch
from torch import Tensor, nn

import qakd_plugin as qakd
from qakd_plugin.demo.data import load


class Spotter(nn.Module):
    """Two convolutions over time, a GRU, logits of its last state."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(32, width, 3, 2, 1), nn.ReLU(), nn.Conv1d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.gru, self.head = nn.GRU(2 * width, 2 * width, batch_first=True), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of frames (N, 32, T)."""
        states, _ = self.gru(self.stem(x).transpose(1, 2))
        logits: Tensor = self.head(states[:, -1])
        return logits


def main(epochs: int = 2, teacher_epochs: int = 10, width: int = 16) -> tuple[float, float]:
    """Run the example; returns the accuracy of student and teacher."""
    torch.manual_seed(0)
    digits = load()
    frames = [list(zip(x[:, 0].split(64), y.split(64), strict=True)) for x, y in (digits.train, digits.validation)]
    train, held_out = frames
    teacher = Spotter(width)
    optimizer = torch.optim.Adam(teacher.parameters(), 5e-3)
    for _ in range(teacher_epochs):
        for x, y in train:
            nn.functional.cross_entropy(teacher(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.eval()

    student = qakd.prepare(teacher, train[:4], "torch_ao", weight_bits=4)
    print(qakd.describe(student))
    result = qakd.distill(student, teacher, train, method=qakd.SQAKD(), epochs=epochs, val_loader=held_out)
    own, other = (float(result.metrics[f"val_{whose}accuracy"]) for whose in ("", "teacher_"))
    print(f"accuracy of the student {own:.3f}, of its teacher {other:.3f}")
    return own, other


if __name__ == "__main__":
    main()
