"""Distillation by several processes: the same script, launched by torchrun.

    torchrun --nproc-per-node 2 examples/by_feature/two_processes.py [--epochs 3]
    accelerate launch --num_processes 2 examples/by_feature/two_processes.py

Each process prepares the same student and passes the whole loader; ``distill`` divides the batches. On CPUs set
``OMP_NUM_THREADS`` to the cores of one process.
"""

import argparse
import hashlib
import os
import sys

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


def main(epochs: int = 3, teacher_epochs: int = 10, width: int = 8) -> tuple[float, str]:
    """Run the example; returns the student's accuracy on the test split, and a digest of all its tensors."""
    torch.manual_seed(0)
    digits = load()
    # All processes train the same teacher here. With a large one, load its weights instead.
    teacher = train_float(DigitNet(width), digits.loader("train", shuffle=True), teacher_epochs)
    student = qakd.prepare(teacher, [digits.train[0][:256]], weight_bits=4, activation_bits=4)

    loader = digits.loader("train", labels=False, batch_size=32, shuffle=True)
    result = qakd.distill(student, teacher, loader, epochs=epochs, val_loader=digits.loader("validation"), seed=0)

    images, labels = digits.test
    with torch.no_grad():
        accuracy = float((result.model.cpu()(images).argmax(1) == labels).float().mean())
    digest = hashlib.sha256()
    for tensor in result.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    line = f"process {os.environ.get('RANK', '0')}: accuracy {accuracy:.4f}, weights {digest.hexdigest()[:16]}\n"
    sys.stdout.write(line)  # at once, so that lines of processes do not mix
    return accuracy, digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=8)
    main(**vars(parser.parse_args()))
