"""Which networks go all the way: prepared, trained for a step, exported exactly for three targets, built into an engine.

    python benchmarks/zoo.py [--library timm] [--network NAME] [--toolkit pt2e] [--bits 8] [--jobs 2]

For every network of zoo_networks.py, toolkit and bit width: prepare, one step of SQAKD, export for TensorRT, ONNX Runtime and
OpenVINO (the parity gate is on), count the layers that ONNX Runtime computes in integers, and build a TensorRT-RTX
engine, which needs no GPU. Weights are random: exactness does not depend on training. What a library makes with zeros (gammas
of residual branches) is prepared with them as well. The three files of a cell share one torch.export, which takes most of a
cell's time and does not depend on the target. Each cell says which layers with weights are quantized, which stay in
floating point, and whether something named them; a step that fails leaves its reason, and whether that is one of the package's
own errors.

Every network has a process of its own, with bounded time and memory, forked from one that has imported the libraries. Every
finished cell is written to benchmarks/results/zoo.json at once and not run again unless --fresh; the tables in docs/measured.md
are written from that file.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import page_tables
import torch
from torch import Tensor, nn
from zoo_networks import NETS, Net, as_made, has_zero_branches, random_weights

import qakd_plugin as qakd
from qakd_plugin._common.files import write_atomic
from qakd_plugin.bench.census import census
from qakd_plugin.deploy import export
from qakd_plugin.deploy.engine.precheck import inspect_onnx
from qakd_plugin.errors import QakdError
from qakd_plugin.placement.attention import open_attention
from qakd_plugin.placement.layer_names import WEIGHTED
from qakd_plugin.runtimes.host import environment
from qakd_plugin.tasks.inputs import Inputs, call, first_samples, named_tensors
from qakd_plugin.tasks.outputs import named_outputs
from qakd_plugin.toolkits import adapter_for

RESULTS = page_tables.RESULTS / "zoo.json"
TOOLKITS = ("modelopt", "pt2e")
BITS = (8, 4)
LIBRARIES = ("timm", "torchvision", "transformers")
TARGETS = ("tensorrt", "onnxruntime", "openvino")
_SECONDS, _GIBIBYTES = 1200, 20
"""What a network's process may take, of time and of address space."""

_PROCESSES = multiprocessing.get_context("forkserver")
_LIBRARIES = ("modelopt.torch.quantization", "torchao", "timm", "transformers", "torchvision", "onnxruntime", "openvino")
"""Importing them takes longer than a step of most cells."""

_LAYERS = (*WEIGHTED, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(frozen=True)
class Cell:
    """One way of one network.

    Attributes:
        toolkit: that prepares it.
        bits: of weights and activations.
        made: with the weights that its library makes, zeros among them; else with random ones throughout.
    """

    toolkit: str
    bits: int
    made: bool = False

    def key(self, net: Net) -> str:
        return f"{net.key} {self.toolkit} W{self.bits}A{self.bits}" + (" as made" if self.made else "")


CELLS = (*(Cell(toolkit, bits) for toolkit in TOOLKITS for bits in BITS), Cell("modelopt", 8, made=True))


def main() -> None:
    """Run what is not done yet, write the results and the tables in docs/measured.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="may be repeated; all by default")
    parser.add_argument("--network", action="append", help="name in its library; may be repeated; all by default")
    parser.add_argument("--toolkit", action="append", choices=TOOLKITS, help="may be repeated; both by default")
    parser.add_argument("--bits", action="append", type=int, choices=BITS, help="may be repeated; both by default")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, a thread each")
    parser.add_argument("--fresh", action="store_true", help="run cells again that are done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the cells")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the tables in the docs")
    options = parser.parse_args()
    unknown = set(options.network or ()) - {net.name for net in NETS}
    if unknown:
        parser.error(f"--network: {sorted(unknown)} are none of the zoo's")
    cells: dict[str, dict[str, Any]] = json.loads(options.out.read_text())["cells"] if options.out.is_file() else {}
    if not options.table_only:
        wanted = [
            (net, todo)
            for net in NETS
            if net.name in (options.network or [net.name])
            and net.library in (options.library or LIBRARIES)
            and (
                todo := [
                    cell
                    for cell in CELLS
                    if cell.toolkit in (options.toolkit or TOOLKITS)
                    and cell.bits in (options.bits or BITS)
                    and (options.fresh or cell.key(net) not in cells)
                ]
            )
        ]
        run_all(wanted, cells, options.out, options.jobs)
    print(make_summary(cells))
    if options.out == RESULTS:
        page_tables.write_table("zoo-summary", make_summary(cells))
        page_tables.write_table("zoo", make_table(cells))


# -- processes


def run_all(wanted: list[tuple[Net, list[Cell]]], cells: dict[str, dict[str, Any]], out: Path, jobs: int) -> None:
    """Each network in a process; ``cells`` and the file hold what is done so far."""
    lock = Lock()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    _PROCESSES.set_forkserver_preload(list(_LIBRARIES))

    def keep(key: str, cell: dict[str, Any]) -> None:
        with lock:
            print(f"{key}: {_line(cell)}", flush=True)
            cells[key] = {name: value for name, value in cell.items() if name != "times"}
            ordered = {name: cells[name] for name in _all_keys() if name in cells}
            write_atomic(out, json.dumps({"environment": environment(), "cells": ordered}, indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda pair: run_network(*pair, keep), wanted):
            pass


def run_network(net: Net, todo: list[Cell], keep: Callable[[str, dict[str, Any]], None]) -> None:
    """All cells of a network in one process; what a process that dies leaves undone is recorded as that."""
    left = [cell.key(net) for cell in todo]
    receiving, sending = _PROCESSES.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+") as output:
        process = _PROCESSES.Process(target=_run_in_this_process, args=(net, todo, sending, output.name))
        process.start()
        sending.close()
        try:
            while left:
                done = receiving.recv()
                keep(left.pop(0), done)
        except EOFError:  # it died
            pass
        finally:
            process.kill() if left else None
            process.join()
        last = (output.read().strip().splitlines() or [""])[-1][:300]
    for key in left:
        message = f"the process ended with {process.exitcode}: {last}"
        keep(key, {"problem": {"step": "process", "own": False, "message": message}})


def _run_in_this_process(net: Net, todo: list[Cell], sending: Any, output: str) -> None:
    """Send what each cell gives; what is printed goes to a file."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 60))
    resource.setrlimit(resource.RLIMIT_AS, (_GIBIBYTES << 30, _GIBIBYTES << 30))
    for cell in todo:
        sending.send(run_cell(net, cell))


# -- one cell


class _Said(logging.Handler):
    """What the package said, in one text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def reason(self, layer: str) -> str | None:
        """What names a layer, its weight or a quantizer of it; None where nothing does."""
        name = re.compile(rf"(?<![\w.]){re.escape(layer)}(?:\.weight|\.\w+_quantizer)?(?![\w]|\.\w)")
        return next((line for line in self.lines if name.search(line)), None)


def run_cell(net: Net, cell: Cell) -> dict[str, Any]:
    """One network at one bit width by one toolkit, all steps; a step that fails leaves its reason."""
    model, inputs = (as_made if cell.made else random_weights)(net)
    found: dict[str, Any] = {"input": net.size, "samples": net.samples, "options": dict(net.options)}
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if cell.made and not has_zero_branches(model):
        return found | {"problem": None, "same": True}
    said = _Said()
    package = logging.getLogger("qakd_plugin")
    package.addHandler(said)
    package.propagate = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            found |= _steps(model, inputs, cell, Path(folder), said)
    finally:
        package.removeHandler(said)
    return found


def _steps(model: nn.Module, inputs: Inputs, cell: Cell, folder: Path, said: _Said) -> dict[str, Any]:
    attempt = _Attempts(folder)
    half = max(1, len(next(iter(named_tensors(inputs).values()))) // 2)
    batches = [first_samples(inputs, half), inputs]
    student = attempt("prepare", lambda: qakd.prepare(model, batches, cell.toolkit, cell.bits, cell.bits))
    found: dict[str, Any] = {}
    if student is not None:
        attempt("distill", lambda: _distill(student, model, inputs))
        with one_torch_export():
            for target in TARGETS:
                found[target] = _export(attempt, student, inputs, target, folder)
        found |= _accounts(model, student, said, found["onnxruntime"].get("float_layers", ()))
    return {"problem": attempt.first, "problems": attempt.problems, "times": attempt.times, **found}


def _distill(student: nn.Module, teacher: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        outputs = named_outputs(call(teacher, inputs))
    floating = [name for name, output in outputs.items() if isinstance(output, Tensor) and output.is_floating_point()]
    method = qakd.SQAKD(match={name: qakd.SmoothL1() for name in floating}) if len(floating) > 1 else qakd.SQAKD()
    return qakd.distill(student, teacher, [inputs], method=method, epochs=1, seed=0, lr=1e-4)


def _export(attempt: _Attempts, student: nn.Module, inputs: Inputs, target: Any, folder: Path) -> dict[str, Any]:
    file = attempt(target, lambda: qakd.export_onnx(student, inputs, folder / f"{target}.onnx", target))
    if file is None:
        return {"exact": False}
    found: dict[str, Any] = {"exact": True, "parity": file.parity.as_dict()}
    if target == "onnxruntime":
        counted = census(file)
        found |= {"integer": counted.integer, "total": counted.total, "float_layers": list(counted.float_layers)}
    if target == "tensorrt":
        found |= _engine(attempt, file, folder)
    return found


@contextmanager
def one_torch_export() -> Iterator[None]:
    """Within the block, :func:`qakd.export_onnx` traces and translates the first model that it gets, and takes that again.

    For one model and several targets: until there, an export does the same for each.
    """
    with patch.object(export, "trace", _once(export.trace)), patch.object(export, "to_canonical", _once(export.to_canonical)):
        yield


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function once; what it returned or raised is what all later calls return or raise."""
    outcomes: list[tuple[Any, Exception | None]] = []

    def outcome(*args: Any, **kwargs: Any) -> Any:
        if not outcomes:
            try:
                outcomes.append((function(*args, **kwargs), None))
            except Exception as error:  # raised below, each time  # noqa: BLE001
                outcomes.append((None, error))
        result, error = outcomes[0]
        if error is not None:
            raise error
        return result

    return outcome


def _engine(attempt: _Attempts, file: qakd.ExportedModel, folder: Path) -> dict[str, Any]:
    contents = inspect_onnx(file)
    engine = attempt("engine", lambda: qakd.build_engine(file, folder / "net.engine", runtime="tensorrt_rtx"))
    if engine is None:
        return {"engine": False}
    manifest = engine.manifest
    found: dict[str, Any] = {"engine": True}
    for kind in ("capabilities", "convolutions", "matmuls", "bytes"):
        found[f"engine_{kind}"] = manifest[kind]
    stored = {layer.name for layer in contents.layers}
    floating = [layer for layer in manifest["layers"] if not all(kind.startswith("int8") for kind in layer["inputs"])]
    with_weights = [layer["name"] for layer in floating if stored & {layer["name"], *layer["onnx_layers"]}]
    return found | {"engine_float_weights": with_weights, "engine_float_products": len(floating) - len(with_weights)}


def _accounts(model: nn.Module, student: nn.Module, said: _Said, in_float: Iterable[str] = ()) -> dict[str, Any]:
    """Layers with weights: how many are quantized, why others are not, and which of them nothing names.

    Args:
        model: the float network.
        student: the prepared one.
        said: what was said meanwhile.
        in_float: layers of a file that a runtime computes in floating point, by names that begin with the module's.
    """
    layers = [name for name, module in open_attention(model).named_modules() if isinstance(module, _LAYERS)]
    adapter = adapter_for(student)
    prefix = adapter.wrapper_prefix(student)
    quantized = {
        name.removeprefix(prefix) for q in adapter.quantizers(student) if q.role == "weight" for name in q.layers or (q.fqn,)
    }
    quantized -= {name.partition("/")[0] for name in in_float}
    floating = {name: said.reason(name) for name in layers if name not in quantized}
    return {
        "layers": len(layers),
        "quantized": len(layers) - len(floating),
        "floating": {name: reason[:300] for name, reason in floating.items() if reason is not None},
        "unnamed": [name for name, reason in floating.items() if reason is None],
    }


class _Attempts:
    """Runs steps, and keeps what went wrong and how long they took.

    Args:
        folder: of what they write; another in each run, so that reasons leave it out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[dict[str, Any]] = []
        self.times: dict[str, float] = {}

    @property
    def first(self) -> dict[str, Any] | None:
        return self.problems[0] if self.problems else None

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        """The result of a step; None where it fails."""
        start = time.perf_counter()
        try:
            return step()
        except Exception as error:  # whatever a toolkit raises: that it is not one of the package's own is what is recorded  # noqa: BLE001
            own = isinstance(error, QakdError)
            kind = "" if own else f"{type(error).__name__}: "
            message = kind + " ".join(str(error).replace(f"{self.folder}{os.sep}", "").split())
            self.problems.append({"step": name, "own": own, "message": message[: 1000 if own else 400]})
            return None
        finally:
            self.times[name] = round(time.perf_counter() - start, 1)


# -- tables


def _line(cell: dict[str, Any]) -> str:
    if problem := cell["problem"]:
        return f"{'REFUSED' if problem['own'] else 'RAW'} at {problem['step']}: {problem['message']}{_times(cell)}"
    if cell.get("same"):
        return "nothing is made with zeros"
    unnamed = f", UNNAMED {cell['unnamed'][:3]}" if cell["unnamed"] else ""
    return f"passes, {cell['quantized']} of {cell['layers']} layers quantized{unnamed}{_times(cell)}"


def _times(cell: dict[str, Any]) -> str:
    return "".join(f", {step} {seconds:.0f} s" for step, seconds in cell.get("times", {}).items())


def passes(cell: dict[str, Any]) -> bool:
    """Whether every step did, and every layer is quantized or named."""
    return not cell["problem"] and not cell.get("unnamed")


def make_summary(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per library and way, how many networks pass whole, are refused by name, or fail."""
    rows = []
    for library, title in (
        ("timm", "timm, one of each family"),
        ("torchvision", "torchvision"),
        ("transformers", "Hugging Face"),
    ):
        for way in CELLS:
            nets = [net for net in NETS if net.library == library and (net.family or library != "timm")]
            found = [cells[way.key(net)] for net in nets if way.key(net) in cells]
            found = [cell for cell in found if not cell.get("same")]
            if not found:
                continue
            good = sum(map(passes, found))
            refused = sum(bool(cell["problem"]) and all(p["own"] for p in _problems(cell)) for cell in found)
            label = f"{way.toolkit}, W{way.bits}A{way.bits}" + (", with the zeros it is made with" if way.made else "")
            share = f"{good} of {len(found)} ({100 * good / len(found):.0f} %)"
            rows.append([title, label, share, str(refused), str(len(found) - good - refused)])
    header = ["networks", "prepared by", "pass whole", "refused, by name", "fail otherwise"]
    return page_tables.markdown(header, rows)


def make_table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per network; values of ModelOpt and PT2E, and of both bit widths, where they differ."""
    rows, notes = [], _Notes()
    for net in NETS:
        found = [cells[way.key(net)] for way in CELLS if not way.made and way.key(net) in cells]
        if not found:
            continue
        whole = all(map(passes, found))
        rows.append([
            _title(net),
            f"{net.size}",
            "all" if whole else f"{sum(map(passes, found))} of {len(found)}",
            _joined(_share(cell, "quantized", "layers") for cell in found),
            _joined(_share(cell.get("onnxruntime", {}), "integer", "total") for cell in found),
            _joined(_in_plan(cell.get("tensorrt", {})) for cell in found),
            _remarks(found, notes),
        ])  # fmt: skip
    header = ["network", "input", "cells that pass", "layers quantized", "integer in ONNX Runtime", "integer in TensorRT-RTX"]
    return page_tables.markdown([*header, "in float, or refused"], rows) + "".join(f"\n\n{note}" for note in notes.lines())


class _Notes:
    """Numbered texts under a table."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def number(self, text: str) -> str:
        return f"({self.texts.setdefault(text, len(self.texts) + 1)})"

    def lines(self) -> Iterable[str]:
        return (f"({number}) {text}" for text, number in self.texts.items())


def _title(net: Net) -> str:
    smaller = "".join(f", {name}={value}" for name, value in net.options.items() if name != "img_size")
    where = {"timm": net.family or "timm", "transformers": "Hugging Face", "torchvision": ""}[net.library]
    return net.name + smaller + (f" ({where})" if where else "")


def _problems(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return cell.get("problems") or ([cell["problem"]] if cell["problem"] else [])


def _share(found: dict[str, Any], part: str, whole: str) -> str:
    return f"{found[part]} of {found[whole]}" if whole in found else "none"


def _in_plan(found: dict[str, Any]) -> str:
    if not found.get("engine"):
        return "none"
    kinds = [found["engine_convolutions"], found["engine_matmuls"]]
    if "unknown" in kinds:
        return "built, plan not readable"
    return f"{sum(kind['int8'] for kind in kinds)} of {sum(kind['total'] for kind in kinds)}"


def _remarks(found: list[dict[str, Any]], notes: _Notes) -> str:
    remarks = []
    for cell in found:
        for problem in _problems(cell):
            remarks.append(f"{problem['step']}: {notes.number('`' + problem['message'] + '`')}")
        if cell.get("unnamed"):
            remarks.append(f"not named: {', '.join(cell['unnamed'][:3])}")
        kinds = Counter(cell.get("floating", {}).values())
        remarks += [f"{count} layers {notes.number('`' + _without_names(reason) + '`')}" for reason, count in kinds.items()]
        plan = cell.get("tensorrt", {})
        if plan.get("engine_float_weights"):
            remarks.append(f"{len(plan['engine_float_weights'])} layers with weights in the plan")
        if plan.get("engine_float_products"):
            remarks.append(f"{plan['engine_float_products']} products of activations")
    return "; ".join(dict.fromkeys(remarks)) or "nothing"


def _without_names(reason: str) -> str:
    """A reason without the layers that it lists, so that networks share it."""
    return re.sub(r"\b\w+(\.\w+)+(, \w+(\.\w+)*)*", "...", reason)


def _joined(values: Iterable[str]) -> str:
    """Values of all cells; one where they are the same."""
    return " / ".join(dict.fromkeys(values))


def _all_keys() -> list[str]:
    return [cell.key(net) for net in NETS for cell in CELLS]


if __name__ == "__main__":
    main()
