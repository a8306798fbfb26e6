"""The teacher ranks augmentations by contextual mutual information, and the student trains with the best.

    python examples/by_feature/cmi.py [--epochs 4]

``augment=qakd.CMISelector()`` does both in one; here the ranking is looked at first.
"""

import argparse

import torch
from torch import Tensor
from torchvision.transforms import v2

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 4, teacher_epochs: int = 10, width: int = 8, max_samples: int = 512) -> tuple[list[str], str, float]:
    """Run the example; returns candidates from best to worst, the one trained with, and the student's test accuracy."""
    torch.manual_seed(0)
    digits = load()
    loader = digits.loader("train", shuffle=True)
    teacher = train_float(DigitNet(width), loader, teacher_epochs)

    # Candidates: names of the paper's, or any callable on a batch of images in [0, 1].
    def negative(images: Tensor) -> Tensor:
        return 1 - images

    candidates = {"none": None, "shift": v2.RandomAffine(degrees=0, translate=(0.1, 0.1)), "negative": negative}
    scores = qakd.rank_augmentations(teacher, loader, candidates, max_samples=max_samples, seed=0)
    print(scores.explanation)

    student = qakd.prepare(teacher, [digits.train[0][:256]], weight_bits=4, activation_bits=4)
    selector = qakd.CMISelector(candidates, max_samples=max_samples)
    result = qakd.distill(
        student, teacher, loader, epochs=epochs, val_loader=digits.loader("validation"), augment=selector, seed=0
    )
    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((result.model(images).argmax(1) == labels).float().mean())
    print(f"accuracy {accuracy:.4f}")
    return [score.name for score in scores], result.history[1]["augmentation"], accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
