"""The demo: from handwritten digits to a report, in eight steps that can be stopped and taken up again."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._common.console import track
from .._common.files import write_atomic
from .._common.optional import require
from ..bench import Candidate, benchmark
from ..bench.rows import Row
from ..deploy.engine.bindings import load_runtime
from ..deploy.engine.build import build_engine
from ..deploy.export import export_float, export_onnx
from ..errors import MissingPackageError
from ..placement.targets import Target
from ..preparation.prepared import prepare
from ..report import console_table, write_report
from ..training.distillation import distill
from ..training.methods import QAT, SQAKD, Method
from .data import Digits, load
from .net import DigitNet, train_float
from .summary import conclusions, first_table, winners

TOOLKIT = "modelopt"
CONFIGURATIONS: tuple[tuple[int, tuple[Method, ...]], ...] = (
    (8, (SQAKD(),)),
    (3, (QAT(), SQAKD())),
    (2, (QAT(), SQAKD())),
)
"""Bits of weights and activations, and what trains them; each is calibrated alone, too."""
CALIBRATION_BATCHES = 8
PARITY_SAMPLES = 64


@dataclass
class Student:
    """One trained or calibrated model on its way to a file."""

    method: str
    bits: int
    model: nn.Module
    history: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"w{self.bits}a{self.bits}-{self.method.lower()}"


def run(folder: Path, *, epochs: int = 12, teacher_epochs: int = 15, seed: int = 0, calls: int = 300) -> Path:
    """Run the whole pipeline and return the path of the report.

    What is finished stays in ``folder``: a run that was stopped goes on there. Without TensorRT-RTX no engines are built, and
    the report says so.

    Args:
        folder: of everything it writes.
        epochs: of each student.
        teacher_epochs: of the full-precision teacher.
        seed: of the split and of all training.
        calls: timed calls of each file.

    Raises:
        MissingPackageError: ModelOpt or scikit-learn is not installed; raised before anything is trained.
    """
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    console = Console(soft_wrap=True, markup=False, emoji=False)
    started = time.perf_counter()

    def step(number: int, text: str) -> None:
        console.print(f"[bold]{number}/8[/bold]  {text}  [dim]{time.perf_counter() - started:.0f} s[/dim]", markup=True)

    step(1, "Loading scikit-learn's handwritten digits")
    require("modelopt.torch.quantization", extra="demo", purpose="prepare the demo's students")
    digits = load(seed)
    without_engines = _why_no_engines()
    sizes = ", ".join(f"{len(getattr(digits, split)[1])} {split}" for split in ("train", "validation", "test"))
    console.print(f"     {sizes} images, 32x32")
    for note in without_engines:
        console.print(f"     {note}")
    step(2, f"Training the full-precision teacher, {teacher_epochs} epochs")
    teacher = _teacher(folder / "teacher.pt", digits, teacher_epochs, seed)
    float_accuracy = _accuracy(teacher, digits.validation)
    console.print(f"     validation accuracy {100 * float_accuracy:.2f} %")
    step(3, "Preparing and calibrating students (post-training quantization)")
    students = _prepared(console, teacher, digits, float_accuracy)
    step(4, f"Training them: QAT with labels, SQAKD without, {epochs} epochs each")
    for bits, methods in CONFIGURATIONS:
        for method in methods:
            students.append(_train(folder, teacher, digits, bits, method, epochs, seed))
            best = max(row["val_accuracy"] for row in students[-1].history)
            console.print(f"     {students[-1].name}: validation accuracy {100 * best:.2f} %")
    step(5, "Exporting canonical ONNX, gated on parity with the trained model")
    example = digits.test[0][:PARITY_SAMPLES]
    float_file = export_float(teacher, example, folder / "onnx" / "fp32.onnx")
    _export_all(console, folder, students, example)
    step(6, "Building TensorRT-RTX engines from the canonical files" if not without_engines else "No engines are built")
    engines = [] if without_engines else _build_all(console, folder, students)
    step(7, f"Measuring the files in every runtime that is installed, interleaved, {calls} calls each")
    rows = _measure(folder, float_file, students, digits, calls)
    step(8, "Writing the report")
    path = write_report(
        rows,
        folder / "report.html",
        title="Handwritten digits: from a full-precision teacher to integer files",
        notes=[*without_engines, *conclusions(rows)],
        seeds={"split": seed, "teacher": seed, "students": seed},
        engines=engines,
    )
    console.print(first_table(rows))
    for sentence in winners(rows):
        console.print(f"     {sentence}")
    console.print(console_table(rows, title="Deployed files (one thread, batch 1)"))
    folders = [folder / "onnx", *([folder / "engines"] if engines else [])]
    console.print(f"Report: {path}  (report.md and report.json beside it). Files: {', '.join(map(str, folders))}.")
    return path


def _why_no_engines() -> list[str]:
    """A note, where TensorRT-RTX cannot be used."""
    try:
        load_runtime("tensorrt_rtx")
    except MissingPackageError as error:
        return [f"No engines are built: {error}"]
    return []


def _teacher(path: Path, digits: Digits, epochs: int, seed: int) -> nn.Module:
    """Train the teacher, or take the one an earlier run left."""
    torch.manual_seed(seed)
    model = DigitNet()
    key = f"{epochs} epochs, seed {seed}"
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        if saved["trained"] == key:
            model.load_state_dict(saved["weights"])
            return model.eval()
    train_float(model, digits.loader("train", shuffle=True, seed=seed), epochs)
    write_atomic(path, lambda file: torch.save({"trained": key, "weights": model.state_dict()}, file))
    return model


def _prepared(console: Console, teacher: nn.Module, digits: Digits, float_accuracy: float) -> list[Student]:
    students = []
    for bits, _ in CONFIGURATIONS:
        model = _prepare(teacher, digits, bits)
        gap = 100 * (float_accuracy - _accuracy(model, digits.validation))
        text = f"PTQ gap of W{bits}A{bits}: {gap:.2f} points on the validation split."
        if gap < 1:
            text += " Under one point: for this task calibration alone is nearly enough, training can only win back that much."
        console.print(f"     {text}")
        students.append(Student("PTQ", bits, model, []))
    return students


def _prepare(teacher: nn.Module, digits: Digits, bits: int) -> nn.Module:
    batches = [batch for _, batch in zip(range(CALIBRATION_BATCHES), digits.loader("train", labels=False), strict=False)]
    return prepare(teacher, batches, TOOLKIT, weight_bits=bits, activation_bits=bits)


def _train(folder: Path, teacher: nn.Module, digits: Digits, bits: int, method: Method, epochs: int, seed: int) -> Student:
    student = Student(type(method).__name__, bits, _prepare(teacher, digits, bits), [])
    loader: DataLoader[Tensor] = digits.loader("train", labels=isinstance(method, QAT), shuffle=True, seed=seed)
    result = distill(
        student.model,
        teacher,
        loader,
        method=method,
        epochs=epochs,
        val_loader=digits.loader("validation"),
        checkpoint_dir=folder / "checkpoints" / f"{student.name}-{epochs}-epochs-seed-{seed}",
        resume=True,
        seed=seed,
    )
    student.history = result.history
    return student


def _suffixes() -> dict[Target, str]:
    """What files end in, by the runtime that they are written for; OpenVINO's are proven in OpenVINO, so it must be there."""
    suffixes: dict[Target, str] = {"tensorrt": ".onnx", "onnxruntime": ".ort.onnx"}
    return {**suffixes, "openvino": ".vino.onnx"} if find_spec("openvino") else suffixes


def _export_all(console: Console, folder: Path, students: list[Student], example: Tensor) -> None:
    for student in track(students, "export"):
        exported = {
            target: export_onnx(student.model, example, folder / "onnx" / f"{student.name}{suffix}", target=target)
            for target, suffix in _suffixes().items()
        }
        proof = exported["onnxruntime"].parity
        console.print(
            f"     {student.name}: {proof.weight_codes:,} weight codes equal, {proof.activation_codes:,} activation codes "
            f"compared, {proof.ties_runtime} rounding ties, deviation {proof.runtime_deviation:.0e} with ties settled"
        )


def _build_all(console: Console, folder: Path, students: list[Student]) -> list[dict[str, Any]]:
    engines = []
    for student in track(students, "engines"):
        info = build_engine(
            folder / "onnx" / f"{student.name}.onnx", folder / "engines" / f"{student.name}.engine", runtime="tensorrt_rtx"
        )
        manifest = info.manifest
        found = manifest["convolutions"]
        counted = found if isinstance(found, str) else f"{found['int8']} of {found['total']} convolutions in int8"
        console.print(f"     {info.path.name}: {counted}")
        engines.append({"name": student.name, **{key: manifest[key] for key in manifest if key != "layers"}})
    return engines


def _measure(folder: Path, float_file: Path, students: list[Student], digits: Digits, calls: int) -> list[Row]:
    """Every student in the file made for each runtime; layers are profiled, since the nets are small."""
    suffixes = {runtime: suffix for runtime, suffix in _suffixes().items() if runtime != "tensorrt"}
    candidates = [Candidate(float_file, method="FP32", model="digits")]
    candidates += [
        Candidate(
            folder / "onnx" / f"{student.name}{suffix}",
            method=student.method,
            model="digits",
            toolkit=TOOLKIT,
            weight_bits=student.bits,
            activation_bits=student.bits,
            runtime=runtime,
        )
        for student in students
        for runtime, suffix in suffixes.items()
    ]
    return benchmark(candidates, digits.loader("test"), tuple(suffixes), calls=calls, profile_layers=True)


def _accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    images, labels = split
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
