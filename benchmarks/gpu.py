"""All that needs a GPU, in one script of at most nine minutes, for a machine that is lent for a quarter of an hour.

    python benchmarks/gpu.py --collect wheels                      # with a network: what the other machine lacks, and images
    python3 benchmarks/gpu.py --wheels wheels --out runs/gpu       # there: no network is needed
    python benchmarks/gpu.py --device cpu --dry --out runs/gpu     # here: every stage, on tiny sizes

The other machine has Python 3.12, torch 2.11 or later, and what THERE lists; what else the package imports is collected as
wheels, for x86-64, beside the images of Fashion-MNIST (--data), and the package itself runs from this folder's parent.

Stages stand in the order of their worth. Each is a process of its own with a limit of its own, whatever it started ends with
it, and ``gpu.json`` is written anew as each ends, so that a run that is cut leaves what it found:

1. tests: the tests marked ``cuda``, which no machine without a GPU can run;
2. steps: what a step costs, ours and one written by hand, and how often the host waits for the GPU (distill_step.py);
3. kernels: the same steps with compiled quantizers;
4. evidence: students on Fashion-MNIST, as far as the time goes (fashion_study.py --brief);
5. augmentation: what each augmentation costs (augmentation_cost.py);
6. scale: what an ImageNet run and a large language model would cost there (scale.py);
7. engines: what runtimes are there, and what TensorRT says (engines.py);
8. suite: the tests of training, which train on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing but the standard library: the wheels are not there yet when this begins.

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0
"""Seconds for all stages."""
LARGEST = 56 * 2**20
"""Bytes of all wheels and images together: what may be carried, less this repository."""
IMAGES = "fashion-mnist"
"""Folder of Fashion-MNIST, beside the wheels."""
DEBIAN = Path("/usr/share/datasets") / IMAGES
"""Where Debian's package dataset-fashion-mnist has it."""
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
WHEELS = (
    "nvidia-modelopt", "omegaconf", "pulp<4", "torchao", "pydantic", "pydantic-core", "typing-inspection", "annotated-types",
    "typing-extensions", "filelock", "jsonargparse", "docstring-parser",
)  # fmt: skip
"""With their dependencies that the other machine lacks; versions are those of constraints.txt, as far as it names them."""
THERE = (
    "torch", "torchvision", "numpy", "accelerate", "torchmetrics", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "ml-dtypes",
    "rich", "psutil", "jinja2", "scipy", "safetensors", "pillow", "requests", "huggingface-hub", "transformers", "timm",
    "scikit-learn", "matplotlib", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "setuptools", "packaging", "tqdm",
    "regex", "pyyaml", "ninja", "nvidia-ml-py",
)  # fmt: skip
"""What is not collected, because the other machine has it."""
TAIL = 4000
"""Characters of a stage's output that are kept in gpu.json; the whole is in its log."""


_PATIENCE = 5
"""Limits of stages are for the machine with the GPU; a CPU takes so many times as long, for what is tiny."""


@dataclass(frozen=True)
class Run:
    """What stages are told.

    Attributes:
        device: "cuda" or "cpu".
        dry: tiny sizes.
        folder: a new one, for the files of the stages.
        seconds: that are left for the stage, at most.
        data: folder of Fashion-MNIST.
    """

    device: str
    dry: bool
    folder: Path
    seconds: float
    data: Path


@dataclass(frozen=True)
class Stage:
    """One part of the run.

    Attributes:
        name: of it.
        seconds: after which it is ended.
        commands: for it, one after the other; each begins with this Python's path.
        results: what it left, from its folder; may be called when it was cut.
    """

    name: str
    seconds: float
    commands: Callable[[Run], Sequence[Sequence[str]]]
    results: Callable[[Run], Any]


def _python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _script(name: str, *arguments: object) -> list[str]:
    return _python(ROOT / "benchmarks" / name, *arguments)


def _tests(run: Run) -> list[list[str]]:
    if run.dry:
        chosen = ["tests/training/test_devices.py", "-k", "float64 or counting"]
    else:
        files = ("training/test_devices.py", "quantizers/test_compiled.py", "training/test_networks.py")
        chosen = [*(f"tests/{name}" for name in files), "-m", "cuda or not cuda"]
    return [_pytest(run, *chosen)]


def _suite(run: Run) -> list[list[str]]:
    if run.dry:
        return [_pytest(run, "tests/training/test_networks.py")]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    folders = ("tests/quantizers", "tests/training", "tests/preparation", "tests/integrations", "tests/augment")
    return [_pytest(run, *folders, "-n", workers, "--dist", "worksteal")]


def _pytest(run: Run, *arguments: object) -> list[str]:
    return _python("-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={run.folder}/tests.xml", *arguments)


_COMPILED = ("by hand: torch.ao FX, KL", "SQAKD, LSQ", "SQAKD, LSQ, compiled", "SQAKD, LSQ, bf16, channels_last, compiled")
"""Last, because compiling takes minutes."""


def _scale(run: Run) -> list[list[str]]:
    size = ("--tiny", "--rounds", 1) if run.dry else ("--rounds", 10)
    return [_script("scale.py", "--device", run.device, *size, "--out", run.folder / "scale.json")]


def _steps(run: Run) -> list[list[str]]:
    def measured(batch: int, rounds: int, *others: object) -> list[str]:
        out = run.folder / f"steps-{batch}.json"
        common = ("--device", run.device, "--seeds", 0, "--no-memory", "--batch", batch, "--rounds", rounds, "--out", out)
        return _script("distill_step.py", *common, *others)

    if run.dry:
        return [measured(2, 1, "--threads", 1, "--variant", "SQAKD, LSQ", "--loop", 2)]
    compiled = [part for name in _COMPILED for part in ("--variant", name)]
    return [measured(128, 30, "--loop", 60), measured(1024, 10, "--loop", 20), measured(256, 20, *compiled)]


_KERNELS = ("SQAKD, LSQ", "SQAKD, LSQ, bf16, channels_last")


def _kernels(run: Run) -> list[list[str]]:
    names = [name + ending for name in _KERNELS for ending in ("", ", compiled quantizers")]
    size = ("--batch", 2, "--rounds", 1, "--threads", 1) if run.dry else ("--batch", 1024, "--rounds", 20)
    chosen = [part for name in names for part in ("--variant", name)]
    common = ("--device", run.device, "--seeds", 0, "--no-memory", "--out", run.folder / "kernels.json")
    return [_script("distill_step.py", *common, *size, *chosen)]


def _evidence(run: Run) -> list[list[str]]:
    out = ("--data", run.data, "--device", run.device, "--cells", run.folder, "--out", run.folder / "fashion.json")
    if run.dry:
        return [_script("fashion_study.py", "--tiny", "--teacher-seconds", 1, *out)]
    processes = max(1, min(6, (os.cpu_count() or 2) - 2))
    minutes = max(0.1, run.seconds / 60 - 1)  # a student that has begun is finished
    bounds = ("--teacher-seconds", run.seconds / 7, "--processes", processes, "--minutes", minutes)
    return [_script("fashion_study.py", "--brief", *bounds, *out)]


def _augmentation(run: Run) -> list[list[str]]:
    size = ("--batch", 2, "--rounds", 1) if run.dry else ("--rounds", 12)
    return [_script("augmentation_cost.py", "--device", run.device, *size, "--out", run.folder / "augmentation.json")]


_RUNTIMES = """
import json, pathlib, sys
import onnxruntime
from qakd_plugin.deploy.engine.bindings import RUNTIMES, gpu_capability, load_runtime
from qakd_plugin.errors import QakdError

found = {"gpu": gpu_capability(), "onnxruntime": [onnxruntime.__version__, *onnxruntime.get_available_providers()]}
for name in RUNTIMES:
    try:
        found[name] = load_runtime(name).version
    except QakdError as problem:
        found[name] = str(problem)
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
"""


def _engines(run: Run) -> list[list[str]]:
    there = _python("-c", _RUNTIMES, run.folder / "runtimes.json")
    networks = [part for name in ("resnet20", "resnet50") for part in ("--network", name)]
    out = run.folder / "engines.json"
    return [there] if run.dry else [there, _script("engines.py", "--gpu", *networks, "--out", out)]


def _json_files(run: Run) -> dict[str, Any]:
    """Every JSON file in the folder of a stage, by its path there."""
    found = {}
    for path in sorted(run.folder.rglob("*.json")):
        try:
            found[str(path.relative_to(run.folder))] = json.loads(path.read_text())
        except ValueError as problem:  # cut while it was written
            found[str(path.relative_to(run.folder))] = f"unreadable: {problem}"
    return found


def _outcomes(run: Run) -> dict[str, Any] | None:
    """Of each test, and the first line of why it failed; None where the tests did not come to their end."""
    path = run.folder / "tests.xml"
    if not path.is_file():
        return None
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next((child for kind in ("failure", "error") if (child := case.find(kind)) is not None), None)
        skipped = case.find("skipped")
        if problem is not None:
            found["failed"][name] = (problem.get("message") or problem.text or "")[:500]
        elif skipped is not None:
            found["skipped"][name] = skipped.get("message")
        else:
            found["passed"] += 1
    return found


STAGES = (
    Stage("tests", 110, _tests, _outcomes),
    Stage("steps", 170, _steps, _json_files),
    Stage("kernels", 60, _kernels, _json_files),
    Stage("evidence", 150, _evidence, _json_files),
    Stage("augmentation", 40, _augmentation, _json_files),
    Stage("scale", 60, _scale, _json_files),
    Stage("engines", 60, _engines, _json_files),
    Stage("suite", 180, _suite, _outcomes),
)


def carry_out(
    stages: Sequence[Stage], out: Path, *, device: str, dry: bool, budget: float, data: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Run the stages one after the other, and write ``gpu.json`` as each ends.

    Args:
        stages: in the order of their worth.
        out: folder of gpu.json and the logs.
        device: that they are told.
        dry: whether sizes are tiny.
        data: folder of Fashion-MNIST.
        budget: seconds for all; a stage for which nothing is left is written down as left out.
        environment: of their processes.

    Returns:
        What gpu.json holds: of every stage how it ended, its seconds, the end of its output, and its results.
    """
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + budget
    document: dict[str, Any] = {"device": device, "dry": dry, "budget": budget, "stages": {}}
    for stage in stages:
        left = until - time.monotonic()
        if left < 1:
            document["stages"][stage.name] = {"ended": "left out: no time was left"}
        else:
            with tempfile.TemporaryDirectory(prefix="qakd-gpu-", ignore_cleanup_errors=True) as folder:
                seconds = stage.seconds * (_PATIENCE if device == "cpu" else 1)
                run = Run(device, dry, Path(folder), min(seconds, left), data)
                document["stages"][stage.name] = _stage(stage, run, out / f"{stage.name}.log", environment)
        _write(out / "gpu.json", document)
        print(f"{stage.name}: {document['stages'][stage.name]['ended']}", flush=True)
    return document


def _stage(stage: Stage, run: Run, log: Path, environment: dict[str, str]) -> dict[str, Any]:
    started = time.monotonic()
    ended = "well"
    with log.open("wb") as output:
        for command in stage.commands(run):
            left = run.seconds - (time.monotonic() - started)
            ended = run_within(command, left, output, environment)
            if ended.startswith("cut"):
                break
    text = log.read_text(errors="replace")
    found = {"ended": ended, "seconds": round(time.monotonic() - started, 1), "output": text[-TAIL:]}
    try:
        return found | {"results": stage.results(run)}
    except (OSError, ElementTree.ParseError) as problem:  # of a stage that was cut
        return found | {"results": None, "problem": str(problem)}


def run_within(command: Sequence[str], seconds: float, output: Any, environment: dict[str, str]) -> str:
    """Run a command, and end it with all that it started after so long.

    Returns:
        How it ended: "well", "with code 1", "cut after 9 s".
    """
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return f"cut after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that are left, too
        process.wait()
    return "well" if code == 0 else f"with code {code}"


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def collect(folder: Path, data: Path) -> int:
    """Download the wheels for the other machine, and lay the images of ``data`` beside them. Their size in bytes.

    Raises:
        SystemExit: they are too large to be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    wanted += [part for platform in PLATFORMS for part in ("--platform", platform)]
    wanted += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder)]
    subprocess.run([*_python("-m", "pip", "download", "--quiet", *wanted), *WHEELS], check=True)
    if data.is_dir():
        shutil.copytree(data, folder / IMAGES, dirs_exist_ok=True)
    else:
        print(f"No Fashion-MNIST in {data}: its stage will end at once. apt-get install dataset-fashion-mnist, or --data DIR.")
    carried = [*folder.glob("*.whl"), *(folder / IMAGES).glob("*")]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(carried)}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB of at most {LARGEST / 2**20:.0f}")
    if total > LARGEST:
        raise SystemExit("too large to be carried: take a wheel out of WHEELS, or a smaller version of one")
    return total


def install(wheels: Path, site: Path) -> None:
    """Unpack wheels into a folder for PYTHONPATH."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"{wheels} holds no wheel: make it with python benchmarks/gpu.py --collect {wheels}")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    subprocess.run([*_python("-m", "pip", "install", *flags), *files], check=True)


def environment_for(device: str, site: Path | None) -> dict[str, str]:
    """Of the stages' processes: wheels first, then this folder; no GPU is seen where the device is the CPU."""
    paths = [*([] if site is None else [site]), ROOT, ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # or cuBLAS refuses to be deterministic
        "HF_HUB_OFFLINE": "1",
    }
    return found if device == "cuda" else found | {"CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    """Collect wheels, or run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="download what the other machine lacks, and end")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="unpack these first")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST; by default beside the wheels, else Debian's")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and the logs (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: whether every stage runs")
    parser.add_argument("--stages", help=f"of {','.join(stage.name for stage in STAGES)}; all by default")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages (%(default)s)")
    options = parser.parse_args()
    carried = None if options.wheels is None else options.wheels / IMAGES
    data = options.data or (carried if carried is not None and carried.is_dir() else DEBIAN)
    if options.collect is not None:
        collect(options.collect, data)
        return
    names = [stage.name for stage in STAGES]
    wanted = names if options.stages is None else options.stages.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--stages: {', '.join(unknown)} is none of {', '.join(names)}")
    stages = [stage for stage in STAGES if stage.name in wanted]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qakd-site-") as folder:
        site = None
        if options.wheels is not None:
            site = Path(folder)
            install(options.wheels, site)
        left = options.budget - (time.monotonic() - began)
        chosen: dict[str, Any] = {"device": options.device, "dry": options.dry, "budget": left, "data": data.resolve()}
        document = carry_out(stages, options.out, environment=environment_for(options.device, site), **chosen)
    print(options.out / "gpu.json")
    if options.dry and any(found["ended"] != "well" for found in document["stages"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
