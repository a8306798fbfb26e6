"""Commands that measure and report: bench, report, demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from .._common.files import with_extension
from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES
from .noise import tell
from .options import OneOf, PositiveInt
from .outputs import check_outputs
from .recipes import counted_by, resolve


def bench(
    models: list[Path],
    *,
    model: str = "",
    runtime: list[Annotated[str, OneOf((*FILE_RUNTIMES, "tensorrt"))]] | None = None,
    module: str | None = None,
    batch: list[PositiveInt] | None = None,
    threads: list[PositiveInt] | None = None,
    calls: PositiveInt = 200,
    loader: str | None = None,
    recipe: str | None = None,
    profile_layers: bool = False,
    out: Path = Path("report.html"),
    force: bool = False,
) -> None:
    """Measure ONNX files and engines side by side and write a report.

    Args:
        models: ONNX files and engines of one network
        model: name of the network, for the report
        runtime: may be repeated; engines run in tensorrt (onnxruntime, and tensorrt where an engine is given)
        module: MODULE:FUNCTION that returns a float torch module: rows of torch and torch.compile as yardsticks
        batch: images per call; may be repeated (1)
        threads: of the runtime; may be repeated (1)
        calls: timed calls of each file
        loader: MODULE:FUNCTION that returns batches (inputs, targets): accuracy, or the recipe's metric, through the runtime
        recipe: as for distill: metric, metric_fn, batch_fn and, without --loader, val_loader are taken from it
        profile_layers: also record time and precision of each layer, in a pass of its own
        out: the HTML file; Markdown and JSON beside it
        force: replace files that are there already
    """
    from ..deploy.engine.manifest import manifest_path

    manifests = [manifest_path(path) for path in models if path.suffix == ".engine"]
    check_outputs(_report_files(out), [*models, *manifests, recipe], force=force)
    from rich.console import Console

    from ..bench.candidates import candidate_from_path
    from ..bench.measure import benchmark
    from ..report import console_table, write_report
    from ..report.tables import short
    from ..report.verdicts import recommendations

    measured = list(models)
    engines = [path for path in models if path.suffix == ".engine"]
    runtimes = runtime or ["onnxruntime"] * (len(engines) < len(models)) + ["tensorrt"] * bool(engines)
    if module:
        measured.append(resolve(module)())
        runtimes = [*runtimes, "torch", "torch.compile"]
    counted = counted_by(recipe) if recipe else {}
    held_out = counted.pop("val_loader", None)
    rows = benchmark(
        [replace(candidate_from_path(one), model=model) for one in measured],
        resolve(loader)() if loader else held_out,
        runtimes=runtimes,
        batch_sizes=batch or (1,),
        threads=threads or (1,),
        calls=calls,
        profile_layers=profile_layers,
        progress=tell,
        **counted,
    )
    path = write_report(rows, out)
    Console().print(console_table(rows))
    for one in recommendations(rows):
        print(short(f"{one.setting}: {'deploy ' if one.row else ''}{one.text} {one.why}", 2000))
    print(path)


def report(json: list[Path], *, out: Path | None = None, title: str | None = None, force: bool = False) -> None:
    """Make HTML and Markdown of a report.json, or one of several: runs of several machines beside each other.

    Args:
        json: report.json
        out: HTML file; beside the JSON file by default, needed with several
        title: in place of the reports' own
        force: replace files that are there already
    """
    from ..report import merge_reports, read_report, write_page, write_report

    several = len(json) > 1
    if out is None and several:
        raise QakdError("--out is missing: name the HTML file of the merged report.")
    page = with_extension(out or json[0], ".html")
    check_outputs(_report_files(page)[: 3 if several else 2], json, force=force)
    document = merge_reports([read_report(path) for path in json], title)
    print(write_report(document, page) if several else write_page(document, page))


def _report_files(page: Path) -> list[Path]:
    """HTML, Markdown, JSON."""
    return [with_extension(page, extension) for extension in (".html", ".md", ".json")]


def demo(
    *,
    out: Path = Path("runs/demo"),
    epochs: PositiveInt = 12,
    teacher_epochs: PositiveInt = 15,
    calls: PositiveInt = 300,
    seed: int = 0,
) -> None:
    """Run the whole pipeline on handwritten digits: train, distill, export, measure, report.

    Args:
        out: folder of everything it writes
        epochs: of each student
        teacher_epochs: of the teacher
        calls: timed calls of each file
        seed: of the split and of training
    """
    from ..demo.pipeline import run

    run(out, epochs=epochs, teacher_epochs=teacher_epochs, seed=seed, calls=calls)
