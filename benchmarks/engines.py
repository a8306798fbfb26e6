"""TensorRT engines: what export and build take, what the plan computes in, how large it is; on a GPU also how fast.

    python benchmarks/engines.py            # TensorRT-RTX builds without a GPU; nothing is run
    python benchmarks/engines.py --gpu      # on an NVIDIA GPU: builds for it, compares outputs with ONNX Runtime, times

Weights are random: none of the figures depends on them. Each export and each build is a process of its own, whose peak memory
is its own; seconds are wall-clock time without imports and preparation. "FP16" in a form's name means that what is not
quantized is in FP16. A step that fails leaves its reason, in the library's own words: whether a GPU is taken is a result, too.
Every finished cell is written to benchmarks/results/engines.json at once and not run again unless --fresh; the table in
docs/measured.md is written from that file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import page_tables
import torch
from step_time import ResNet20, memory_mib
from torch import Tensor, nn
from zoo import Net, random_weights

from qakd_plugin import build_engine, export_float, export_onnx, prepare
from qakd_plugin._common.files import write_atomic
from qakd_plugin._common.optional import require
from qakd_plugin.deploy.engine.bindings import gpu_capability
from qakd_plugin.deploy.engine.precheck import inspect_onnx
from qakd_plugin.deploy.engine.runner import EngineRunner
from qakd_plugin.deploy.parity.report import agreement
from qakd_plugin.errors import QakdError
from qakd_plugin.placement.attention import open_attention
from qakd_plugin.runtimes.host import environment, is_busy

RESULTS = page_tables.RESULTS / "engines.json"
EXPORT_SECONDS, EXPORT_GIB, BUILD_SECONDS = 30.0, 3.0, 10.0
"""Bars: the first two are for the export of resnet50, the last for every build."""
WARM_UP, CALLS = 50, 300


@dataclass(frozen=True)
class Form:
    """How a network is quantized, and what the rest of it computes in."""

    name: str
    bits: tuple[int, int] | None = None
    float16: bool = False
    modelopt_config: str | None = None


class Cifar(Net):
    """The CIFAR network of the other benchmarks."""

    def make(self) -> nn.Module:
        return ResNet20()


FORMS = (Form("FP32"), Form("FP16", float16=True), Form("INT8", (8, 8)), Form("INT8, FP16", (8, 8), float16=True))
INT4_FORMS = (
    Form("W4A8", (4, 8)),
    Form("W4A8, FP16", (4, 8), float16=True),
    Form("INT4 blocks of 128, FP16", float16=True, modelopt_config="INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
)
"""For linear layers; TensorRT has no 4-bit convolution beside 8-bit activations."""
NETS = (
    Net("resnet18", size=224, samples=4),
    Net("resnet50", size=224, samples=4),
    Net("mobilenet_v2", size=224, samples=4),
    Net("vit_b_16", size=224, samples=4),
    Cifar("resnet20", "CIFAR", size=32, samples=8),
)


def forms_of(net: Net) -> tuple[Form, ...]:
    """The forms that a network is measured in."""
    return FORMS + INT4_FORMS if net.name == "vit_b_16" else FORMS


def main() -> None:
    """Run what is not done yet, write the results and the table in docs/measured.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", action="append", choices=[net.name for net in NETS], help="may be repeated; all by default"
    )
    parser.add_argument("--gpu", action="store_true", help="build for the GPU at hand and run there")
    parser.add_argument("--runtime", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto", help="(%(default)s)")
    parser.add_argument("--toolkit", choices=("modelopt", "torch_ao"), help="modelopt where it is installed, else torch_ao")
    parser.add_argument("--fresh", action="store_true", help="run cells again that are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the cells")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the table in the docs")
    options = parser.parse_args()
    toolkit = options.toolkit or ("modelopt" if find_spec("modelopt") else "torch_ao")
    document: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    part = document.setdefault("gpu" if options.gpu else "builds", {"cells": {}})
    part.setdefault("cells", {})
    if is_busy() and not options.table_only:
        print("The machine is busy: take the seconds with care.")
    for net in NETS:
        wanted = net.name in (options.network or [net.name]) and not options.table_only
        forms = [form for form in forms_of(net) if options.fresh or f"{net.name} {form.name}" not in part["cells"]]
        if not wanted or not forms:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for index, form in enumerate(forms):
                print(f"{net.name} {form.name} ...", end=" ", flush=True)
                cell = run_cell(net, form, folder / str(index), toolkit, options.runtime, options.gpu)
                part["cells"][f"{net.name} {form.name}"] = cell
                print(_line(cell), flush=True)
                if not options.gpu:
                    _save(document, part, toolkit, options.out)
            if options.gpu:  # all forms of a network are timed side by side
                times = run_engines({f"{net.name} {form.name}": folder / str(k) for k, form in enumerate(forms)}, part["cells"])
                for key, found in times.items():
                    part["cells"][key]["run"] = found
                    print(key, found)
                _save(document, part, toolkit, options.out)
    for line in verdicts(document):
        print(line)
    print(make_table(document))
    if options.out == RESULTS:
        page_tables.write_table("engines", make_table(document))


def _save(document: dict[str, Any], part: dict[str, Any], toolkit: str, path: Path) -> None:
    part |= {"environment": environment(), "gpu": _gpu(), "toolkit": toolkit}
    order = [f"{net.name} {form.name}" for net in NETS for form in forms_of(net)]
    part["cells"] = {key: part["cells"][key] for key in order if key in part["cells"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(document, indent=1) + "\n")


def _gpu() -> dict[str, Any] | None:
    capability = gpu_capability()
    if capability is None:
        return None
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "unknown"
    return {"name": name, "capability": capability, "cuda_of_torch": torch.version.cuda}


def run_cell(net: Net, form: Form, folder: Path, toolkit: str, runtime: str, gpu: bool) -> dict[str, Any]:
    """Export and build one form of one network, each in a process of its own."""
    folder.mkdir()
    cell: dict[str, Any] = {"network": net.name, "input": net.size, "form": form.name}
    cell["export"] = in_child(export_form, net, form, folder, toolkit)
    if cell["export"]["problem"] is None:
        cell["build"] = in_child(build_form, folder, runtime, gpu)
    return cell


def in_child(step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a step returns in a fresh process, or {"problem": why there is nothing}."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return {"problem": None, **pool.submit(step, *arguments).result()}
        except QakdError as error:
            return {"problem": " ".join(str(error).split())[:1000]}
        except BrokenProcessPool:
            return {"problem": "the process was killed, or crashed."}


def export_form(net: Net, form: Form, folder: Path, toolkit: str) -> dict[str, Any]:
    """In a child: prepare and export; what the export alone took."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    model, images = random_weights(net)
    path, found = folder / "net.onnx", {}
    prepared = quantized(model, images, form, toolkit)
    before = start_peak()
    started, cpu = time.perf_counter(), time.process_time()
    if prepared is None:
        export_float(model, images, path, float16=form.float16)
    else:
        exported = export_onnx(prepared, images, path, target="tensorrt", float16=form.float16)
        found["parity"] = exported.parity.as_dict()
        found["float16"] = None if exported.float16 is None else asdict(exported.float16)
    found |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    found |= {"peak_gib": peak_gib(), "gib_before": before, "bytes": path.stat().st_size}
    np.save(folder / "images.npy", images.numpy())
    return found


def quantized(model: nn.Module, images: Tensor, form: Form, toolkit: str) -> nn.Module | None:
    """The network prepared as a form says; None for a float one."""
    if form.modelopt_config is not None:
        mtq: Any = require("modelopt.torch.quantization", extra="modelopt", purpose=f"quantize with {form.modelopt_config}")
        config = copy.deepcopy(getattr(mtq, form.modelopt_config))
        # Blocks are for linear layers; those of a convolution are refused at export.
        config["quant_cfg"].append({"parent_class": "nn.Conv2d", "quantizer_name": "*", "enable": False})
        with contextlib.redirect_stdout(io.StringIO()):
            prepared: nn.Module = mtq.quantize(open_attention(model), config, lambda network: network(images))
        return prepared
    if form.bits is None:
        return None
    return prepare(model, [images], toolkit, weight_bits=form.bits[0], activation_bits=form.bits[1])


def build_form(folder: Path, runtime: str, gpu: bool) -> dict[str, Any]:
    """In a child: build the engine; what the build took, and what is in the plan."""
    source, before = folder / "net.onnx", start_peak()
    options: dict[str, Any] = {"capabilities": ["CURRENT"]} if gpu and runtime != "tensorrt" else {}
    started, cpu = time.perf_counter(), time.process_time()
    info = build_engine(source, folder / "net.engine", runtime, opt_batch=1, max_batch=8, allow_float=True, **options)
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu, "peak_gib": peak_gib()}
    manifest = info.manifest
    found |= {"gib_before": before, **{key: manifest[key] for key in ("bytes", "runtime", "capabilities")}}
    found |= {key: manifest[key] for key in ("convolutions", "matmuls", "int4_weights", "int4_layers")}
    if manifest["layers"] != "unknown":
        names = {layer.name for layer in inspect_onnx(source).layers}
        weighted = [layer for layer in manifest["layers"] if names & {layer["name"], *layer["onnx_layers"]}]
        floating = [layer["name"] for layer in weighted if not all(kind.startswith("int") for kind in layer["inputs"])]
        found |= {"with_weights": len(weighted), "with_weights_in_float": floating}
    return found


def start_peak() -> float:
    """Let the process's peak begin anew; GiB that it holds now. 0.0 where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0.0
    return memory_mib("VmRSS") / 1024


def peak_gib() -> float | None:
    """Largest resident memory since :func:`start_peak`; None where the system cannot tell."""
    return memory_mib("VmHWM") / 1024 if Path("/proc/self/status").is_file() else None


def run_engines(folders: dict[str, Path], cells: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Load all engines of a network, compare each with ONNX Runtime, and time them in turn; see :func:`time_engines`."""
    built = {key: folder for key, folder in folders.items() if cells[key].get("build", {"problem": ""})["problem"] is None}
    found: dict[str, dict[str, Any]] = {}
    for key in list(built):  # in a child: an engine that brings its process down must not take the others with it
        tried = in_child(time_engines, {key: built[key]}, 1)
        if tried["problem"] is not None:
            found[key] = {"problem": tried["problem"]}
            del built[key]
    if built:
        timed = in_child(time_engines, built, CALLS)
        for key in built:
            found[key] = {"problem": timed["problem"]} if timed["problem"] is not None else {"problem": None, **timed[key]}
    return found


def time_engines(folders: dict[str, Path], calls: int) -> dict[str, Any]:
    """In a child: batch 1, milliseconds; parts by CUDA events, "call" by the clock, copies included."""
    runners = {key: EngineRunner(folder / "net.engine") for key, folder in folders.items()}
    images = np.load(next(iter(folders.values())) / "images.npy")
    parts: dict[str, list[Any]] = {key: [] for key in runners}
    walls: dict[str, list[float]] = {key: [] for key in runners}
    for index in range(WARM_UP + calls):
        for key, runner in runners.items():
            started = time.perf_counter()
            runner.run(images[:1])
            wall = 1e3 * (time.perf_counter() - started)
            stages = runner.time(images[:1])
            if index >= WARM_UP:
                walls[key].append(wall)
                parts[key].append(stages)
    found = {}
    for key, runner in runners.items():
        reference = _onnxruntime(folders[key] / "net.onnx", images)
        found[key] = {
            "load_ms": runner.load_ms,
            "call_ms": statistics.median(walls[key]),
            **{name: statistics.median(asdict(one)[name] for one in parts[key]) for name in asdict(parts[key][0])},
            "calls": calls,
            "against_onnxruntime": asdict(agreement(reference, runner.run(images))),
        }
        runner.close()
    return found


def _onnxruntime(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def verdicts(document: dict[str, Any]) -> list[str]:
    """What was to be reached, and whether it was."""
    cells = document.get("builds", {}).get("cells", {})
    lines = []
    export = cells.get("resnet50 INT8", {}).get("export")
    if export and export["problem"] is None:
        met = export["seconds"] < EXPORT_SECONDS and export["peak_gib"] < EXPORT_GIB
        lines.append(
            f"export of resnet50: {export['seconds']:.1f} s, {export['peak_gib']:.2f} GiB; bars {EXPORT_SECONDS:.0f} s, "
            f"{EXPORT_GIB:.0f} GiB: {'met' if met else 'MISSED'}"
        )
    for key, cell in cells.items():
        build = cell.get("build", {"problem": cell["export"]["problem"]})
        if build["problem"] is not None:
            lines.append(f"{key}: no engine: {build['problem']}")
            continue
        if build["seconds"] >= BUILD_SECONDS:
            lines.append(f"{key}: built in {build['seconds']:.1f} s, bar {BUILD_SECONDS:.0f} s: MISSED")
        if build.get("with_weights_in_float") and ("INT8" in cell["form"] or "W4A8" in cell["form"]):
            lines.append(f"{key}: in floating point: {', '.join(build['with_weights_in_float'])}: MISSED")
    return lines


def make_table(document: dict[str, Any]) -> str:
    """Markdown: a row for each network at INT8, and one for ViT at W4A8; a second table where a GPU ran them."""
    cells = document.get("builds", {}).get("cells", {})
    header = ["network", "export s", "export peak GiB", "build s", "layers with weights in INT8", "of these stored in INT4"]
    header += ["engine MB: FP32", "FP16", "INT8, FP16", "INT4"]
    rows = []
    for net in NETS:
        for form in ("INT8", "W4A8"):
            cell = cells.get(f"{net.name} {form}")
            if cell is None or cell.get("build", {"problem": ""})["problem"] is not None:
                continue
            export, build = cell["export"], cell["build"]
            integer = build["with_weights"] - len(build["with_weights_in_float"])
            wanted = ("FP32", "FP16", "INT8, FP16") if form == "INT8" else ()
            sizes = [_megabytes(cells.get(f"{net.name} {other}")) for other in wanted] or ["-"] * 3
            rows.append(
                [net.name if form == "INT8" else f"{net.name} {form}", f"{export['seconds']:.1f}", f"{export['peak_gib']:.2f}"]
                + [f"{build['seconds']:.1f}", f"{integer} of {build['with_weights']}", str(build["int4_layers"]), *sizes]
                + ["-" if form == "INT8" else _megabytes(cells.get(f"{net.name} W4A8, FP16"))]
            )
    table = page_tables.markdown(header, rows)
    return table + ("\n\n" + _gpu_table(document["gpu"]) if document.get("gpu", {}).get("cells") else "")


def _gpu_table(part: dict[str, Any]) -> str:
    device = "no GPU" if part["gpu"] is None else f"{part['gpu']['name']}, {part['gpu']['capability']}"
    header = [f"on {device}", "compute ms", "call ms", "same label as ONNX Runtime", "or why not"]
    rows = []
    for key, cell in part["cells"].items():
        steps = [cell["export"], cell.get("build"), cell.get("run")]
        problem = next((step["problem"] for step in steps if step is not None and step["problem"] is not None), None)
        run = cell.get("run")
        if problem is None and run is not None:
            same = f"{run['against_onnxruntime']['top1']:.0%}, {run['against_onnxruntime']['sqnr_db']:.0f} dB"
            rows.append([key, f"{run['compute_ms']:.3f}", f"{run['call_ms']:.3f}", same, ""])
        else:
            rows.append([key, "-", "-", "-", (problem or "not run").replace("|", "/")])
    return page_tables.markdown(header, rows)


def _megabytes(cell: dict[str, Any] | None) -> str:
    built = cell is not None and cell.get("build", {"problem": ""})["problem"] is None
    return f"{cell['build']['bytes'] / 1e6:.1f}" if cell is not None and built else "-"


def _line(cell: dict[str, Any]) -> str:
    export, build = cell["export"], cell.get("build")
    if build is None:
        return f"not exported: {export['problem']}"
    text = f"exported in {export['seconds']:.1f} s, {export['peak_gib'] or 0:.2f} GiB, {export['bytes'] / 1e6:.1f} MB; "
    if build["problem"] is not None:
        return text + f"no engine: {build['problem']}"
    return text + (
        f"built in {build['seconds']:.1f} s, {build['peak_gib'] or 0:.2f} GiB, {build['bytes'] / 1e6:.1f} MB; convolutions "
        f"{build['convolutions']}, products {build['matmuls']}, INT4 {build['int4_layers']}"
    )


if __name__ == "__main__":
    main()
