"""Weights in 4 bits and activations in floating point, in ONNX Runtime and OpenVINO, over FP32 in the same runtime.

    python benchmarks/weight_only.py --out benchmarks/results/weight_only.json

Batch 1, one thread, all files of a network interleaved in one run. Networks have random weights, which latency does not depend
on: six blocks of linear layers 1024-4096-1024, for which reading weights is what takes long, and an encoder of MiniLM's sizes
on 128 tokens, for which arithmetic is. Prepared with ModelOpt, in blocks of 128 as its INT4_BLOCKWISE_WEIGHT_ONLY_CFG has them,
embeddings too; the first network also with a scale per output channel, in 4 and in 8 bits. "exact" computes what was trained;
"dynamic" lets the runtime round activations to 8 bits (accuracy level 4 in ONNX Runtime, dynamic quantization in OpenVINO).
Beside each ratio, of median processor times, stands the largest deviation from the student, of the range of its outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import page_tables
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from qakd_plugin import export_float, export_onnx
from qakd_plugin.bench import Candidate, Row, benchmark
from qakd_plugin.bench.loading import make_runner
from qakd_plugin.runtimes.base import DYNAMIC_INT8, Array
from qakd_plugin.runtimes.host import environment, is_busy

RESULTS = page_tables.RESULTS / "weight_only.json"
RUNTIMES = {"onnxruntime": "ORT", "openvino": "OpenVINO"}
ARITHMETIC = {"float32": "exact", DYNAMIC_INT8: "dynamic"}
BLOCKS, ROWS4, ROWS8 = "4 bits, blocks of 128", "4 bits, per channel", "8 bits, per channel"
WEIGHTS: dict[str, dict[str, Any]] = {
    BLOCKS: {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    ROWS4: {"num_bits": 4, "axis": 0},
    ROWS8: {"num_bits": 8, "axis": 0},
}
NETWORKS = {"MLP 1024-4096, 6 blocks": (BLOCKS, ROWS4, ROWS8), "MiniLM's sizes, 128 tokens": (BLOCKS,)}
BARS = {
    ("MLP 1024-4096, 6 blocks", BLOCKS): {"ORT exact": 2.2, "ORT dynamic": 4.2, "OpenVINO exact": 4.5, "OpenVINO dynamic": 8.0},
    ("MiniLM's sizes, 128 tokens", BLOCKS): {"ORT exact": 1.0, "OpenVINO exact": 1.0},
}
"""Speed over FP32 in the same runtime that is aimed at."""


def main() -> None:
    """Make the files, measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="timed calls of each file (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; the table too, if it is the default one")
    options = parser.parse_args()
    document: dict[str, Any] = {"environment": environment(), "busy": is_busy(), "cells": []}
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            document["cells"] += measure(name, Path(folder), options.calls)
    table = make_table(document)
    print(table, *verdicts(document), sep="\n")
    if options.out:
        page_tables.write_results(options.out, document, RESULTS, {"weight_only": table})


def measure(name: str, folder: Path, calls: int) -> list[dict[str, Any]]:
    """A cell for each kind of weights of one network."""
    model, inputs = _network(name)
    fp32 = export_float(model, inputs, folder / "fp32.onnx")
    candidates = [Candidate(fp32, "FP32", name)]
    expected: dict[str, Array] = {}
    for label in NETWORKS[name]:
        student = _quantized(model, inputs, WEIGHTS[label])
        expected[label] = _computed(student, inputs)
        for runtime in RUNTIMES:
            path = export_onnx(student, inputs, folder / f"{len(candidates)}.onnx", target=runtime).path
            bits = WEIGHTS[label]["num_bits"]
            candidates.append(Candidate(path, label, name, "modelopt", bits, 32, runtime=runtime))
    feed = {key: tensor.numpy() for key, tensor in inputs.items()}
    rows = benchmark(candidates, [feed], tuple(RUNTIMES), calls=calls, reference=_computed(model, inputs))
    files = {(one.method, one.runtime): one.existing for one in candidates}
    return [
        {
            "network": name,
            "weights": label,
            "fp32_ms": {RUNTIMES[runtime]: _fp32(rows, runtime).cpu_ms for runtime in RUNTIMES},
            "mib": {"FP32": fp32.stat().st_size / 2**20, "student": files[label, "onnxruntime"].stat().st_size / 2**20},
            "rows": {
                f"{RUNTIMES[row.runtime]} {ARITHMETIC[row.precision]}": {
                    "ratio": _fp32(rows, row.runtime).cpu_ms / row.cpu_ms,
                    "deviation": _deviation(files[label, row.runtime], row, feed, expected[label]),
                }
                for row in rows
                if row.method == label
            },
        }
        for label in NETWORKS[name]
    ]


def _fp32(rows: list[Row], runtime: str) -> Row:
    return next(row for row in rows if (row.method, row.runtime, row.precision) == ("FP32", runtime, "float32"))


def _deviation(path: Path, row: Row, feed: dict[str, Array], expected: Array) -> float:
    """Largest difference to the student in torch, of the range of its outputs."""
    runner = make_runner(path, row.runtime, 1, row.precision)
    (found,) = runner.run(feed).values()
    runner.close()
    return float(abs(found - expected).max() / (expected.max() - expected.min()))


def _computed(model: nn.Module, inputs: dict[str, Tensor]) -> Array:
    with torch.no_grad():
        outputs: Tensor = model(**inputs)
    return outputs.numpy()


def _quantized(model: nn.Module, inputs: dict[str, Tensor], weights: dict[str, Any]) -> nn.Module:
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights, "enable": True},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        student = mtq.quantize(copy.deepcopy(model), {"quant_cfg": entries, "algorithm": "max"}, lambda one: one(**inputs))
    return student.eval()  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    """Token ids (N, 128) -> the last layer's states (N, 128, 384), without padding."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids).last_hidden_state
        return states


def _network(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    if name.startswith("MLP"):
        layers: list[nn.Module] = []
        for _ in range(6):
            layers += [nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)]
        return nn.Sequential(*layers).eval(), {"input": torch.randn(1, 1024)}
    return _Encoder().eval(), {"input_ids": torch.randint(0, 30522, (1, 128))}


def make_table(document: dict[str, Any]) -> str:
    """Markdown: speed over FP32 in the same runtime, the deviation from what was trained, and the file's size."""
    columns = [f"{runtime} {arithmetic}" for runtime in RUNTIMES.values() for arithmetic in ARITHMETIC.values()]
    header = ["network", "weights", "FP32, ms: ORT, OpenVINO", *columns, "file, times smaller"]
    lines = []
    for cell in document["cells"]:
        rows, sizes = cell["rows"], cell["mib"]
        fp32 = ", ".join(f"{cell['fp32_ms'][runtime]:.1f}" for runtime in RUNTIMES.values())
        shown = [f"{rows[key]['ratio']:.2f} ({rows[key]['deviation']:.0e})" if key in rows else "" for key in columns]
        lines.append([cell["network"], cell["weights"], fp32, *shown, f"{sizes['FP32'] / sizes['student']:.1f}"])
    return page_tables.markdown(header, lines)


def verdicts(document: dict[str, Any]) -> list[str]:
    """One line per bar: met or MISSED."""
    lines = []
    for cell in document["cells"]:
        for label, bar in BARS.get((cell["network"], cell["weights"]), {}).items():
            ratio = cell["rows"][label]["ratio"]
            met = "met" if ratio >= bar else "MISSED"
            lines.append(f"{cell['network']}, {cell['weights']}, {label}: {ratio:.2f}x FP32, bar {bar}x: {met}")
    if document["busy"]:
        lines.append("the machine was busy when this was measured: take ratios with care")
    return lines


if __name__ == "__main__":
    main()
