"""Faults injected: what is tried, and what is lost, which must be nothing.

    python benchmarks/faults.py                          # 200 kills, 2,000 damaged files, 200 failing calls: about an hour
    python benchmarks/faults.py --record faults.jsonl    # the same, and what was done counts when it is started again
    python benchmarks/faults.py --kills 20 --mutants 300 --injections 60

- **Kills**: runs of twelve set-ups are killed at random moments (SIGKILL) and started again; they must end with the bits of a
  run that nobody killed.
- **Mutants**: files that cross a process (``mutants.py``) are damaged at random, or crafted with a digest that fits, and read
  in a child process: one error of this package in one line, or the sound content; no other exception, no hang, no signal, less
  than 4 GiB.
- **Injections**: one call of open, write, fsync, rename, mkdir, chmod or unlink fails with ENOSPC, EIO, EINTR or EACCES while
  something is written: one error in one line, or none; what was there before is whole, and the work can be done again.
- **Threads** write one file together, and want one checkpoint folder together.

Everything is drawn from --seed. Ends with 1 where something was lost.
"""

from __future__ import annotations

import argparse
import copy
import errno
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_record import Finding, Record, Tally
from mutants import IMAGES, KINDS, TRAINING, digest_of, mutants, net, student

from qakd_plugin import QakdError, distill, export_onnx, write_report
from qakd_plugin._common.files import write_atomic
from qakd_plugin._common.tensor_file import unpack
from qakd_plugin.report import read_report
from qakd_plugin.training.checkpoint import CheckpointStore
from qakd_plugin.training.student_file import save

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


def kills(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """Kill runs and start them again, the set-ups in turn."""
    from training_server import Server

    server = Server()
    shares = [count // len(SETUPS) + (index < count % len(SETUPS)) for index in range(len(SETUPS))]
    try:
        for name, share in zip(SETUPS, shares, strict=True):
            if share:
                chance = random.Random(f"{seed} {name}")
                tally.carry_out(f"{name}, {share}", lambda: _killed(server, name, share, chance, folder))  # noqa: B023
    finally:
        server.close()


def _killed(server: Any, name: str, times: int, chance: random.Random, folder: Path) -> list[Finding]:
    """A run of a set-up that is killed so many times, beside one that is not."""
    from training_server import STEPS

    order, out = SETUPS[name], folder / re.sub(r"\W+", "-", name)
    processes = order.get("processes", 1)
    whole = server.run(out / "whole", folder=str(out / "whole" / "checkpoints"), **order)
    if whole != [0] * processes:
        return [("", f"{name}: a run that nobody killed ends with {whole}: {_error(out / 'whole')}")]
    found: list[Finding] = []
    for step in sorted(chance.randrange(STEPS - 1) for _ in range(times)):
        kill = (step, chance.uniform(0, 0.05))
        codes = server.run(out / "killed", folder=str(out / "killed" / "checkpoints"), kill=kill, **order)
        found.append(("killed", None if set(codes) == {-9} else f"{name}: killed at step {step}, it ends with {codes}"))
    codes = server.run(out / "killed", folder=str(out / "killed" / "checkpoints"), **order)
    return [*found, ("ended with the same bits", _difference(name, out, codes, processes))]


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
    prepared, teacher = student(), net().eval()
    batches = [(IMAGES[:4], None), (IMAGES[4:], None)]

    def train(folder: Path) -> Any:
        result = distill(
            copy.deepcopy(prepared), teacher, [x for x, _ in batches], epochs=2, seed=0, trackers=(), checkpoint_every=1,
            checkpoint_dir=folder / "run", resume=True, cache_teacher=folder / "cache",
        )  # fmt: skip
        return dict(result.model.state_dict())

    def write(folder: Path) -> Any:
        tensors, facts = unpack(save(prepared, folder / "student.safetensors").read_bytes())
        return [(name, tensors[name]) for name in sorted(tensors)], sorted(facts.items())

    def report(folder: Path) -> Any:
        write_report([], folder / "report.html", training=TRAINING)
        return {key: value for key, value in read_report(folder / "report.json").items() if key in {"training", "rows"}}

    def export(folder: Path) -> Any:
        return export_onnx(copy.deepcopy(prepared), IMAGES, folder / "net.onnx").path.read_bytes()

    return {"training": Work(train), "student": Work(write), "report": Work(report), "export": Work(export)}


def injections(tally: Tally, count: int, seed: int, folder: Path, only: tuple[str, ...] = ()) -> None:
    """Let calls fail while something is written, the works in turn.

    Args:
        tally: of what comes of it.
        count: of failing calls.
        seed: of which.
        folder: for files.
        only: works; all by default.
    """
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
        tally.carry_out(f"{name}, {number}", lambda: [_failing(name, works[name], disk, own, whole[name])])  # noqa: B023


def _failing(name: str, work: Work, disk: Disk, own: Path, whole: str) -> Finding:
    """Something is written while a call fails, and then again."""
    work.before(own)
    what = f"{name}: {disk.call} number {disk.number}{' and later' if disk.lasting else ''}: {errno.errorcode[disk.error]}"
    outcome = "went on"
    try:
        with disk.failing():
            work.do(own)
    except QakdError as error:
        outcome = "one error"
        if "\n" in str(error):
            return "", f"{what}: several lines: {error}"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return "", f"{what}: {type(error).__name__}: {error}: {traceback.extract_tb(error.__traceback__)[-1]}"
    return outcome, _redone(what, work, own, whole)


def _redone(what: str, work: Work, folder: Path, whole: str) -> str | None:
    """Do it again, on a disk that works: with the same result, and nothing is left over."""
    try:
        found = digest_of(work.do(folder))
    except Exception as error:  # noqa: BLE001 - as above
        return f"{what}: it cannot be done again: {type(error).__name__}: {error}"
    return None if found == whole else f"{what}: done again, it has another result"


# -- threads


def threads(tally: Tally, count: int, folder: Path) -> None:
    """Threads that write one file, and threads that want one folder of checkpoints."""
    tally.carry_out(f"{count} threads", lambda: _threads(count, folder))


def _threads(count: int, folder: Path) -> list[Finding]:
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
    found: list[Finding] = [("written and read whole", None)] * (50 * count)
    stores = [CheckpointStore(folder / "run", {}) for _ in range(count)]
    held = list[int]()

    def take(index: int) -> None:
        start.wait()
        try:
            stores[index].lock()
            held.append(index)
        except QakdError:
            found.append(("refused, the folder is another's", None))

    _together(take, count)
    found.append(("took the folder", None if len(held) == 1 else f"{len(held)} of {count} took one folder"))
    for index in held:
        stores[index].unlock()
    found += [("", problem) for problem in problems]
    if left := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
        found.append(("", f"{left} are left"))
    return found


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
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="of the files that are damaged: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="file of the trials that are done; what it holds is not tried again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.record, {"seed": options.seed, "commit": _commit()})
    kinds = tuple(options.kind or KINDS)
    lost = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        parts: dict[str, Callable[[Tally], None]] = {
            "threads": lambda tally: threads(tally, options.threads, folder / "threads"),
            "injections": lambda tally: injections(tally, options.injections, options.seed, folder / "injections"),
            "mutants": lambda tally: mutants(tally, options.mutants, options.seed, folder / "mutants", kinds),
            "kills": lambda tally: kills(tally, options.kills, options.seed, folder / "kills"),
        }
        for name, part in parts.items():
            if not getattr(options, name):
                continue
            (folder / name).mkdir()
            tally = Tally(name, record)
            part(tally)
            print(tally, flush=True)
            for problem in tally.lost:
                print(f"  lost: {problem}", flush=True)
            lost += len(tally.lost)
    print("nothing lost" if not lost else f"{lost} lost")
    return 1 if lost else 0


def _commit() -> str:
    """The version that is tried, with "-dirty" where it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
