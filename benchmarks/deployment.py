"""INT8 in ONNX Runtime and OpenVINO, beside what their own tools make of the same networks; one interleaved run per network.

    python benchmarks/deployment.py --cells runs/deployment --out benchmarks/results/deployment.json
    python benchmarks/deployment.py --cells runs/deployment --out benchmarks/results/deployment_amx.json  # on one with AMX

Networks are calibrated, not trained: latency does not depend on the weights. Rows of a network: FP32 in both runtimes (OpenVINO
pinned to f32); ours at W8A8 and W4A4, prepared by ModelOpt, and at W8A8 by torch.ao FX and torchao PT2E (convolutional
networks), each for every target and ("0..255") for the runtime alone; ours tuned for this machine, one file for each
runtime (PT2E's "0..255", or else ModelOpt's); ``quantize_static`` at several settings (the fastest counts); NNCF's
post-training quantization (where ``nncf`` is installed), and with bfloat16 for what it leaves in floating point, as ours may be
tuned to.
Bars are ratios of median processor times: over FP32 in ONNX Runtime, and over the fastest of the runtimes' own tools in the
same run. With --batch and --threads further settings are measured, each as its own interleaved run of FP32, what is prepared
for every target, what is tuned, and the runtimes' own tools; bars are of batch 1 and one thread.
Files are made once per folder ``--cells``, each network in a process of its own, whose time and peak memory are noted; networks
and settings that --out holds already are not measured again unless --fresh.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import page_tables
import torch
import torchvision
from step_time import ResNet20, memory_mib
from torch import Tensor, nn

from qakd_plugin import export_float, export_onnx, prepare
from qakd_plugin._common.cpu_features import has_bfloat16
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench import Candidate, Row, benchmark
from qakd_plugin.bench.census import census
from qakd_plugin.bench.file_facts import record_of
from qakd_plugin.bench.loading import make_runner
from qakd_plugin.deploy.diagnosis import diagnose
from qakd_plugin.deploy.tuning import tune_for_host
from qakd_plugin.report import console_table
from qakd_plugin.runtimes.base import FileRuntime, random_inputs
from qakd_plugin.runtimes.host import environment
from qakd_plugin.runtimes.interleaving import WARM_UP_CALLS, turns
from qakd_plugin.runtimes.openvino import OpenVINORunner

RESULTS = page_tables.RESULTS / "deployment.json"
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "vit_b_16", "resnet20", "shufflenet_v2_x1_0")
RUNTIMES: dict[str, FileRuntime] = {"ORT INT8": "onnxruntime", "OpenVINO INT8": "openvino"}
"""By the rows of our files."""

PREPARED = {
    "FX": ("torch_ao", True),
    "PT2E": ("pt2e", True),
    "0..255": ("modelopt", False),
    "FX, 0..255": ("torch_ao", False),
    "PT2E, 0..255": ("pt2e", False),
}
"""Toolkits, as rows name them, and whether ``prepare`` is for every target or the runtime alone; but ModelOpt for every one."""

SHOWN = ("PT2E", "PT2E, 0..255")
"""Those of them in the first table."""

FEWEST_CALLS = 12
"""Timed calls of each file, however long they take."""

STATIC = ("QDQ", "QDQ, per channel", "QOperator, per channel")
BARS = {
    "resnet18": {"ORT INT8": 2.6, "ORT INT8, tuned": 3.7, "OpenVINO INT8": 9.0},
    "resnet50": {"ORT INT8": 2.7, "ORT INT8, tuned": 3.5, "OpenVINO INT8": 7.0},
    "mobilenet_v2": {"ORT INT8": 1.7, "ORT INT8, tuned": 1.9, "OpenVINO INT8": 2.3},
    "vit_b_16": {"ORT INT8": 4.2, "ORT INT8, tuned": 4.5, "OpenVINO INT8": 5.0},
    "resnet20": {"ORT INT8": 1.8, "ORT INT8, tuned": 1.8, "OpenVINO INT8": 3.0},
}
"""Speed over FP32 in ONNX Runtime that is aimed at, batch 1, one thread."""

PEER_BARS = {"for every target": 0.93, "0..255": 0.98}
"""Our files' least speed over the fastest of the runtime's own tool's, by what the student was prepared for."""

LEAD_BARS = {"of any network": 1.0, "of four networks": 1.1}
"""Least speed of our fastest file, in whichever runtime, over the fastest of what needs none of this."""

SIZE_BARS = {"W4": 7.0, "W2": 13.0}
"""How many times smaller than FP32 files should be."""


def main() -> None:
    """Make the files, measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="may be repeated; all by default")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of FP32's timed calls; the others get as many (%(default)s)"
    )
    parser.add_argument("--batch", action="append", type=int, help="samples per call; may be repeated, 1 is always measured")
    parser.add_argument("--threads", action="append", type=int, help="of the runtimes; may be repeated, 1 is always measured")
    parser.add_argument("--cells", type=Path, default=Path("runs/deployment"), help="folder of the files (%(default)s)")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the figures; the tables in docs/measured.md too, if it is a committed one"
    )
    parser.add_argument(
        "--tuning", action=argparse.BooleanOptionalAction, default=True, help="tune for this machine, which may take long"
    )
    parser.add_argument("--fresh", action="store_true", help="measure networks again that --out holds")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the tables")
    parser.add_argument("--make", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if options.make:
        make_files(options.make, options.cells)
        return
    done: dict[str, Any] = {}
    if options.out and options.out.is_file():
        done = json.loads(options.out.read_text()).get("networks", {})
    further = further_settings(options.batch or [], options.threads or [])
    for name in () if options.table_only else options.network or NETWORKS:
        if name not in done or options.fresh:
            done[name] = measure(name, options.cells, options.seconds, options.tuning)
            _write(options.out, done)
        for batch, threads in further:
            if (setting := f"batch {batch}, threads {threads}") not in done[name]["further"]:
                done[name]["further"][setting] = measure_further(name, options.cells, options.seconds, batch, threads)
                _write(options.out, done)
        for line in verdicts(name, done[name]):
            print(f"{name}: {line}", flush=True)
    document = {"networks": {key: done[key] for key in NETWORKS if key in done}}
    print(*lead_verdicts(document["networks"]), sep="\n")
    tables = make_tables(document)
    print(*tables.values(), sep="\n\n")
    if options.out:
        page_tables.write_tables(options.out, RESULTS, tables)


def _write(out: Path | None, networks: dict[str, Any]) -> None:
    """After every run, so that one which is stopped goes on."""
    if out is not None:
        ordered = {key: networks[key] for key in NETWORKS if key in networks}
        write_atomic(out, json.dumps({"networks": ordered}, indent=1) + "\n")


def further_settings(batches: Iterable[int], threads: Iterable[int]) -> list[tuple[int, int]]:
    """Batch sizes with numbers of threads, but batch 1 with one thread, which is always measured."""
    pairs = itertools.product(sorted({1, *batches}), sorted({1, *threads}))
    return [pair for pair in pairs if pair != (1, 1)]


def measure(name: str, cells: Path, seconds: float, tune: bool) -> dict[str, Any]:
    """All rows of one network at batch 1 with one thread, from one interleaved run, and what is found in its files."""
    folder = cells / name
    if not (folder / "made.json").is_file():
        command = [sys.executable, __file__, "--make", name, "--cells", str(cells)]
        subprocess.run(command, check=True)
    for runtime in RUNTIMES.values():  # of an earlier run, which this one may not confirm
        for path in (_tuned_path(folder, runtime), _tuned_path(folder, runtime).with_suffix(".tuning.json")):
            path.unlink(missing_ok=True)
    tuning = {
        runtime: tune_for_host(_to_tune(folder, runtime), _tuned_path(folder, runtime))
        for runtime in (RUNTIMES.values() if tune else ())
    }
    calls = _calls(folder, seconds, 1, 1)
    timed = _timed(name, _candidates(name, folder), calls, 1, 1)
    left = census(folder / "w8.ort.onnx").float_layers
    return {
        "environment": environment(),
        **timed,
        "ratios": timed["ratios"] | _in_bfloat16(folder / "nncf.xml", timed["rows"], calls),
        "further": {},
        "made": json.loads((folder / "made.json").read_text()),
        "float_layers": list(left),
        "findings": [[finding.kind, len(finding.layers)] for finding in diagnose(folder / "w8.ort.onnx", left)],
        "tuning": {runtime: tuned.as_dict() for runtime, tuned in tuning.items()},
    }


def measure_further(name: str, cells: Path, seconds: float, batch: int, threads: int) -> dict[str, Any]:
    """The rows of another batch size or number of threads; files are those of :func:`measure`."""
    left_out = {f"PTQ {label}" for label in PREPARED}
    chosen = [each for each in _candidates(name, cells / name) if each.method not in left_out and each.weight_bits != 4]
    calls = _calls(cells / name, seconds, batch, threads)
    return {"environment": environment(), **_timed(name, chosen, calls, batch, threads)}


def _calls(folder: Path, seconds: float, batch: int, threads: int) -> int:
    """How often each file of a network is called: the shorter a call, the more of them tell what is noise of the machine."""
    runner = make_runner(folder / "fp32.onnx", "onnxruntime", threads)
    inputs, times = random_inputs(runner.inputs, batch), []
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        runner.run(inputs)
        times.append(time.perf_counter() - start)
    return max(FEWEST_CALLS, int(seconds / statistics.median(times)))


def _candidates(name: str, folder: Path) -> list[Candidate]:
    """What there is of a network's files."""
    found = [
        Candidate(folder / "fp32.onnx", "FP32", name),
        Candidate(folder / "w8.ort.onnx", "PTQ", name, "modelopt", 8, 8, runtime="onnxruntime"),
        Candidate(folder / "w4.ort.onnx", "PTQ", name, "modelopt", 4, 4, runtime="onnxruntime"),
        Candidate(folder / "w8.onnx", "PTQ", name, "modelopt", 8, 8, runtime="openvino"),
    ]
    for label, runtime in itertools.product(PREPARED, RUNTIMES.values()):
        path = _prepared_path(folder, label, runtime)
        found.append(Candidate(path, f"PTQ {label}", name, PREPARED[label][0], 8, 8, runtime=runtime))
    for setting in STATIC:
        path = _static_path(folder, setting)
        found.append(Candidate(path, f"quantize_static {setting}", name, None, 8, 8, runtime="onnxruntime"))
    found.append(Candidate(folder / "nncf.xml", "NNCF PTQ", name, None, 8, 8, runtime="openvino"))
    for runtime in RUNTIMES.values():
        if (tuned := _tuned_path(folder, runtime)).with_suffix(".tuning.json").is_file():
            path = tuned if tuned.is_file() else _to_tune(folder, runtime)  # where no change was worth it, there is no new file
            record = record_of(path)
            toolkit = None if record is None else record.toolkit
            found.append(Candidate(path, "PTQ tuned", name, toolkit, 8, 8, runtime=runtime))
    return [each for each in found if each.file is not None and each.file.is_file()]


def _timed(name: str, candidates: Sequence[Candidate], calls: int, batch: int, threads: int) -> dict[str, Any]:
    """One interleaved run: rows, which say whether the machine was busy meanwhile, and speeds over FP32."""
    from rich.console import Console

    rows = benchmark(candidates, runtimes=tuple(RUNTIMES.values()), calls=calls, batch_sizes=(batch,), threads=(threads,))
    Console(width=150).print(console_table(rows, title=f"{name}, batch {batch}, threads {threads}"))
    return {"rows": [{**row.as_dict(), "model": row.model} for row in rows], "ratios": _ratios(rows, threads)}


def _ratios(rows: list[Row], threads: int) -> dict[str, float]:
    """Median time of FP32 in ONNX Runtime over that of each row: of the processor, or with several threads on the clock."""
    times = {
        "OpenVINO FP32": "FP32 openvino 32",
        "OpenVINO BF16": "FP32 openvino bfloat16",
        "ORT INT8": "PTQ onnxruntime 8",
        "ORT W4A4": "PTQ onnxruntime 4",
    }
    for row, runtime in RUNTIMES.items():
        times |= {f"{row}, {label}": f"PTQ {label} {runtime} 8" for label in PREPARED}
        times[f"{row}, tuned"] = f"PTQ tuned {runtime} 8"
    times |= {"OpenVINO INT8": "PTQ openvino 8", "NNCF": "NNCF PTQ openvino 8"}
    found = {
        f"{row.method} {row.runtime} {'bfloat16' if row.precision == 'bfloat16' else row.weight_bits}": (
            row.cpu_ms if threads == 1 else row.p50_ms
        )
        for row in rows
    }
    reference = found["FP32 onnxruntime 32"]
    ratios = {label: reference / found[key] for label, key in times.items() if key in found}
    static = [cpu for key, cpu in found.items() if key.startswith("quantize_static")]
    return {**ratios, **({"quantize_static": reference / min(static)} if static else {})}


def _in_bfloat16(path: Path, rows: list[dict[str, Any]], calls: int) -> dict[str, float]:
    """NNCF's file with bfloat16 for what is not quantized, by how much faster it is so, in a run of both in turns."""
    fp32, nncf = (
        next((row["cpu_ms"] for row in rows if (row["method"], row["runtime"]) == kind), None)
        for kind in (("FP32", "onnxruntime"), ("NNCF PTQ", "openvino"))
    )
    if fp32 is None or nncf is None or not has_bfloat16():
        return {}
    runners = [OpenVINORunner(path, 1, precision) for precision in ("float32", "bfloat16")]
    inputs = random_inputs(runners[0].inputs, 1)
    times: list[list[float]] = [[], []]
    for runner in runners * WARM_UP_CALLS:
        runner.run(inputs)
    for turn in turns(calls):
        for runner, taken in zip(runners, times, strict=True):
            runner.run(inputs)
            for _ in turn:
                start = time.process_time()
                runner.run(inputs)
                taken.append(time.process_time() - start)
    exact, narrow = map(statistics.median, times)
    return {"NNCF BF16": fp32 / nncf * exact / narrow}


def verdicts(name: str, cell: dict[str, Any]) -> list[str]:
    """One line per bar: met or MISSED."""
    ratios, made = cell["ratios"], cell["made"]
    lines = []
    for label, bar in BARS.get(name, {}).items():
        measured = [shown for shown in _with_labels(label, PREPARED) if shown in ratios]
        for shown in measured:
            lines.append(f"{shown} {ratios[shown]:.2f}x FP32 in ONNX Runtime, bar {bar}x: {_met(ratios[shown] >= bar)}")
        if not measured:
            lines.append(f"{label}: not measured")
    for ours, theirs in (("ORT INT8", "quantize_static"), ("OpenVINO INT8", "NNCF")):
        if theirs in ratios:
            for shown in _with_labels(ours, PREPARED):
                if shown in ratios:
                    lead = ratios[shown] / ratios[theirs]  # repeats within 3 %
                    bar = PEER_BARS["0..255" if "0..255" in shown else "for every target"]
                    lines.append(f"{shown} {lead:.2f}x {theirs}'s fastest, bar {bar}x: {_met(lead >= bar)}")
        else:
            lines.append(f"{ours} against {theirs}: not measured, {made['missing'].get(theirs, 'no such file')}")
    for bits, bar in SIZE_BARS.items():
        smaller = made["bytes"]["fp32"] / made["bytes"][bits]
        lines.append(f"{bits} file {smaller:.1f} times smaller than FP32, bar {bar}: {_met(smaller >= bar)}")
    row = next(row for row in cell["rows"] if (row["method"], row["runtime"], row["weight_bits"]) == ("PTQ", "onnxruntime", 8))
    without_weights = sum(count for kind, count in cell["findings"] if kind == "products of activations")
    floating = row["total_layers"] - row["integer_layers"] - without_weights
    lines.append(f"{row['integer_layers']} integer layers, {floating} with weights in floating point: {_met(floating == 0)}")
    cost = f"export {made['export_seconds']:.1f} s, process peak {made['peak_gib']:.2f} GiB"
    lines.append(f"{cost}, bar for resnet50 10 s and 2.5 GiB: {_met(made['export_seconds'] <= 10 and made['peak_gib'] <= 2.5)}")
    if _is_busy(cell):
        lines.append("the machine was busy when this was measured: take ratios with care")
    return lines


def lead_verdicts(networks: dict[str, Any]) -> list[str]:
    """How much our fastest file is faster than the fastest of FP32, BF16 and the runtimes' own tools, over both runtimes."""
    lines, leads = [], []
    for name, cell in networks.items():
        ratios = {"ORT FP32": 1.0, **cell["ratios"]}
        ours = max((label for label in ratios if "INT8" in label), key=ratios.__getitem__)
        theirs = max((label for label in ratios if "INT8" not in label and label != "ORT W4A4"), key=ratios.__getitem__)
        leads.append(ratios[ours] / ratios[theirs])
        lines.append(f"{name}: {ours} {leads[-1]:.2f}x {theirs}, bar {LEAD_BARS['of any network']}x: {_met(leads[-1] >= 1)}")
    far = sum(lead >= LEAD_BARS["of four networks"] for lead in leads)
    return [*lines, f"{far} of {len(leads)} networks lead by {LEAD_BARS['of four networks']}x, bar 4 of 6: {_met(far >= 4)}"]


def _with_labels(row: str, labels: Iterable[str]) -> tuple[str, ...]:
    """A row's label for ModelOpt and every target, and for what is prepared otherwise."""
    return (row, *(f"{row}, {label}" for label in labels))


def _met(holds: bool) -> str:
    return "met" if holds else "MISSED"


def make_tables(document: dict[str, Any]) -> dict[str, str]:
    """Markdown of all tables, by name."""
    measured = any(cell["further"] for cell in document["networks"].values())
    further = {"deployment_further": make_further_table(document)} if measured else {}
    return {"deployment": make_table(document), **make_toolkit_tables(document), **further}


def make_table(document: dict[str, Any]) -> str:
    """Markdown: speed over FP32 in ONNX Runtime, and file sizes."""
    networks = document["networks"]
    present = _present(
        networks,
        *_with_labels("ORT INT8", SHOWN),
        "quantize_static",
        "ORT INT8, tuned",
        "OpenVINO FP32",
        "OpenVINO BF16",
        *_with_labels("OpenVINO INT8", SHOWN),
        "NNCF",
        "OpenVINO INT8, tuned",
    )
    header = ["network", "ORT FP32, ms", *present, "integer layers", "W8 / W4 / W2 file, times smaller"]
    rows = []
    for name, cell in networks.items():
        kinds = {(row["method"], row["runtime"], row["weight_bits"]): row for row in cell["rows"]}
        reference, ours = kinds["FP32", "onnxruntime", 32], kinds["PTQ", "onnxruntime", 8]
        sizes = cell["made"]["bytes"]
        ratios = _ratio_cells(cell, present)
        smaller = " / ".join(f"{sizes['fp32'] / sizes[bits]:.1f}" for bits in ("W8", "W4", "W2"))
        rows.append(
            [name, f"{reference['cpu_ms']:.2f}", *ratios, f"{ours['integer_layers']} of {ours['total_layers']}", smaller]
        )
    return page_tables.markdown(header, rows)


def make_toolkit_tables(document: dict[str, Any]) -> dict[str, str]:
    """Markdown, by the tables' names: speed over FP32 in ONNX Runtime of all that was prepared; a table for each runtime."""
    networks = document["networks"]
    rows = {"ORT INT8": ("ORT W4A4", "quantize_static"), "OpenVINO INT8": ("NNCF",)}
    tables = {}
    for row, others in rows.items():
        present = _present(networks, *_with_labels(row, PREPARED), *others)
        short = ["ModelOpt" if label == row else label.removeprefix(f"{row}, ").removeprefix("ORT ") for label in present]
        header = ["network", *(f"ModelOpt, {label}" if label == "0..255" else label for label in short)]
        lines = [[name, *_ratio_cells(cell, present)] for name, cell in networks.items()]
        tables[f"deployment_{RUNTIMES[row]}"] = page_tables.markdown(header, lines)
    return tables


def _is_busy(measured: dict[str, Any]) -> bool:
    """Whether something else ran beside an interleaved run."""
    return any(row["conditions"]["busy"] for row in measured["rows"])


FURTHER = ("ORT INT8", "ORT INT8, tuned", "quantize_static", "OpenVINO BF16", "OpenVINO INT8", "OpenVINO INT8, tuned", "NNCF")
"""What is measured at further settings, over FP32 in ONNX Runtime at the same one."""


def make_further_table(document: dict[str, Any]) -> str:
    """Markdown: speed over FP32 in ONNX Runtime by batch size and number of threads."""
    lines = []
    for name, cell in document["networks"].items():
        for setting, found in cell["further"].items():
            row = next(row for row in found["rows"] if (row["method"], row["runtime"]) == ("FP32", "onnxruntime"))
            beside = " (busy)" if _is_busy(found) else ""
            lines.append([name, f"{setting}{beside}", f"{row['p50_ms']:.1f}", *_ratio_cells(found, FURTHER)])
    return page_tables.markdown(["network", "setting", "ORT FP32, ms", *FURTHER], lines)


def _present(networks: dict[str, Any], *labels: str) -> list[str]:
    return [label for label in labels if any(label in cell["ratios"] for cell in networks.values())]


def _ratio_cells(cell: dict[str, Any], labels: Iterable[str]) -> list[str]:
    return [f"{cell['ratios'][label]:.2f}" if label in cell["ratios"] else "" for label in labels]


def make_files(name: str, cells: Path) -> None:
    """Write every file of a network; ``made.json`` comes last."""
    folder = cells / name
    folder.mkdir(parents=True, exist_ok=True)
    model, images = _network(name)
    export_float(model, images, folder / "fp32.onnx")
    transformer = name.startswith("vit")  # whose products of attention NNCF quantizes, too
    student = prepare(model, [images], "modelopt", weight_bits=8, activation_bits=8, quantize_attention=transformer)
    start = time.perf_counter()
    export_onnx(student, images, folder / "w8.ort.onnx", target="onnxruntime")
    seconds = time.perf_counter() - start
    peak = memory_mib("VmHWM") / 1024  # not getrusage's: that of a new process begins at its parent's
    export_onnx(student, images, folder / "w8.onnx", target="openvino")
    for bits, storage in ((4, "int4"), (2, "int2")):
        student = prepare(model, [images], "modelopt", weight_bits=bits, activation_bits=max(bits, 4), edges=4)
        export_onnx(student, images, folder / f"w{bits}.ort.onnx", target="onnxruntime", weight_storage=storage)
    for label in PREPARED:
        _prepare(folder, label, model, images, transformer=transformer)
    missing: dict[str, str] = {}
    for setting in STATIC:
        try:
            _quantize_static(folder / "fp32.onnx", _static_path(folder, setting), setting, images)
        except Exception as error:  # a foreign tool that fails at one setting is a result, too  # noqa: BLE001
            missing["quantize_static"] = f"{setting}: {type(error).__name__}: {str(error)[:200]}"
    if importlib.util.find_spec("nncf") is None:
        missing["NNCF"] = "nncf is not installed (pip install nncf)"
    else:
        _quantize_nncf(folder / "fp32.onnx", folder / "nncf.xml", images, transformer=transformer)
    files = {"fp32": "fp32", "W8": "w8.ort", "W4": "w4.ort", "W2": "w2.ort"}
    made = {
        "bytes": {label: (folder / f"{file}.onnx").stat().st_size for label, file in files.items()},
        "export_seconds": seconds,
        "peak_gib": peak,
        "missing": missing,
    }
    write_atomic(folder / "made.json", json.dumps(made, indent=1) + "\n")


def _prepare(folder: Path, label: str, model: nn.Module, images: Tensor, *, transformer: bool) -> None:
    """Write a toolkit's files for both runtimes."""
    toolkit, every_target = PREPARED[label]
    if transformer and toolkit == "torch_ao":  # which has no quantizers for a ViT's attention
        return
    both = list(RUNTIMES.values())
    targets: dict[Any, list[FileRuntime]] = {"tensorrt": both} if every_target else {runtime: [runtime] for runtime in both}
    for target, runtimes in targets.items():
        student = prepare(
            model,
            [images],
            toolkit,
            weight_bits=8,
            activation_bits=8,
            target=target,
            quantize_attention=transformer,
        )
        for runtime in runtimes:
            export_onnx(student, images, _prepared_path(folder, label, runtime), target=runtime)


def _network(name: str) -> tuple[nn.Module, Tensor]:
    """With random weights and BatchNorm statistics that fit them, and a batch of random images."""
    torch.manual_seed(0)
    small = name == "resnet20"
    model = (ResNet20() if small else torchvision.models.get_model(name)).train()
    images = torch.randn(4, 3, 32, 32) if small else torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        for _ in range(4):
            model(images)
    return model.eval(), images


def _prepared_path(folder: Path, label: str, runtime: str) -> Path:
    toolkit, every_target = PREPARED[label]
    return folder / f"w8.{toolkit}{'' if every_target else '.0-255'}.{runtime}.onnx"


def _to_tune(folder: Path, runtime: FileRuntime) -> Path:
    prepared = _prepared_path(folder, "PT2E, 0..255", runtime)
    return prepared if prepared.is_file() else folder / {"onnxruntime": "w8.ort.onnx", "openvino": "w8.onnx"}[runtime]


def _tuned_path(folder: Path, runtime: str) -> Path:
    return folder / f"w8.tuned.{runtime}.onnx"


def _static_path(folder: Path, setting: str) -> Path:
    return folder / f"static.{setting.replace(', ', '.').replace(' ', '_')}.onnx"


def _quantize_static(source: Path, target: Path, setting: str, images: Tensor) -> None:
    """ONNX Runtime's own quantization, unsigned activations, after its own preparation; of linear and convolution layers."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"input": images.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QOperator if "QOperator" in setting else QuantFormat.QDQ,
        per_channel="per channel" in setting,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # In a transformer, quantizing all else costs speed (4.3x against 3.4x over FP32 on ViT-B/16).
        op_types_to_quantize=["Conv", "Gemm", "MatMul"] if "vit" in str(source) else None,
        extra_options={"MatMulConstBOnly": True},
    )
    prepared.unlink()


def _quantize_nncf(source: Path, target: Path, images: Tensor, *, transformer: bool) -> None:
    import nncf
    import openvino

    quantized = nncf.quantize(
        openvino.Core().read_model(str(source)),
        nncf.Dataset([images.numpy()]),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    openvino.save_model(quantized, str(target), compress_to_fp16=False)


if __name__ == "__main__":
    main()
