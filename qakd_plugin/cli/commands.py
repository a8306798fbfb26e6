"""The command ``qakd``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, QakdError

_RECIPE = "MODULE:FUNCTION; called without arguments, it returns the keyword arguments as a dict"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except QakdError as error:
        print(f"qakd: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nqakd: stopped. {options.after_stop}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qakd", description="Quantization-aware distillation, from a prepared model to hardware."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_distill, _add_rank, _add_export, _add_tune, _add_engine, _add_bench, _add_report):
        add(commands)
    return parser


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None], after_stop: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run, after_stop=after_stop)
    return parser


def _add_demo(commands: Any) -> None:
    text = "the whole pipeline on handwritten digits: train, distill, export, measure, report"
    parser = _command(commands, "demo", text, _demo, "What was finished is kept: run the same command to go on.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything it writes (%(default)s)")
    parser.add_argument("--epochs", type=_positive, default=12, help="of each student (%(default)s)")
    parser.add_argument("--teacher-epochs", type=_positive, default=15, help="of the teacher (%(default)s)")
    parser.add_argument("--calls", type=_positive, default=300, help="timed calls of each file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training (%(default)s)")


def _demo(options: argparse.Namespace) -> None:
    from ..demo.pipeline import run

    run(options.out, epochs=options.epochs, teacher_epochs=options.teacher_epochs, seed=options.seed, calls=options.calls)


def _add_distill(commands: Any) -> None:
    text = "train a prepared model with a teacher"
    parser = _command(
        commands, "distill", text, _distill, "Run the same command with --resume to go on from the last checkpoint."
    )
    parser.add_argument("recipe", help=f"{_RECIPE} of qakd_plugin.distill (prepared_model, teacher, loader, ...)")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, history.jsonl and student.pt")
    parser.add_argument("--epochs", type=_positive, help="in place of the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")


def _distill(options: argparse.Namespace) -> None:
    import torch

    from .._common.files import write_atomic
    from ..training.distillation import distill

    recipe = _call(options.recipe)
    if options.epochs is not None:
        recipe["epochs"] = options.epochs
    missing = [name for name in ("prepared_model", "teacher", "loader") if name not in recipe]
    if missing:
        raise QakdError(
            f"{options.recipe} returned no {', '.join(missing)}: it must return {_RECIPE.partition('returns ')[2]}."
        )
    model, teacher, loader = (recipe.pop(name) for name in ("prepared_model", "teacher", "loader"))
    result = distill(model, teacher, loader, checkpoint_dir=options.out, resume=options.resume, **recipe)
    path = options.out / "student.pt"
    content = {"state_dict": result.model.state_dict(), "quantizers": _grids(result.model)}
    write_atomic(path, lambda file: torch.save(content, file))
    for name, value in result.metrics.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    print(path)


def _add_rank(commands: Any) -> None:
    text = "rank augmentations with the teacher alone, by contextual mutual information"
    parser = _command(commands, "rank", text, _rank, "Nothing was written.")
    parser.add_argument(
        "recipe", help=f"{_RECIPE} of qakd_plugin.rank_augmentations (teacher, data, ...); of distill's those that it shares"
    )
    parser.add_argument("--max-samples", type=_positive, help="images per candidate at most; all by default")
    parser.add_argument("--labels", choices=("dataset", "teacher"), help="in place of the recipe's; dataset by default")
    parser.add_argument("--form", choices=("ce", "centroid"), help="what is subtracted from CMI, in place of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="of images and draws (%(default)s)")
    parser.add_argument("--exhaustive", action="store_true", help="score every candidate on all images")
    parser.add_argument("--search", type=_positive, metavar="BUDGET", help="also so many compositions of two operations")
    parser.add_argument("--out", type=Path, default=Path("ranking.json"), help="figures; plots beside it (%(default)s)")


def _rank(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ..augment.compositions import Search
    from ..augment.presentation import console_table, draw, write_records
    from ..augment.ranking import rank_augmentations

    recipe = _call(options.recipe)
    data = recipe.get("data", recipe.get("loader"))
    if "teacher" not in recipe or data is None:
        raise QakdError(f"{options.recipe} returned no teacher or no data: it must return a dict with both.")
    shared = ("candidates", "labels", "form", "input_stats", "batch_fn", "confidence", "search")
    arguments = {name: recipe[name] for name in shared if name in recipe}
    arguments |= {name: value for name in ("labels", "form") if (value := getattr(options, name)) is not None}
    if options.search is not None:
        arguments["search"] = Search(budget=options.search, keep=min(3, options.search))
    ranking = rank_augmentations(
        recipe["teacher"],
        data,
        max_samples=options.max_samples,
        seed=options.seed,
        race=not options.exhaustive,
        **arguments,
    )
    Console().print(console_table(ranking))
    print(ranking.explanation)
    print(f"{ranking.teacher_forwards} images went through the teacher.")
    print(write_records(ranking, options.out))
    for path in draw(ranking, options.out):
        print(path)


def _add_export(commands: Any) -> None:
    text = "write a trained, prepared model as ONNX, gated on parity"
    parser = _command(commands, "export", text, _export, "Nothing half-written was left.")
    parser.add_argument("recipe", help=f"{_RECIPE}: prepared_model, and example_input (float (N, C, H, W)) or loader")
    parser.add_argument("--weights", type=Path, help="student.pt of qakd distill, loaded into the prepared model")
    parser.add_argument("--target", choices=("tensorrt", "onnxruntime", "openvino"), default="tensorrt", help="(%(default)s)")
    parser.add_argument(
        "--weight-storage", choices=("int8", "int4", "int2"), default="int4", help="narrowest type in the file (%(default)s)"
    )
    parser.add_argument("--float16", action="store_true", help="for tensorrt: write what is not quantized in FP16")
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file")


def _export(options: argparse.Namespace) -> None:
    from ..deploy.export import export_onnx
    from ..tasks.batches import default_batch

    recipe = _call(options.recipe)
    if "prepared_model" not in recipe:
        raise QakdError(f"{options.recipe} returned no prepared_model.")
    model = recipe["prepared_model"]
    if options.weights is not None:
        _load_weights(model, options.weights)
    example = recipe.get("example_input")
    if example is None and "loader" in recipe:
        batch = next(iter(recipe["loader"]), None)
        if batch is None:
            raise QakdError(f"{options.recipe} returned a loader that is empty: parity is checked on real samples.")
        example = default_batch(batch)[0]
    if example is None:
        raise QakdError(f"{options.recipe} returned neither example_input nor loader: parity is checked on real samples.")
    exported = export_onnx(
        model,
        example,
        options.out,
        target=options.target,
        weight_storage=options.weight_storage,
        float16=options.float16,
    )
    proof = exported.parity
    print(
        f"parity: {proof.weight_codes} weight codes equal, {proof.activation_codes} activation codes compared, "
        f"{proof.ties_runtime} "
        f"rounding ties, deviation {proof.runtime_deviation:.1e} with ties settled, agreement {proof.unfused.top1:.2%}"
    )
    print(exported.path)


def _grids(model: Any) -> dict[str, str]:
    """What a state_dict does not say of the quantizers that its scales belong to."""
    from ..preparation.description import describe

    return {q.name: f"{q.kind}, codes {q.quant_min}..{q.quant_max}" for q in describe(model).quantizers}


def _check_grids(path: Path, trained: dict[str, str], prepared: dict[str, str]) -> None:
    for name in sorted(trained.keys() | prepared.keys()):
        before, now = (grids.get(name, "no quantizer") for grids in (trained, prepared))
        if before != now:
            raise QakdError(
                f"--weights: {path} does not fit the prepared model: {name} was trained as {before}, and the recipe prepares "
                f"{now}. Let the recipe prepare what was trained: the same toolkit, bits, quantizers and target."
            )


def _load_weights(model: Any, path: Path) -> None:
    from ..training.checkpoint import load_plain

    if not path.is_file():
        raise QakdError(f"--weights: {path} does not exist.")
    try:
        weights = load_plain(path)
    except CheckpointError as error:
        raise QakdError(f"--weights: {path}: {error}. Name the student.pt of qakd distill.") from error
    grids: Any = {}
    if isinstance(weights, dict) and weights.keys() == {"state_dict", "quantizers"}:  # else somebody's own
        weights, grids = weights["state_dict"], weights["quantizers"]
    for part in (weights, grids):
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise QakdError(
                f"--weights: {path} holds no state_dict ({type(part).__name__}). Name the student.pt of qakd distill."
            )
    if grids:
        _check_grids(path, grids, _grids(model))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise QakdError(f"--weights: {path} does not fit the prepared model: {reason}") from error


def _add_tune(commands: Any) -> None:
    text = "fit a file for ONNX Runtime to this machine's processor, by measuring"
    parser = _command(commands, "tune", text, _tune, "Nothing was written.")
    parser.add_argument("onnx", type=Path, help="file exported with --target onnxruntime")
    parser.add_argument("--out", type=Path, help="the tuned file; beside the ONNX file by default")
    parser.add_argument("--batch", type=_positive, default=1, help="images per call (%(default)s)")
    parser.add_argument("--threads", type=_positive, default=1, help="(%(default)s)")
    parser.add_argument("--calls", type=_positive, default=40, help="timed calls of each variant (%(default)s)")


def _tune(options: argparse.Namespace) -> None:
    from ..deploy.tuning import tune_for_host

    out = options.out or options.onnx.with_suffix(".tuned.onnx")
    tuning = tune_for_host(options.onnx, out, batch=options.batch, threads=options.threads, calls=options.calls)
    print(tuning)
    print(tuning.path)


def _add_engine(commands: Any) -> None:
    text = "build a TensorRT or TensorRT-RTX engine from canonical ONNX"
    parser = _command(commands, "engine", text, _engine, "Nothing half-written was left.")
    parser.add_argument("onnx", type=Path, help="canonical ONNX file")
    parser.add_argument("--out", type=Path, help="the engine; beside the ONNX file by default")
    parser.add_argument("--runtime", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto", help="(%(default)s)")
    for name, default in (("min", 1), ("opt", 8), ("max", 64)):
        parser.add_argument(
            f"--{name}-batch", type=_positive, default=default, help="of the optimization profile (%(default)s)"
        )
    parser.add_argument("--capability", action="append", help="RTX: GPU generation such as SM89; may be repeated")
    parser.add_argument("--require-int8", type=float, help="smallest share of layers that must compute in integers")
    parser.add_argument("--allow-float", action="store_true", help="take a file without Q/DQ, for a float baseline")
    parser.add_argument("--timing-cache", type=Path, help="classic TensorRT: file of measured kernels, read and written")


def _engine(options: argparse.Namespace) -> None:
    from ..deploy.engine.build import build_engine, input_shape, trtexec_command

    out = options.out or options.onnx.with_suffix(".engine")
    info = build_engine(
        options.onnx,
        out,
        options.runtime,
        min_batch=options.min_batch,
        opt_batch=options.opt_batch,
        max_batch=options.max_batch,
        capabilities=options.capability,
        require_int8=options.require_int8,
        allow_float=options.allow_float,
        timing_cache=options.timing_cache,
    )
    for kind in ("convolutions", "matmuls"):
        found = info.manifest[kind]
        print(f"{kind}: {found if isinstance(found, str) else '{int8} of {total} in int8'.format(**found)}")
    print(f"with weights stored in int4: {info.manifest['int4_layers']}")
    for runtime in ("tensorrt", "tensorrt_rtx"):
        line = trtexec_command(
            options.onnx,
            out,
            input_shape(options.onnx),
            runtime=runtime,
            min_batch=options.min_batch,
            opt_batch=options.opt_batch,
            max_batch=options.max_batch,
            capabilities=info.manifest["capabilities"],
        )
        print(f"with NVIDIA's tool for {runtime}: {line}")
    print(info.path)
    print(info.manifest_path)


def _add_bench(commands: Any) -> None:
    text = "measure ONNX files and engines side by side and write a report"
    parser = _command(commands, "bench", text, _bench, "No report was written.")
    parser.add_argument("models", nargs="+", type=Path, help="ONNX files and engines of one network")
    parser.add_argument("--model", default="", help="name of the network, for the report")
    parser.add_argument(
        "--runtime",
        action="append",
        choices=("onnxruntime", "openvino", "tensorrt"),
        help="may be repeated; engines run in tensorrt (onnxruntime, and tensorrt where an engine is given)",
    )
    parser.add_argument(
        "--module", help="MODULE:FUNCTION that returns a float torch module: rows of torch and torch.compile as yardsticks"
    )
    parser.add_argument("--batch", action="append", type=_positive, help="may be repeated (1)")
    parser.add_argument("--threads", action="append", type=_positive, help="may be repeated (1)")
    parser.add_argument("--calls", type=_positive, default=200, help="timed calls of each file (%(default)s)")
    parser.add_argument("--loader", help="MODULE:FUNCTION that returns batches (images, labels): accuracy through the runtime")
    parser.add_argument(
        "--profile-layers", action="store_true", help="also record time and precision of each layer, in a pass of its own"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="(%(default)s)")


def _bench(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ..bench.candidates import named_by_its_path
    from ..bench.measure import benchmark
    from ..report import console_table, write_report

    models = list(options.models)
    engines = [path for path in models if path.suffix == ".engine"]
    runtimes = options.runtime or ["onnxruntime"] * (len(engines) < len(models)) + ["tensorrt"] * bool(engines)
    if options.module:
        models.append(_resolve(options.module)())
        runtimes = [*runtimes, "torch", "torch.compile"]
    rows = benchmark(
        [replace(named_by_its_path(model), model=options.model) for model in models],
        _resolve(options.loader)() if options.loader else None,
        runtimes=runtimes,
        batch_sizes=options.batch or (1,),
        threads=options.threads or (1,),
        calls=options.calls,
        profile_layers=options.profile_layers,
        progress=lambda line: print(line, file=sys.stderr),
    )
    Console().print(console_table(rows))
    print(write_report(rows, options.out))


def _add_report(commands: Any) -> None:
    text = "make HTML and Markdown of a report.json, or one of several: runs of several machines beside each other"
    parser = _command(commands, "report", text, _report, "No report was written.")
    parser.add_argument("json", nargs="+", type=Path, help="report.json")
    parser.add_argument("--out", type=Path, help="HTML file; beside the JSON file by default, needed with several")
    parser.add_argument("--title", help="in place of the reports' own")


def _report(options: argparse.Namespace) -> None:
    from ..report import merge_reports, read_report, write_page, write_report

    several = len(options.json) > 1
    if options.out is None and several:
        raise QakdError("--out is missing: name the HTML file of the merged report.")
    document = merge_reports([read_report(path) for path in options.json], options.title)
    page = (options.out or options.json[0]).with_suffix(".html")
    written = [page.with_suffix(suffix) for suffix in (".html", ".md", *[".json"] * several)]
    lost = next((given for given in options.json for path in written if path.exists() and path.samefile(given)), None)
    if lost is not None:
        raise QakdError(
            f"--out: {page} and the {' and '.join(path.suffix for path in written[1:])} beside it would replace {lost}, which "
            "is one of the reports given. Name another file."
        )
    print(write_report(document, page) if several else write_page(document, page))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _resolve(name: str) -> Callable[[], Any]:
    """Import ``MODULE:FUNCTION``; modules of the working directory count."""
    module, _, function = name.partition(":")
    if not function:
        raise QakdError(f"{name!r} must be MODULE:FUNCTION, for example my_recipe:build.")
    sys.path.insert(0, str(Path.cwd()))  # to stay: the function may import from there as well
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise QakdError(f"{name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise QakdError(f"{name!r} is not a function.")
    return found  # type: ignore[no-any-return]


def _call(name: str) -> dict[str, Any]:
    recipe = _resolve(name)()
    if not isinstance(recipe, dict):
        raise QakdError(f"{name!r} must return a dict of keyword arguments, got {type(recipe).__name__}.")
    return dict(recipe)
