"""The papers' settings, on the papers' data: teacher, student, export, and the published figures beside what came out.

    python examples/paper/train.py examples/paper/configs/cifar10_resnet20_sqakd.yaml --data.root ~/data --out runs/r20
    torchrun --nproc-per-node 4 examples/paper/train.py CONFIG --data.root ~/data --out runs/r20
    accelerate launch --num_processes 4 examples/paper/train.py CONFIG --data.root ~/data --out runs/r20

Any key of the configuration is a flag: ``--student.weight_bits 3 --quantizer PACT``. The same command goes on where a
killed run stood; a teacher that was being trained starts again. ``data.batch_size`` is per process.

What differs from the papers: part of the training images is held out to pick the best epoch; quantizers learn logarithms of
their ranges, so that rates of quantizers are not the papers' numbers in effect; what the papers do not say is marked in the
configuration. None of these runs has been made in full in this project: loaders, networks, configurations and a short run are
tested.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from config import Config, Teacher, read_config
from data import load
from networks import make_network
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

import qakd_plugin as qakd
from qakd_plugin._common.files import atomic_path, write_atomic
from qakd_plugin.tasks.evaluation import evaluate
from qakd_plugin.training.checkpoint import load_plain


def run(config: Config, out: Path) -> dict[str, float]:
    """Train, test and export; returns top-1 accuracies on the test set in percent: "FP" and the student's."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    splits = load(config.data, config.seed)
    torch.manual_seed(config.seed)
    teacher = make_network(config.network, splits.classes)
    weights = Path(config.teacher.weights or out / "teacher.pt")
    if config.teacher.weights is None and not weights.is_file():
        # Loaders of its own: a run that finds the teacher must draw the same images later as the one that trained it.
        train_teacher(teacher, load(config.data, config.seed).train, config.teacher, accelerator)
        if accelerator.is_main_process:
            with atomic_path(weights) as temporary:
                torch.save(teacher.state_dict(), temporary)
        accelerator.wait_for_everyone()
    load_weights(teacher, weights)
    teacher.eval().to(accelerator.device)

    torch.manual_seed(config.seed)
    bits = config.student
    calibration = [images for images, _ in islice(splits.train, bits.calibration_batches)]
    prepared = qakd.prepare(teacher, calibration, bits.toolkit, bits.weight_bits, bits.activation_bits, bits.keep)
    qakd.use_quantizers(prepared, config.quantizer)
    numbers = {entry.name: getattr(config.settings, entry.name) for entry in fields(config.settings)}
    numbers["optimizer"] = config.optimizer.make
    if config.schedule.warmup_iterations is not None:
        steps = config.schedule.epochs * len(splits.train) / (accelerator.num_processes * config.settings.accumulate)
        numbers["warmup"] = min(config.schedule.warmup_iterations, max(steps - 1, 0)) / steps
    result = qakd.distill(
        prepared,
        teacher,
        splits.train,
        method=config.method,
        epochs=config.schedule.epochs,
        val_loader=splits.held_out,
        checkpoint_dir=out / "checkpoints",
        resume=True,
        seed=config.seed,
        **numbers,
    )

    # In every process: metrics are summed over all of them.
    found = evaluate(result.model, teacher, splits.test, lambda batch: (batch[0], batch[1]), accelerator.device)
    if not accelerator.is_main_process:
        return {}
    example = next(iter(splits.held_out))[0][:16].to(accelerator.device)
    qakd.export_onnx(result.model, example, out / "student.onnx")
    accuracies = {"FP": 100 * found["val_teacher_accuracy"], label(config): 100 * found["val_accuracy"]}
    write_atomic(out / "accuracies.json", json.dumps({"here": accuracies, "published": config.published}, indent=2))
    return accuracies


def train_teacher(network: nn.Module, loader: DataLoader[Any], settings: Teacher, accelerator: Accelerator) -> None:
    """Full precision, labels, SGD with a cosine; data parallel where processes were launched together."""
    optimizer = torch.optim.SGD(
        network.parameters(), settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    model, optimizer, batches = accelerator.prepare(network, optimizer, loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(batches))
    model.train()
    for epoch in range(settings.epochs):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        accelerator.print(f"teacher: epoch {epoch + 1} of {settings.epochs}, last loss {float(loss):.4f}")


def load_weights(network: nn.Module, path: Path) -> None:
    """A state_dict, read with ``weights_only=True``.

    Raises:
        QakdError: there is none, or it belongs to another network.
    """
    try:
        network.load_state_dict(load_plain(path))
    except (qakd.CheckpointError, RuntimeError) as error:
        raise qakd.QakdError(f"teacher.weights: {path} does not fit the network: {str(error).splitlines()[0]}") from error


def label(config: Config) -> str:
    """As in ``published``: "W4A4 LSQ SQAKD"."""
    bits = f"W{config.student.weight_bits}A{config.student.activation_bits}"
    return f"{bits} {type(config.quantizer).__name__} {type(config.method).__name__}"


def table(here: dict[str, float], published: dict[str, float]) -> Table:
    """Published figures beside those of this run."""
    made = Table("top-1 %", "published", "here")
    for name in [*here, *(name for name in published if name not in here)]:
        made.add_row(name, *(f"{column[name]:.2f}" if name in column else "-" for column in (published, here)))
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of teacher, checkpoints, student.onnx, accuracies.json")
    options, flags = parser.parse_known_args(arguments)
    config = read_config(options.config, flags)
    accuracies = run(config, options.out)
    if accuracies:
        Console().print(table(accuracies, config.published))
    return accuracies


if __name__ == "__main__":
    try:
        main()
    except qakd.QakdError as error:
        sys.exit(f"error: {error}")
