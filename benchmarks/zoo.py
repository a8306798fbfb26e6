"""Which networks go all the way: prepared, exported exactly, computed in integers, built into an engine.

    python benchmarks/zoo.py

For every network and bit width: prepare with ModelOpt, export for TensorRT and for ONNX Runtime (both pass the parity gate, or
say why not), count the layers that ONNX Runtime computes in integers, and build a TensorRT-RTX engine, which needs no GPU.
Weights are random: exactness does not depend on training. Every finished cell is written to benchmarks/results/zoo.json at once
and not run again unless --fresh; the table in docs/measured.md is written from that file.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import page_tables
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qakd_plugin import build_engine, describe, export_onnx, prepare
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.engine.precheck import inspect_onnx
from qakd_plugin.errors import QakdError
from qakd_plugin.runtimes.host import environment

RESULTS = page_tables.RESULTS / "zoo.json"
BITS = (8, 4)


@dataclass(frozen=True)
class Net:
    """A network, the library it is from, and the input that it is run with."""

    name: str
    library: str = "torchvision"
    size: int = 64
    samples: int = 8

    def make(self) -> nn.Module:
        if self.library == "timm":
            import timm

            model: nn.Module = timm.create_model(self.name, num_classes=10)
            return model
        return torchvision.models.get_model(self.name, num_classes=10)


NETS = (
    Net("resnet18"),
    Net("mobilenet_v2"),
    Net("mobilenet_v3_small"),
    Net("shufflenet_v2_x1_0"),
    Net("efficientnet_b0"),
    Net("vit_b_16", size=224, samples=2),
    Net("mobilenetv4_conv_small", "timm"),
    Net("convnext_atto", "timm"),
    Net("deit_tiny_patch16_224", "timm", size=224, samples=4),
)


def main() -> None:
    """Run what is not done yet, write the results and the table in docs/measured.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", action="append", choices=[net.name for net in NETS], help="may be repeated; all by default"
    )
    parser.add_argument("--bits", action="append", type=int, choices=BITS, help="may be repeated; both by default")
    parser.add_argument("--fresh", action="store_true", help="run cells again that are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the cells")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the table in the docs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    cells: dict[str, dict[str, Any]] = json.loads(options.out.read_text())["cells"] if options.out.is_file() else {}
    for net in NETS:
        for bits in BITS:
            key = f"{net.library}/{net.name} W{bits}A{bits}"
            wanted = net.name in (options.network or [net.name]) and bits in (options.bits or BITS)
            if options.table_only or not wanted or (key in cells and not options.fresh):
                continue
            print(f"{key} ...", end=" ", flush=True)
            cells[key] = run_cell(net, bits)
            ordered = {name: cells[name] for name in _all_keys() if name in cells}
            document = {"environment": environment(), "cells": ordered}
            write_atomic(options.out, json.dumps(document, indent=1) + "\n")
            print(_line(cells[key]), flush=True)
    table = make_table(cells)
    print(table)
    if options.out == RESULTS:
        page_tables.write_table("zoo", table)


def random_weights(net: Net) -> tuple[nn.Module, Tensor]:
    """The network with random weights, BatchNorm statistics that fit them, and images.

    What networks start with at zero, or next to it, is drawn too: heads, biases, layer scales. A residual branch times 1e-6, or
    a head of zeros, would hide any error.
    """
    torch.manual_seed(0)
    model, images = net.make().train(), torch.randn(net.samples, 3, net.size, net.size)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) < 1e-4:
                parameter.normal_(std=0.1)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for norm in norms:  # negative gammas flip the sign of folded codes
            norm.weight.uniform_(-1.5, 1.5)
        for _ in range(8 if norms else 0):
            model(images)
    return model.eval(), images


def run_cell(net: Net, bits: int) -> dict[str, Any]:
    """One network at one bit width, all steps; a step that fails leaves its reason."""
    start = time.perf_counter()
    model, images = random_weights(net)
    cell: dict[str, Any] = {
        "network": net.name,
        "library": net.library,
        "input": net.size,
        "samples": net.samples,
        "bits": bits,
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cell["parameters"] = parameters
    student, cell["problem"] = _attempt(
        lambda: prepare(model, list(images.split(net.samples // 2)), "modelopt", weight_bits=bits, activation_bits=bits)
    )
    if student is not None:
        description = describe(student)
        cell["quantizers"] = {"weight": description.weight_quantizers, "activation": description.activation_quantizers}
        with tempfile.TemporaryDirectory() as folder:
            cell["tensorrt"] = _tensorrt(student, images, Path(folder))
            cell["onnxruntime"] = _onnxruntime(student, images, Path(folder))
    cell["seconds"] = round(time.perf_counter() - start, 1)
    return cell


def _tensorrt(student: nn.Module, images: Tensor, folder: Path) -> dict[str, Any]:
    file, problem = _attempt(lambda: export_onnx(student, images, folder / "canonical.onnx", target="tensorrt"))
    if file is None:
        return {"exact": False, "problem": problem}
    contents = inspect_onnx(file)
    found: dict[str, Any] = {"exact": True, "parity": file.parity.as_dict(), "bytes": len(contents.data)}
    engine, found["problem"] = _attempt(lambda: build_engine(file, folder / "net.engine", runtime="tensorrt_rtx"))
    found["engine"] = engine is not None
    if engine is not None:
        manifest = engine.manifest
        for kind in ("capabilities", "convolutions", "matmuls", "bytes"):
            found[f"engine_{kind}"] = manifest[kind]
        stored = {layer.name for layer in contents.layers}
        floating = [layer for layer in manifest["layers"] if not all(kind.startswith("int8") for kind in layer["inputs"])]
        with_weights = [layer["name"] for layer in floating if stored & {layer["name"], *layer["onnx_layers"]}]
        found["engine_float_weights"] = with_weights
        found["engine_float_products"] = len(floating) - len(with_weights)
    return found


def _onnxruntime(student: nn.Module, images: Tensor, folder: Path) -> dict[str, Any]:
    file, problem = _attempt(lambda: export_onnx(student, images, folder / "ort.onnx", target="onnxruntime"))
    if file is None:
        return {"exact": False, "problem": problem}
    counted = census(file)
    return {
        "exact": True,
        "parity": file.parity.as_dict(),
        "integer": counted.integer,
        "total": counted.total,
        "float_layers": list(counted.float_layers),
        "problem": None,
    }


def _attempt(step: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of a step, or the reason why there is none."""
    try:
        return step(), None
    except QakdError as error:
        return None, " ".join(str(error).split())[:400]


def _line(cell: dict[str, Any]) -> str:
    if cell["problem"]:
        return f"not prepared: {cell['problem']}"
    trt, ort = cell["tensorrt"], cell["onnxruntime"]
    fused = ort["parity"]["fused"] if ort["exact"] else None
    return ", ".join([
        f"TensorRT form {'exact' if trt['exact'] else 'FAILED: ' + trt['problem']}",
        f"engine {_engine(cell)}" if trt.get("engine") else f"no engine: {trt['problem']}",
        f"ONNX Runtime form exact, {ort['integer']} of {ort['total']} in integers, fused {fused['sqnr_db']:.0f} dB"
        if fused else f"ONNX Runtime form FAILED: {ort['problem']}",
        f"{cell['seconds']:.0f} s",
    ])  # fmt: skip


def make_table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per network, W8A8 and W4A4 in one cell where they differ."""
    header = ["network", "input", "exact, W8A8 / W4A4", "integer layers, ONNX Runtime", "with fusions, dB"]
    rows = []
    for net in NETS:
        found = [cells[key] for bits in BITS if (key := f"{net.library}/{net.name} W{bits}A{bits}") in cells]
        if len(found) != len(BITS):
            continue
        columns = [
            net.name if net.library == "torchvision" else f"{net.name} ({net.library})",
            f"{net.size}",
            " / ".join(map(_exact, found)),
            _joined(map(_integer, found)),
            " / ".join(map(_fused, found)),
            _joined(map(_engine, found)),
            _joined(map(_floating, found)),
        ]
        rows.append(columns)
    return page_tables.markdown([*header, "integer layers, TensorRT-RTX", "in float"], rows)


def _exact(cell: dict[str, Any]) -> str:
    return "yes" if not cell["problem"] and cell["tensorrt"]["exact"] and cell["onnxruntime"]["exact"] else "no"


def _integer(cell: dict[str, Any]) -> str:
    found = cell.get("onnxruntime", {})
    return f"{found['integer']} of {found['total']}" if found.get("exact") else "none"


def _fused(cell: dict[str, Any]) -> str:
    found = cell.get("onnxruntime", {})
    return f"{found['parity']['fused']['sqnr_db']:.0f}" if found.get("exact") else "none"


def _engine(cell: dict[str, Any]) -> str:
    found = cell.get("tensorrt", {})
    if not found.get("engine"):
        return "none"
    kinds = [found["engine_convolutions"], found["engine_matmuls"]]
    if "unknown" in kinds:
        return "built, plan not readable"
    return f"{sum(kind['int8'] for kind in kinds)} of {sum(kind['total'] for kind in kinds)}"


def _floating(cell: dict[str, Any]) -> str:
    """What stays in floating point, and why: for the last column."""
    problems = [cell["problem"], *(cell.get(target, {}).get("problem") for target in ("tensorrt", "onnxruntime"))]
    reasons = [problem for problem in problems if problem]
    found = cell.get("tensorrt", {})
    if found.get("engine_float_products"):
        reasons.append(f"{found['engine_float_products']} products of two activations (attention): they have no weights")
    if layers := found.get("engine_float_weights"):
        reasons.append(f"{len(layers)} layers with weights, e.g. {layers[0]}")
    return "; ".join(reasons) or "nothing"


def _joined(values: Any) -> str:
    """Values of both bit widths; one where they are the same."""
    return " / ".join(dict.fromkeys(values))


def _all_keys() -> list[str]:
    return [f"{net.library}/{net.name} W{bits}A{bits}" for net in NETS for bits in BITS]


if __name__ == "__main__":
    main()
