"""Starts training runs in processes of their own, and kills them.

Run as a program it imports and prepares everything once, reads one order a line (JSON) from its input, forks the processes
of one run for each, and answers with one line. Forking saves the imports; what is killed is a whole process at work. Nothing
here may start a thread before a fork.
"""

from __future__ import annotations

import contextlib
import copy
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from qakd_plugin import EWGS, LSQ, QKD, SQAKD, CMISelector, distill, prepare, use_quantizers

METHODS = {"SQAKD": SQAKD(), "QKD": QKD(1, 2, 1)}
QUANTIZERS = {"own": None, "LSQ": LSQ(), "EWGS": EWGS(refresh_every=1)}
EPOCHS, BATCHES, EVERY = 4, 7, 3
STEPS = EPOCHS * BATCHES


class Net(nn.Module):
    """Two convolutions on 8x8 digits.

    Args:
        norm: with BatchNorm.
    """

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, 1, 1, bias=not norm), nn.Conv2d(8, 8, 3, 2, 1, bias=not norm)
        self.norm1, self.norm2 = (nn.BatchNorm2d(8) if norm else nn.Identity() for _ in range(2))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def data():
    """Images (N, 1, 8, 8) in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long()


def trained_teacher(images, labels, norm=True):
    """A network after a few steps."""
    torch.manual_seed(0)
    net = Net(norm)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=2e-2)
    for step in range(60):
        picked = slice(64 * step % 1024, 64 * step % 1024 + 64)
        F.cross_entropy(net(images[picked]), labels[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def _kind(order):
    """Of all numbers in a run."""
    return torch.float64 if order.get("double") else torch.float32


def noisy(samples):
    """A batch, with noise that the loader's own process draws."""
    images, labels = default_collate(samples)
    return (images + 0.05 * torch.randn_like(images)).clamp(0, 1), labels


class Stream:
    """Of each joined batch one process's part, again and again; it can tell where it stands.

    Args:
        size: of a part.
        rank: whose part.
        processes: over which batches are split.
    """

    def __init__(self, images, labels, size, rank, processes):
        self.images, self.labels, self.size, self.rank, self.processes, self.at = images, labels, size, rank, processes, 0

    def __iter__(self):
        while self.at < BATCHES:
            start = (self.at * self.processes + self.rank) * self.size
            self.at += 1
            yield self.images[start : start + self.size], self.labels[start : start + self.size]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Deaths:
    """Kills its own process at one exact moment: ``["step", 5]``, ``["augment", 5]``, ``["write", 2]``, ..."""

    def __init__(self, order, steps):
        self.kind, self.number = order or (None, 0)
        self.steps, self.calls = steps, {}

    def reach(self, kind):
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if kind == self.kind and self.calls[kind] == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, step, losses):
        self.steps[:8] = struct.pack("q", step)
        self.reach("step")

    def on_epoch_end(self, row):
        self.reach("epoch")

    def watch_writes(self):
        """Die with half of a file written, all of it but unnamed, or just named."""
        whole, replace, fsync = Path.write_bytes, os.replace, os.fsync

        def write_bytes(path, content):
            if self.kind == "write":
                whole(path, content[: len(content) // 2])
                self.reach("write")
            return whole(path, content)

        def flush(handle):
            self.reach("flush")
            fsync(handle)

        def move(old, new, **options):
            self.reach("rename")
            replace(old, new, **options)
            self.reach("renamed")

        Path.write_bytes, os.fsync, os.replace = write_bytes, flush, move


class Failure:
    """Makes one part of a run fail in this process, after a few steps: ``kind`` says which; None for none."""

    def __init__(self, kind, error=ValueError):
        self.kind, self.error, self.trained = kind, error, 0

    def reach(self, kind):
        if kind == self.kind and self.trained > 2:
            raise self.error(f"the {kind} fails")

    def watch(self, student, teacher):
        def student_is_called(*_):
            self.reach("student" if torch.is_grad_enabled() else "evaluation")
            self.trained += torch.is_grad_enabled()

        student.register_forward_pre_hook(student_is_called)
        teacher.register_forward_pre_hook(lambda *_: self.reach("teacher"))
        inside = student.get_submodule("conv2.input_fake_quant" if hasattr(student.conv2, "input_fake_quant") else "conv2")
        inside.register_forward_pre_hook(lambda *_: self.reach("layer"))
        next(student.parameters()).register_hook(lambda _: self.reach("backward pass"))

    def loss(self, outputs, targets):
        self.reach("loss")
        return F.cross_entropy(outputs, targets)

    def on_step_end(self, step, losses):
        self.reach("callback")

    def on_epoch_end(self, row):
        self.reach("last callback")


class Trainings:
    """Prepared students, each made once, and runs of them."""

    def __init__(self):
        self.images, self.labels = data()
        self.teachers = {norm: trained_teacher(self.images, self.labels, norm) for norm in (True, False)}
        self.students = {}

    def student(self, toolkit, quantizers, norm=True):
        key = toolkit, quantizers, norm
        if key not in self.students:
            batches = [self.images[start : start + 64] for start in range(0, 256, 64)]
            student = prepare(self.teachers[norm], batches, toolkit, weight_bits=4, activation_bits=8)
            if QUANTIZERS[quantizers] is not None:
                use_quantizers(student, QUANTIZERS[quantizers])
            self.students[key] = student
        return copy.deepcopy(self.students[key])

    def loader(self, order, processes):
        """Shuffled by a generator of its own, or by the global one; a joined batch has 32 images whatever the processes."""
        size = order.get("samples", 32 * BATCHES)
        own = torch.Generator().manual_seed(5) if order.get("generator", True) else None
        images = self.images[:size].to(_kind(order), copy=True)
        if "poison" in order:
            images[order["poison"]] = float("nan")
        if "stream" in order:
            rank = int(os.environ.get("RANK", "0")) if order["stream"] == "split" else 0
            return Stream(images, self.labels[:size], 32 // processes, rank, processes)
        dataset, workers = TensorDataset(images, self.labels[:size]), order.get("workers", 0)
        return DataLoader(
            dataset, 32 // processes, shuffle=True, generator=own, num_workers=workers, collate_fn=noisy if workers else None
        )

    def failing(self, order, rank):
        """Runs of which each fails in one process: by kind, what this process raises, and after how many seconds."""
        found = {}
        for kind, victim in order["failing"].items():
            teacher = copy.deepcopy(self.teachers[True])
            student = self.student(order["toolkit"], order["quantizers"])
            fails = kind.removesuffix(" interrupted")
            failure = Failure(fails if rank == victim else None, ValueError if fails == kind else KeyboardInterrupt)
            failure.watch(student, teacher)
            started = time.monotonic()
            try:
                distill(
                    student, teacher, self.loader(order, 2), method=QKD(0, 1, 0), epochs=1, seed=3, trackers=(),
                    task_loss=failure.loss, callbacks=[failure], val_loader=self.loader(order, 2),
                )  # fmt: skip
                text = "nothing"
            except BaseException as error:  # noqa: BLE001
                text = f"{type(error).__name__}: {error}"
            found[kind] = text, time.monotonic() - started
        return found

    def run(self, order, deaths):
        """One run, as ``order`` says; gives what is compared."""
        teacher = copy.deepcopy(self.teachers[order.get("norm", True)]).to(_kind(order))
        student = self.student(order["toolkit"], order["quantizers"], order.get("norm", True)).to(_kind(order))
        if order.get("listed"):  # as transformers keep their blocks
            for net in (student, teacher):
                net.listed = nn.ModuleList([net.conv1, net.conv2])
        torch.manual_seed(int(time.time()))  # nothing may depend on what was drawn before
        end = 1500 + order.get("held_out", 101)
        held_out = DataLoader(TensorDataset(self.images[1500:end].to(_kind(order)), self.labels[1500:end]), 32)

        def augment(images):
            deaths.reach("augment")
            if str(order.get("fails")) == os.environ.get("RANK"):
                raise ValueError("this image cannot be read")
            return (images + 0.05 * torch.randn_like(images)).clamp(0, 1) if order.get("noise", True) else images

        selector = CMISelector({"as they are": torch.clone, "dark": torch.square}, max_samples=64, every=1)
        result = distill(
            student, teacher, self.loader(order, order["processes"]), method=METHODS[order["method"]], epochs=EPOCHS, seed=3,
            val_loader=held_out, augment=selector if order.get("augment") == "CMI" else augment,
            checkpoint_dir=order.get("folder"), resume=order.get("resume", bool(order.get("folder"))),
            checkpoint_every=EVERY if order.get("folder") else None, callbacks=[deaths], trackers=(), lr=order.get("lr", 1e-2),
            **order.get("options", {}),
        )  # fmt: skip
        history = [{name: value for name, value in row.items() if name != "images_per_second"} for row in result.history]
        return {
            "student": dict(result.model.state_dict()), "teacher": dict(result.teacher.state_dict()), "history": history,
            "parameters": {name: p.detach() for name, p in result.model.named_parameters()},
        }  # fmt: skip


def child(trainings, order, rank, port, steps):
    """One forked process of one run; never returns."""
    status = 1
    log = Path(order["out"]) / f"log-{rank}.txt"
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if order["processes"] > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["processes"]), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
        os.environ |= order.get("environment", {})
        if order.get("accelerate_first"):
            from accelerate import PartialState

            PartialState()
        if "file_limit" in order and rank == 0:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
        deaths = Deaths(order.get("die") if rank == order.get("victim", 0) else None, steps)
        deaths.watch_writes()
        result = trainings.failing(order, rank) if "failing" in order else trainings.run(order, deaths)
        torch.save(result, Path(order["out"]) / f"result-{rank}.pt")
        if "kill" in order:  # a fast run is over before its moment: it is killed all the same
            steps[:8] = struct.pack("q", STEPS)
            signal.pause()
        status = 0
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        with contextlib.suppress(OSError):
            (Path(order["out"]) / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def carry_out(trainings, order):
    """Start the processes of a run, kill them when the order says so, and wait for their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    trainings.student(order["toolkit"], order["quantizers"], order.get("norm", True))
    steps = mmap.mmap(-1, 8)
    living = {}
    for rank in range(order["processes"]):
        pid = os.fork()
        if pid == 0:
            child(trainings, order, rank, port, steps)
        living[pid] = rank
    at_step, delay = order.get("kill", (None, 0))
    due, codes = None, {}
    started = time.monotonic()
    while living:
        time.sleep(0.0005)
        for pid in list(living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[living.pop(pid)] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if at_step is not None and due is None and struct.unpack("q", steps[:8])[0] >= at_step:
            due = now + delay
        killed_one = any(code == -signal.SIGKILL for code in codes.values())
        if living and ((due is not None and now >= due) or killed_one or now - started > order.get("limit", 120)):
            for pid in living:  # as a launcher does: one is dead, the others follow
                os.kill(pid, signal.SIGKILL)
    return {"codes": [codes[rank] for rank in sorted(codes)], "seconds": time.monotonic() - started}


class Server:
    """The program of this file, for tests: ``server.run(folder, ...)`` gives exit codes by rank."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def run(self, out, **order):
        out.mkdir(parents=True, exist_ok=True)
        order = {"toolkit": "modelopt", "quantizers": "own", "method": "SQAKD", "processes": 1, "out": str(out)} | order
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["codes"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def was_killed(codes):
    """Whether a run of these exit codes was killed: those not killed in the same moment may end by its loss (1)."""
    return -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}


def main():
    torch.set_num_threads(1)
    trainings = Trainings()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what toolkits print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(carry_out(trainings, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
