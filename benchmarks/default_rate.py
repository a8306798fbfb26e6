"""Whether training with all defaults ends below its start: ten networks at W8A8.

    python benchmarks/default_rate.py

Each network learns scikit-learn's digits in full precision, is prepared with 8 bits, and is trained by ``qakd.distill`` with
no option at all. Printed for each: agreement with its teacher on held-out images, which ``distill`` does not see, at the start,
after the last epoch and of the weights that are returned; whether the difference is more than chance; and the rate. ``--lr``
sets other rates beside it, ``--bits`` other widths. Every finished cell is written to the results at once and not run again
unless --fresh.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import page_tables
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import qakd_plugin as qakd
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench.intervals import mcnemar_p_value
from qakd_plugin.demo.data import Digits, load
from qakd_plugin.demo.net import DigitNet, train_float
from qakd_plugin.toolkits import adapter_for
from qakd_plugin.training.optimizers import with_rate

RESULTS = page_tables.RESULTS / "default_rate.json"
PAGE = page_tables.ROOT / "docs" / "choosing.md"
IMAGES, TEACHER_EPOCHS, BATCH = 320, 16, 32
EPOCHS: int = inspect.signature(qakd.distill).parameters["epochs"].default
CPU = torch.device("cpu")
COUNTED = ("agreement", "accuracy")
DISTANCES = ("distance_training", "distance_held_out")


def _torchvision(name: str, **options: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, num_classes=10, **options)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "DigitNet": partial(DigitNet, 8),
    "resnet18": partial(_torchvision, "resnet18"),
    "mobilenet_v2": partial(_torchvision, "mobilenet_v2", width_mult=0.35),
    "mobilenet_v3_small": partial(_torchvision, "mobilenet_v3_small", width_mult=0.5),
    "shufflenet_v2_x0_5": partial(_torchvision, "shufflenet_v2_x0_5"),
    "timm mobilenetv4_conv_small": partial(_timm, "mobilenetv4_conv_small"),
    "timm resnet10t": partial(_timm, "resnet10t"),
    "timm regnetx_002": partial(_timm, "regnetx_002"),
    "timm efficientnet_lite0": partial(_timm, "efficientnet_lite0"),
    "timm vit_tiny_patch16_224": partial(_timm, "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4),
}
"""All at 32x32: depthwise and dense, with and without BatchNorm, one transformer."""


def held_out_of(digits: Digits) -> tuple[Tensor, Tensor]:
    """All images that the demo does not train with, and their labels."""
    return torch.cat([digits.validation[0], digits.test[0]]), torch.cat([digits.validation[1], digits.test[1]])


def _data(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    digits = load(seed=0)
    colours = 1 if name == "DigitNet" else 3
    (images, labels), (others, truth) = digits.train, held_out_of(digits)
    return (images[:IMAGES].repeat(1, colours, 1, 1), labels[:IMAGES]), (others.repeat(1, colours, 1, 1), truth)


def _loader(images: Tensor, *labels: Tensor, shuffle: bool = False) -> DataLoader[Any]:
    data: Any = TensorDataset(images, *labels)
    return DataLoader(data, BATCH, shuffle=shuffle, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Count:
    """What a student is worth, as it would be deployed.

    Attributes:
        agreement: for each image held out, whether it names the teacher's class.
        accuracy: and whether the label's.
        distance_training: mean KL divergence of its predictions from its teacher's, on the images it is trained with.
        distance_held_out: likewise, on the others.
    """

    agreement: Tensor
    accuracy: Tensor
    distance_training: float
    distance_held_out: float


def _count(student: nn.Module, teacher: nn.Module, train: Tensor, held_out: tuple[Tensor, Tensor]) -> Count:
    student = copy.deepcopy(student)
    adapter = adapter_for(student)
    adapter.set_mode(student, False)
    adapter.freeze_ranges(student, True)
    images, labels = held_out
    (_, seen), (guesses, others) = (_compared(student, teacher.eval(), part) for part in (train, images))
    mine, theirs = guesses
    return Count(mine == theirs, mine == labels, seen, others)


def _compared(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[tuple[Tensor, Tensor], float]:
    """Classes that both name, and the divergence."""
    with torch.no_grad():
        pairs = [[network(batch).log_softmax(1) for network in (student, teacher)] for batch in images.split(BATCH)]
    mine, theirs = (torch.cat(part) for part in zip(*pairs, strict=True))
    return (mine.argmax(1), theirs.argmax(1)), float((theirs.exp() * (theirs - mine)).sum(1).mean())


class _Last:
    """A callback that counts the student as the last epoch left it."""

    def __init__(self, student: nn.Module, count: Callable[[nn.Module], Count]) -> None:
        self._student, self._count = student, count
        self.count: Count | None = None

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        if row["epoch"] + 1 == EPOCHS:
            self.count = self._count(self._student)


def run(name: str, bits: int, lr: float | None) -> dict[str, Any]:
    """One cell."""
    began = time.perf_counter()
    torch.manual_seed(0)
    train, held_out = _data(name)
    teacher = train_float(NETS[name](), _loader(*train, shuffle=True), TEACHER_EPOCHS, lr=5e-3)
    update_bn(_loader(train[0]), teacher)  # statistics of its last weights: a short training leaves older ones
    student = qakd.prepare(teacher, list(train[0].split(BATCH)), weight_bits=bits, activation_bits=bits)
    rate = with_rate(qakd.Settings(lr=lr), adapter_for(student), student).lr
    count = partial(_count, teacher=teacher, train=train[0], held_out=held_out)
    counts = {"start": count(student)}
    last = _Last(student, count)
    given = {} if lr is None else {"lr": lr}
    result = qakd.distill(student, teacher, _loader(train[0], shuffle=True), seed=0, trackers=(), callbacks=[last], **given)
    assert last.count is not None
    counts |= {"last": last.count, "kept": count(result.model)}
    (_, named), _ = _compared(student, teacher, held_out[0])
    return {
        "network": name,
        "bits": bits,
        "lr": rate,
        "default": lr is None,
        "teacher_accuracy": float((named == held_out[1]).double().mean()),
        "kept_epoch": result.metrics["epoch"],
        **{f"{when}_{what}": float(getattr(found, what).double().mean()) for when, found in counts.items() for what in COUNTED},
        **{f"{when}_{what}": getattr(found, what) for when, found in counts.items() for what in DISTANCES},
        **{f"{what}_p": _p_value(getattr(counts["start"], what), getattr(counts["kept"], what)) for what in COUNTED},
        "seconds": time.perf_counter() - began,
    }


def _p_value(before: Tensor, after: Tensor) -> float:
    """McNemar's exact test of the start and what is returned, on the same images."""
    return mcnemar_p_value(int((after & ~before).sum()), int((before & ~after).sum()))


def make_table(rows: list[dict[str, Any]]) -> str:
    """What a call with all defaults ends with, network by network."""
    return page_tables.markdown(
        [
            "network, W8A8",
            "teacher's accuracy, %",
            *(f"{what}, %: start, last epoch, returned" for what in COUNTED),
            "p of start and returned",
            "distance of the last epoch over the start's: training images, held-out",
        ],
        [
            [
                row["network"],
                f"{100 * row['teacher_accuracy']:.1f}",
                *(", ".join(f"{100 * row[f'{when}_{what}']:.1f}" for when in ("start", "last", "kept")) for what in COUNTED),
                ", ".join(f"{row[f'{what}_p']:.2g}" for what in COUNTED),
                ", ".join(f"{row[f'last_{what}'] / row[f'start_{what}']:.2f}" for what in DISTANCES),
            ]
            for row in rows
            if row["default"] and row["bits"] == 8
        ],
    )


def begun(parser: argparse.ArgumentParser, results: Path) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """What a script was told, also by --out and --fresh, and the rows that earlier runs of it left."""
    parser.add_argument("--out", type=Path, default=results, help="results (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="run all again")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    return options, json.loads(options.out.read_text()) if options.out.is_file() and not options.fresh else []


def main() -> None:
    """Run what is missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS, help="which (all)")
    parser.add_argument("--bits", nargs="+", type=int, default=[8], help="of weights and activations (8)")
    parser.add_argument("--lr", nargs="+", type=float, default=[], help="rates beside the default")
    options, rows = begun(parser, RESULTS)
    for bits in options.bits:
        for name in options.nets:
            for lr in (None, *options.lr):
                known = {(row["network"], row["bits"], None if row["default"] else row["lr"]) for row in rows}
                if (name, bits, lr) not in known:
                    rows.append(run(name, bits, lr))
                    write_atomic(options.out, json.dumps(rows, indent=1) + "\n")
                _print(next(row for row in rows if _is(row, name, bits, lr)))
    eight = [row for row in rows if row["default"] and row["bits"] == 8]
    lower = {
        what: [f"{row['network']} (p = {row[f'{what}_p']:.2g})" for row in eight if row[f"kept_{what}"] < row[f"start_{what}"]]
        for what in COUNTED
    }
    farther = [row["network"] for row in eight if row["kept_distance_held_out"] > row["start_distance_held_out"]]
    if options.out == RESULTS:
        page_tables.write_table("default_rate", make_table(rows), PAGE)
    print(
        f"{len(eight)} networks at 8 bits with all defaults. Returned below their start, by McNemar's test on the same images:"
    )
    print(*(f"  in {what}: {', '.join(names) or 'none'}" for what, names in lower.items()), sep="\n")
    print(f"  farther from the teacher's predictions: {', '.join(farther) or 'none'}")


def _is(row: dict[str, Any], name: str, bits: int, lr: float | None) -> bool:
    return row["network"] == name and row["bits"] == bits and (row["default"] if lr is None else row["lr"] == lr)


def _print(row: dict[str, Any]) -> None:
    agreement, accuracy = (
        " -> ".join(f"{row[f'{when}_{what}']:.2%}" for when in ("start", "last", "kept")) for what in ("agreement", "accuracy")
    )
    print(
        f"{row['network']:28} {row['bits']} bits  lr {row['lr']:.3g}{' (default)' if row['default'] else ''}  start, last, "
        f"returned: agreement {agreement}  accuracy {accuracy} (teacher {row['teacher_accuracy']:.2%})  {row['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
