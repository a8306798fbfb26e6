"""ONNX Runtime INT8 over FP32 on torchvision networks, measured side by side in one interleaved run.

    python benchmarks/deployment.py --out benchmarks/results/deployment.json

Random weights: latency does not depend on them. Prints, per network and bit width, median latencies, the ratio, and how many
layers run on integer kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import readme_tables
import torch
import torchvision

from qakd_plugin import export_onnx, prepare
from qakd_plugin.bench import Candidate, benchmark
from qakd_plugin.bench.environment import environment, is_busy
from qakd_plugin.deploy.to_onnx import export_float
from qakd_plugin.report import console_table

RESULTS = readme_tables.RESULTS / "deployment.json"
NETWORKS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0")
BARS = {"resnet18": 2.6, "mobilenet_v2": 1.7}


def main() -> None:
    """Export, measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="may be repeated; all by default")
    parser.add_argument("--toolkit", default="modelopt", choices=("modelopt", "pt2e", "torch_ao"))
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    busy = is_busy()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.network or NETWORKS:
            candidates = _export(Path(folder), name, options.toolkit)
            rows += benchmark(candidates, calls=options.calls)
    from rich.console import Console

    Console(width=150).print(console_table(rows, title=f"224x224, batch 1, one thread, {options.toolkit}"))
    for row in rows:
        if row.weight_bits == 8 and row.model in BARS:
            verdict = "reached" if row.speedup and row.speedup >= BARS[row.model] else "MISSED"
            print(f"{row.model}: INT8 {row.speedup:.2f}x FP32, bar {BARS[row.model]}x: {verdict}")
    if busy:
        print("The machine was busy when this began: take the ratios with care.")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": environment(), "rows": [{**row.as_dict(), "model": row.model} for row in rows]}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(options.out)
        if options.out.resolve() == RESULTS:
            readme_tables.write_table("deployment", make_table(document))


def make_table(document: dict[str, Any]) -> str:
    """Markdown: median latencies of each network, and what they rest on."""
    header = ["network, 224x224", "FP32 p50 ms", "W8A8 p50 ms", "W4A4 p50 ms", "W8A8 over FP32", "integer layers"]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in document["rows"]:
        found.setdefault(row["model"], {})[row["weight_bits"]] = row
    rows = [
        [name, *(f"{bits[width]['p50_ms']:.2f}" for width in (32, 8, 4)), f"{bits[8]['speedup']:.2f}x"]
        + [f"{bits[8]['integer_layers']} of {bits[8]['total_layers']}"]
        for name, bits in found.items()
    ]
    return readme_tables.markdown(header, rows)


def _export(folder: Path, name: str, toolkit: str) -> list[Candidate]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().train()
    images = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        for _ in range(4):
            model(images)  # BatchNorm statistics that fit the weights
    model.eval()
    candidates = [Candidate(export_float(model, images, folder / f"{name}.onnx"), "FP32", name)]
    for bits in (8, 4):
        student = prepare(model, [images], toolkit, weight_bits=bits, activation_bits=bits)
        file = export_onnx(student, images, folder / f"{name}.w{bits}.onnx", target="onnxruntime")
        candidates.append(Candidate(file, "PTQ", name, toolkit, bits, bits))
    return candidates


if __name__ == "__main__":
    main()
