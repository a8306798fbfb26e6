"""How many images calibration needs: agreement of the prepared model with its teacher on held-out images.

    python benchmarks/calibration_images.py

Two networks learn scikit-learn's digits in full precision and are prepared from different numbers of training images, each
number from several draws. Nothing is trained after that. What is finished of a network is written to the results and not run
again unless --fresh.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import page_tables
import torch
from default_rate import CPU, NETS, begun, held_out_of
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import qakd_plugin as qakd
from qakd_plugin._common.files import write_atomic
from qakd_plugin.demo.data import load
from qakd_plugin.demo.net import train_float

RESULTS = page_tables.RESULTS / "calibration_images.json"
PAGE = page_tables.ROOT / "docs" / "choosing.md"
COUNTS, DRAWS, BATCH, TEACHER_EPOCHS = (8, 32, 128, 512), 3, 32, 8
NETWORKS = ("DigitNet", "mobilenet_v2")
BITS = (8, 4)


def _teacher(name: str, images: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(0)
    data: Any = TensorDataset(images, labels)
    loader: DataLoader[Any] = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    teacher = train_float(NETS[name](), loader, TEACHER_EPOCHS, lr=5e-3)
    update_bn([(part,) for part in images.split(BATCH)], teacher)
    return teacher


def run(name: str, done: list[dict[str, Any]], wanted: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The cells (bits, images, draw) of one network that are not among those that are done."""
    cells = [cell for cell in wanted if not any((row["bits"], row["images"], row["draw"]) == cell for row in done)]
    if not cells:
        return []
    colours = 1 if name == "DigitNet" else 3
    digits = load(seed=0)
    images = digits.train[0].repeat(1, colours, 1, 1)
    others, truth = held_out_of(digits)
    held_out = list(zip(others.repeat(1, colours, 1, 1).split(BATCH), truth.split(BATCH), strict=True))
    teacher = _teacher(name, images, digits.train[1])
    rows = []
    for bits, count, draw in cells:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(draw))[:count]
        student = qakd.prepare(teacher, list(images[chosen].split(BATCH)), weight_bits=bits, activation_bits=bits)
        found = qakd.evaluate(student, teacher, held_out, qakd.default_batch, CPU)
        rows.append({"network": name, "bits": bits, "images": count, "draw": draw, "agreement": found["val_agreement"]})
        print(rows[-1], flush=True)
    return rows


def make_table(rows: list[dict[str, Any]]) -> str:
    """Lowest and highest agreement over the draws, by number of images."""
    lines = []
    for name in NETWORKS:
        for bits in BITS:
            line = [name, f"W{bits}A{bits}"]
            for count in COUNTS:
                mine = [r["agreement"] for r in rows if (r["network"], r["bits"], r["images"]) == (name, bits, count)]
                line.append(f"{100 * min(mine):.1f} to {100 * max(mine):.1f}")
            lines.append(line)
    return page_tables.markdown(["network", "bits", *(f"{count} images" for count in COUNTS)], lines)


def main() -> None:
    """Run what is missing, and write the table."""
    options, rows = begun(argparse.ArgumentParser(description=__doc__.splitlines()[0]), RESULTS)
    for name in NETWORKS:
        wanted = [(bits, count, draw) for bits in BITS for count in COUNTS for draw in range(DRAWS)]
        rows += run(name, [row for row in rows if row["network"] == name], wanted)
        write_atomic(options.out, json.dumps(rows, indent=1) + "\n")
    if options.out == RESULTS:
        page_tables.write_table("calibration_images", make_table(rows), PAGE)


if __name__ == "__main__":
    main()
