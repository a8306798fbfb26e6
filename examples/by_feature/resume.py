"""A run that is killed goes on where it stood, and ends with the same bits.

    python examples/by_feature/resume.py [--epochs 4]

On the command line: ``qakd distill my_recipe:build --out run --resume``.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch

import qakd_plugin as qakd
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import DigitNet, train_float


class Killed(Exception):
    """Stands for a preempted job."""


class KillAfter:
    """A callback that ends the run in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int, losses: object) -> None:
        if step == self.step:
            raise Killed


def main(epochs: int = 4, kill_after: int = 40, width: int = 8) -> dict[str, object]:
    """Run the example; returns the weights of an undisturbed run, of the resumed one, and how many epochs each has seen."""
    torch.manual_seed(0)
    digits = load()
    teacher = train_float(DigitNet(width), digits.loader("train", shuffle=True), epochs)
    prepared = qakd.prepare(teacher, [digits.train[0][:256]], weight_bits=4, activation_bits=4)

    def run(folder: Path, **options: object) -> qakd.DistillResult:
        """The same call every time, from the same prepared model: that is all resuming asks for."""
        loader, held_out = digits.loader("train", shuffle=True), digits.loader("validation")
        student = copy.deepcopy(prepared)
        return qakd.distill(
            student, teacher, loader, epochs=epochs, val_loader=held_out, seed=0, checkpoint_dir=folder, trackers=(), **options
        )

    with tempfile.TemporaryDirectory() as folder:
        whole = run(Path(folder) / "whole")
        try:
            run(Path(folder) / "killed", checkpoint_every=10, callbacks=[KillAfter(kill_after)])
        except Killed:
            print(f"killed after step {kill_after}")
        resumed = run(Path(folder) / "killed", checkpoint_every=10, resume=True)
    weights, again = whole.model.state_dict(), resumed.model.state_dict()
    same = all(torch.equal(weights[name], again[name]) for name in weights)
    print(f"resumed: weights are {'the same bits' if same else 'different'}")
    return {"whole": weights, "resumed": again, "epochs": (whole.history[-1]["epoch"] + 1, resumed.history[-1]["epoch"] + 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
