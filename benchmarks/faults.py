"""Faults injected: what is tried, and what is lost, which must be nothing.

    python benchmarks/faults.py                          # hours: 200 kills, 2,000 damaged files, 200 failing calls
    python benchmarks/faults.py --kills 20 --mutants 300 --injections 60

- **Kills**: runs of twelve set-ups are killed at random moments (SIGKILL) and started again; they must end with the bits of a
  run that nobody killed.
- **Mutants**: files that cross a process are damaged at random, or crafted with a digest that fits, and read in a child
  process: one error of this package in one line, or the sound content; no other exception, no hang, no signal, less than 4 GiB.
- **Injections**: one call of open, write, fsync, rename, mkdir, chmod or unlink fails with ENOSPC, EIO, EINTR or EACCES while
  something is written: one error in one line, or none; what was there before is whole, and the work can be done again.
- **Threads** write one file together, and want one checkpoint folder together.

Everything is drawn from --seed. Ends with 1 where something was lost.
"""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
import io
import json
import os
import random
import re
import resource
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import corruption

from qakd_plugin import QakdError, distill, prepare, write_report
from qakd_plugin._common.files import write_atomic
from qakd_plugin._common.tensor_file import pack, unpack
from qakd_plugin._common.torch_file import load_plain, tensors_of
from qakd_plugin.report import read_report
from qakd_plugin.training.checkpoint import CheckpointStore
from qakd_plugin.training.distributed.processes import Processes
from qakd_plugin.training.student_file import load, save
from qakd_plugin.training.teacher_cache import TeacherCache

MOST_MEMORY = 4 * 2**30
SECONDS = 60.0
"""A file that takes longer to read hangs; it takes some hundredths, on a machine that does nothing else."""


@dataclass
class Tally:
    """What one part of the trial has tried.

    Attributes:
        part: its name.
        outcomes: how often each came about.
        lost: what must not be, a line each.
    """

    part: str
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def count(self, outcome: str, problem: str | None = None) -> None:
        self.outcomes[outcome if problem is None else "lost"] += 1
        if problem is not None:
            self.lost.append(problem)

    def __str__(self) -> str:
        found = ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.outcomes.items()))
        return f"{self.part}: {sum(self.outcomes.values())} tried: {found}"


# -- kills

_MODELOPT = {"toolkit": "modelopt", "quantizers": "LSQ"}
_PT2E = {"toolkit": "pt2e", "quantizers": "EWGS", "generator": False}
SETUPS: dict[str, dict[str, Any]] = {
    "SQAKD, ModelOpt": {"method": "SQAKD"},
    "QKD, ModelOpt, LSQ": {"method": "QKD", **_MODELOPT},
    "QKD, PT2E": {"method": "QKD", "toolkit": "pt2e", "generator": False},
    "SQAKD, PT2E, EWGS": {"method": "SQAKD", **_PT2E},
    "averages, accumulated gradients, BatchNorm refreshed": {
        "method": "SQAKD",
        **_MODELOPT,
        "options": {"accumulate": 3, "ema": 0.9, "recalibrate_batches": 2},
    },
    "QKD, averages, bf16": {"method": "QKD", **_MODELOPT, "options": {"ema": 0.9, "mixed_precision": "bf16"}},
    "a worker that draws": {"method": "SQAKD", "workers": 1},
    "QKD, a worker that draws": {"method": "QKD", **_MODELOPT, "workers": 1},
    "CMI, chosen anew each epoch": {"method": "SQAKD", "augment": "CMI"},
    "QKD, two processes": {"method": "QKD", **_MODELOPT, "processes": 2},
    "SQAKD, PT2E, two processes": {"method": "SQAKD", **_PT2E, "processes": 2},
    "a worker that draws, two processes": {"method": "SQAKD", "workers": 1, "processes": 2},
}


def kills(count: int, seed: int, folder: Path) -> Tally:
    """Kill runs and start them again, the set-ups in turn."""
    from training_server import STEPS, Server

    tally, server = Tally("kills"), Server()
    shares = [count // len(SETUPS) + (index < count % len(SETUPS)) for index in range(len(SETUPS))]
    try:
        for (name, order), share in zip(SETUPS.items(), shares, strict=True):
            if not share:
                continue
            chance, out = random.Random(f"{seed} {name}"), folder / re.sub(r"\W+", "-", name)
            processes = order.get("processes", 1)
            whole = server.run(out / "whole", folder=str(out / "whole" / "checkpoints"), **order)
            if whole != [0] * processes:
                tally.count("", f"{name}: a run that nobody killed ends with {whole}: {_error(out / 'whole')}")
                continue
            for step in sorted(chance.randrange(STEPS - 1) for _ in range(share)):
                kill = (step, chance.uniform(0, 0.05))
                codes = server.run(out / "killed", folder=str(out / "killed" / "checkpoints"), kill=kill, **order)
                problem = None if set(codes) == {-9} else f"{name}: killed at step {step}, it ends with {codes}"
                tally.count("killed", problem)
            codes = server.run(out / "killed", folder=str(out / "killed" / "checkpoints"), **order)
            tally.count("ended with the same bits", _difference(name, out, codes, processes))
    finally:
        server.close()
    return tally


def _difference(name: str, out: Path, codes: list[int], processes: int) -> str | None:
    """Between the run that was killed and the one that was not."""
    if codes != [0] * processes:
        return f"{name}: it does not go on: {codes}, {_error(out / 'killed')}"
    for rank in range(processes):
        first, second = (torch.load(out / which / f"result-{rank}.pt", weights_only=True) for which in ("whole", "killed"))
        if first["history"] != second["history"]:
            return f"{name}: another history"
        for part in ("student", "teacher", "parameters"):
            if any(not torch.equal(value, second[part][key]) for key, value in first[part].items()):
                return f"{name}: other bits of {part}"
    left = [path.name for path in (out / "killed" / "checkpoints").iterdir() if path.name.startswith(".")]
    return f"{name}: {left} are left" if left else None


def _error(out: Path) -> str:
    return "; ".join(path.read_text()[-300:] for path in sorted(out.glob("error-*.txt")))


# -- mutants


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRAINING = [{"name": "SQAKD", "history": [{"epoch": 0, "loss": 0.5, "accuracy": 0.9}]}]
FINGERPRINT = {"method": "SQAKD()", "parameters": ["weight (3, 4)"]}


def _student() -> nn.Module:
    return prepare(_net().eval(), [IMAGES], "torch_ao")


def _checkpoint(path: Path) -> bytes:
    state = {"student": _net().state_dict(), "position": {"epoch": 1, "sums": {"loss": 0.5}}, "history": [{"epoch": 0}]}
    return CheckpointStore(path.parent, FINGERPRINT).save(1, state).read_bytes()


def _cache(path: Path) -> bytes:
    teacher = nn.Flatten()
    with torch.no_grad():
        TeacherCache(path, teacher, "no").fill(IMAGES.split(4), lambda x: {"logits": x.flatten(1)}, Processes())
    return path.read_bytes()


def _old_cache(path: Path) -> bytes:
    tensors, facts = unpack(_cache(path))
    buffer = io.BytesIO()
    torch.save({"teacher": facts["teacher"], "samples": tensors["samples"], "logits": tensors["outputs.logits"]}, buffer)
    return buffer.getvalue()


def _old_student(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": _student().state_dict(), "quantizers": {}}, buffer)
    return buffer.getvalue()


def _report(path: Path) -> bytes:
    write_report([], path.with_suffix(".html"), training=TRAINING)
    return path.with_suffix(".json").read_bytes()


def _network_file(path: Path) -> bytes:
    from qdq_graphs import residual_net

    return residual_net(path).read_bytes()


def _read_checkpoint(path: Path) -> Any:
    found = CheckpointStore(path.parent, FINGERPRINT).load()
    return None if found is None else found[1]


def _read_student(path: Path) -> Any:
    if "student" not in _KNOWN:
        _KNOWN["student"] = _student()
    load(path, _KNOWN["student"])
    return _KNOWN["student"].state_dict()


def _read_cache(path: Path) -> Any:
    cache = TeacherCache(path, nn.Flatten(), "no")
    return cache.find(IMAGES), len(cache)


def _read_network(path: Path) -> Any:
    from qakd_plugin.bench.file_facts import batch_limits, float_type, input_sizes, quantized_bits
    from qakd_plugin.deploy.engine.precheck import inspect_onnx

    inspect_onnx(path)
    for fact in (input_sizes, batch_limits, quantized_bits, float_type):
        fact(path)
    return None


def _run_network(path: Path) -> Any:
    from qakd_plugin.runtimes.onnxruntime import OnnxRuntimeRunner

    OnnxRuntimeRunner(path, 1)


_KNOWN: dict[str, Any] = {}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of its file.
        make: writes a sound one in its folder and gives its bytes.
        read: as the package does; gives what must not change unnoticed, or None where the format has no digest.
        damages: of it.
        crafted: whether damages come with a digest that fits: then other content may be read.
    """

    name: str
    make: Callable[[Path], bytes]
    read: Callable[[Path], Any]
    damages: tuple[corruption.Damage, ...] = corruption.BYTES
    crafted: bool = False


def _renamed(data: bytes) -> str:
    return f"step-000000001-{hashlib.sha256(data).hexdigest()[:16]}.pt"


def torch_file_changed(data: bytes, chance: random.Random) -> bytes:
    """A file of ``torch.save`` with one place taken away, or with something strange in it."""
    content = load_plain(data)
    places = list(_places(content))
    container, key = chance.choice(places)
    strange = (
        None,
        "text",
        [],
        {},
        -1,
        2**70,
        float("nan"),
        torch.zeros(0),
        torch.zeros(1).expand(10**9),
        [[[]]],
        b"bytes",
        True,
    )
    if isinstance(container, dict) and chance.random() < 0.3:
        del container[key]
    else:
        container[key] = chance.choice(strange)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tensor_file_changed(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file of ours with another fact or another tensor, and a digest that fits."""
    tensors, facts = unpack(data)
    if chance.random() < 0.5:
        name, other = chance.choice(sorted(facts)), facts[chance.choice(sorted(facts))]
        facts[name] = chance.choice(("", "7", "[]", "{}", "[[1]]", '{"a": 1}', "x" * 10_000, "[" * 5000, other))
    else:
        name = chance.choice(sorted(tensors))
        rows = tensors.pop(name)
        if chance.random() < 0.7:
            kinds = (torch.zeros(0), torch.tensor(1.0), rows[:1].clone() if rows.ndim else rows, rows.to(torch.bfloat16))
            tensors[chance.choice((name, "another"))] = chance.choice(kinds)
    return pack(tensors, facts)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dict and list in plain data, with each key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


KINDS: dict[str, Kind] = {
    "checkpoint": Kind("step", _checkpoint, _read_checkpoint),
    "checkpoint, crafted": Kind("step", _checkpoint, _read_checkpoint, (*corruption.BYTES, *[torch_file_changed] * 9), True),
    "student": Kind("student.safetensors", lambda path: save(_student(), path).read_bytes(), _read_student),
    "student, crafted": Kind(
        "student.safetensors",
        lambda path: save(_student(), path).read_bytes(),
        _read_student,
        (tensor_file_changed,),
        True,
    ),
    "student.pt": Kind("student.pt", _old_student, _read_student),
    "student.pt, crafted": Kind("student.pt", _old_student, _read_student, (torch_file_changed,), True),
    "teacher cache": Kind("cache", _cache, _read_cache),
    "teacher cache, crafted": Kind("cache", _cache, _read_cache, (tensor_file_changed,), True),
    "teacher cache, version 1": Kind("cache.pt", _old_cache, _read_cache),
    "teacher cache, version 1, crafted": Kind("cache.pt", _old_cache, _read_cache, (torch_file_changed,), True),
    "report.json": Kind("report.json", _report, read_report, corruption.JSON, True),
    "ONNX": Kind("net.onnx", _network_file, _read_network, corruption.ONNX, True),
    "ONNX in ONNX Runtime": Kind("net.onnx", _network_file, _run_network, corruption.ONNX, True),
}


def digest_of(content: Any) -> str:
    """Of plain data and tensors."""
    digest = hashlib.sha256()
    for tensor in tensors_of(content):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    digest.update(re.sub(r"tensor\(.*?\)", "", repr(content), flags=re.DOTALL).encode())
    return digest.hexdigest()


def read_mutant(order: Path) -> None:
    """Read the file that an order names, as the package would; raise where that is wrong. In a child process."""
    asked = json.loads(order.read_text())
    kind, path = KINDS[asked["kind"]], Path(asked["path"])
    try:
        content = kind.read(path)
    finally:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if memory > MOST_MEMORY:
            raise MemoryError(f"{memory >> 20} MiB")
    if not kind.crafted and digest_of(content) != asked["digest"]:
        raise AssertionError("other content was read")


def mutants(count: int, seed: int, folder: Path, kinds: tuple[str, ...] = tuple(KINDS), isolated: bool = True) -> Tally:
    """Damage files and read them, the kinds in turn.

    Args:
        count: of damaged files.
        seed: of the damage.
        folder: for files.
        kinds: of them.
        isolated: read in a child process, which may crash or hang.
    """
    tally = Tally("mutants")
    sound: dict[str, tuple[bytes, str]] = {}
    for number, name in enumerate(kinds):
        own = folder / f"sound-{number}"
        own.mkdir(parents=True)
        data = KINDS[name].make(own / KINDS[name].name)
        path = _put(own, KINDS[name], data)
        sound[name] = data, "" if KINDS[name].crafted else digest_of(KINDS[name].read(path))
    reader = corruption.Reader(read_mutant, SECONDS) if isolated else _read_here
    try:
        for number in range(count):
            name = kinds[number % len(kinds)]
            chance, (data, digest) = random.Random(f"{seed} {number}"), sound[name]
            damage = chance.choice(KINDS[name].damages)
            own = folder / f"mutant-{number}"
            own.mkdir()
            damaged = damage(data, chance)
            path = _put(own, KINDS[name], damaged, None if KINDS[name].crafted else data)
            (own / "order.json").write_text(json.dumps({"kind": name, "path": str(path), "digest": digest}))
            classes, message = reader(own / "order.json")
            outcome = "read as the sound file" if damaged == data or not KINDS[name].crafted else "read"
            if not classes:
                tally.count(outcome)
            elif "QakdError" not in classes.split():
                tally.count("", f"{name}, {damage.__name__}, {number}: {classes.split()[0]}: {message[:300]}")
            elif "\n" in message:
                tally.count("", f"{name}, {damage.__name__}, {number}: several lines: {message[:300]!r}")
            else:
                tally.count("refused in one line")
    finally:
        if isinstance(reader, corruption.Reader):
            reader.close()
    return tally


def _put(folder: Path, kind: Kind, data: bytes, named: bytes | None = None) -> Path:
    """Write a file under its name; that of a checkpoint holds a digest, of ``named`` where that is another."""
    path = folder / (_renamed(named or data) if kind.name == "step" else kind.name)
    path.write_bytes(data)
    return path


def _read_here(order: Path) -> tuple[str, str]:
    try:
        read_mutant(order)
    except Exception as error:  # noqa: BLE001 - what it is, is the caller's business
        return " ".join(base.__name__ for base in type(error).__mro__), str(error)
    return "", ""


# -- injections

CALLS = ("open", "write", "fsync", "replace", "mkdir", "chmod", "unlink")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EACCES)


class Disk:
    """Lets one call of the operating system fail, of those about files below a folder.

    Args:
        folder: where.
        call: one of ``CALLS``; None counts them only.
        number: of the call that fails, from 0.
        error: its errno.
        lasting: all later ones fail too, as on a full disk.
    """

    def __init__(
        self, folder: Path, call: str | None = None, number: int = 0, error: int = errno.EIO, lasting: bool = False
    ) -> None:
        self.folder, self.call, self.number, self.error, self.lasting = str(folder), call, number, error, lasting
        self.calls: Counter[str] = Counter()

    def reach(self, call: str, path: Any) -> None:
        if not isinstance(path, int) and not os.fspath(path).startswith(self.folder):
            return
        number, self.calls[call] = self.calls[call], self.calls[call] + 1
        if call == self.call and (number == self.number or (self.lasting and number > self.number)):
            raise OSError(self.error, os.strerror(self.error), None if isinstance(path, int) else os.fspath(path))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Within the block."""
        kept = {call: getattr(os, call) for call in CALLS if call != "write"}
        whole = Path.write_bytes

        def patched(call: str) -> Callable[..., Any]:
            def called(path: Any, *args: Any, **options: Any) -> Any:
                self.reach(call, path)
                return kept[call](path, *args, **options)

            return called

        def write_bytes(path: Path, content: bytes) -> int:
            """A write that fails has written some of it, and its error names no file."""
            try:
                self.reach("write", path)
            except OSError as problem:
                whole(path, bytes(content)[: len(content) // 2])
                raise OSError(problem.errno, problem.strerror) from problem
            return whole(path, content)

        for call in kept:
            setattr(os, call, patched(call))
        Path.write_bytes = write_bytes  # type: ignore[method-assign]
        try:
            yield
        finally:
            Path.write_bytes = whole  # type: ignore[method-assign]
            for call, function in kept.items():
                setattr(os, call, function)


@dataclass(frozen=True)
class Work:
    """Something that writes files.

    Attributes:
        do: it, in a folder; the same call does it again after a failure. Gives what it leaves.
        before: what is in the folder before it.
    """

    do: Callable[[Path], Any]
    before: Callable[[Path], object] = Path.mkdir


def _works() -> dict[str, Work]:
    prepared, teacher = _student(), _net().eval()
    batches = [(IMAGES[:4], None), (IMAGES[4:], None)]

    def train(folder: Path) -> Any:
        result = distill(
            copy.deepcopy(prepared), teacher, [x for x, _ in batches], epochs=2, seed=0, trackers=(), checkpoint_every=1,
            checkpoint_dir=folder / "run", resume=True, cache_teacher=folder / "cache",
        )  # fmt: skip
        return dict(result.model.state_dict())

    def write(folder: Path) -> Any:
        return load_plain(_as_bytes(unpack(save(prepared, folder / "student.safetensors").read_bytes())[0]))

    def report(folder: Path) -> Any:
        write_report([], folder / "report.html", training=TRAINING)
        return {key: value for key, value in read_report(folder / "report.json").items() if key in {"training", "rows"}}

    return {"training": Work(train), "student": Work(write), "report": Work(report)}


def _as_bytes(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def injections(count: int, seed: int, folder: Path, only: tuple[str, ...] = ()) -> Tally:
    """Let calls fail while something is written, the works in turn.

    Args:
        count: of failing calls.
        seed: of which.
        folder: for files.
        only: works; all by default.
    """
    tally = Tally("injections")
    works = {name: work for name, work in _works().items() if not only or name in only}
    whole, calls = dict[str, str](), dict[str, Counter[str]]()
    for name, work in works.items():
        own, disk = folder / f"whole-{name}", Disk(folder / f"whole-{name}")
        work.before(own)
        with disk.failing():
            whole[name] = digest_of(work.do(own))
        calls[name] = disk.calls
    for number in range(count):
        name = list(works)[number % len(works)]
        chance, own = random.Random(f"{seed} {number}"), folder / f"{name}-{number}"
        call = chance.choice([call for call in CALLS if calls[name][call]])
        disk = Disk(own, call, chance.randrange(calls[name][call]), chance.choice(ERRORS), chance.random() < 0.5)
        works[name].before(own)
        what = f"{name}: {call} number {disk.number}{' and later' if disk.lasting else ''}: {errno.errorcode[disk.error]}"
        outcome = "went on"
        try:
            with disk.failing():
                works[name].do(own)
        except QakdError as error:
            outcome = "one error"
            if "\n" in str(error):
                tally.count("", f"{what}: several lines: {error}")
                continue
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            tally.count("", f"{what}: {type(error).__name__}: {error}: {traceback.extract_tb(error.__traceback__)[-1]}")
            continue
        tally.count(outcome, _redone(what, works[name], own, whole[name]))
    return tally


def _redone(what: str, work: Work, folder: Path, whole: str) -> str | None:
    """Do it again, on a disk that works: with the same result, and nothing is left over."""
    try:
        found = digest_of(work.do(folder))
    except Exception as error:  # noqa: BLE001 - as above
        return f"{what}: it cannot be done again: {type(error).__name__}: {error}"
    return None if found == whole else f"{what}: done again, it has another result"


# -- threads


def threads(count: int, folder: Path) -> Tally:
    """Threads that write one file, and threads that want one folder of checkpoints."""
    tally = Tally("threads")
    folder.mkdir(parents=True, exist_ok=True)
    path, start, problems = folder / "file", threading.Barrier(count), list[str]()

    def write(index: int) -> None:
        start.wait()
        for _ in range(50):
            write_atomic(path, bytes([index]) * 5000)
            data = path.read_bytes()
            if len(data) != 5000 or len(set(data)) != 1:
                problems.append(f"a file of {len(data)} bytes of {len(set(data))} writers was read")

    _together(write, count)
    for _ in range(50 * count):
        tally.count("written and read whole")
    stores = [CheckpointStore(folder / "run", {}) for _ in range(count)]
    held = list[int]()

    def take(index: int) -> None:
        start.wait()
        try:
            stores[index].lock()
            held.append(index)
        except QakdError:
            tally.count("refused, the folder is another's")

    _together(take, count)
    tally.count("took the folder", None if len(held) == 1 else f"{len(held)} of {count} took one folder")
    for index in held:
        stores[index].unlock()
    for problem in problems:
        tally.count("", problem)
    if left := [found.name for found in folder.iterdir() if found.name.startswith(".")]:
        tally.count("", f"{left} are left")
    return tally


def _together(work: Callable[[int], None], count: int) -> None:
    running = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--injections", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lost = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        parts: dict[str, Callable[[], Tally]] = {
            "threads": lambda: threads(options.threads, folder / "threads"),
            "injections": lambda: injections(options.injections, options.seed, folder / "injections"),
            "mutants": lambda: mutants(options.mutants, options.seed, folder / "mutants"),
            "kills": lambda: kills(options.kills, options.seed, folder / "kills"),
        }
        for name, part in parts.items():
            if not getattr(options, name):
                continue
            (folder / name).mkdir()
            started = time.monotonic()
            tally = part()
            print(f"{tally} ({time.monotonic() - started:.0f} s)", flush=True)
            for problem in tally.lost:
                print(f"  lost: {problem}", flush=True)
            lost += len(tally.lost)
    print("nothing lost" if not lost else f"{lost} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
