"""Commands that write what is deployed: export, tune, engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .._common.files import with_extension
from ..deploy.engine.bindings import RUNTIMES
from ..errors import QakdError
from ..placement.targets import Target, WeightStorage
from .options import OneOf, PositiveInt
from .recipes import Recipe, read_recipe

if TYPE_CHECKING:
    from torch import nn


def export(
    recipe: str,
    *,
    weights: Path | None = None,
    target: Target | None = None,
    weight_storage: WeightStorage | None = None,
    float16: bool = False,
    out: Path,
) -> None:
    """Write a trained, prepared model as ONNX, gated on parity.

    Args:
        recipe: as for distill: prepared_model, and example_inputs (as batch_fn gives them) or loader
        weights: student.safetensors of qakd distill, loaded into the prepared model
        target: in place of the recipe's; tensorrt by default
        weight_storage: narrowest type in the file, in place of the recipe's; int4 by default
        float16: for tensorrt: write what is not quantized in FP16
        out: the ONNX file
    """
    if weights is not None and not weights.is_file():
        raise QakdError(f"--weights: {weights} does not exist.")
    found = read_recipe(recipe, "export")
    arguments = found.arguments("prepared_model", "example_inputs")
    from ..deploy.export import export_onnx
    from .student_file import load_student

    if "example_inputs" not in found.values:
        arguments["example_inputs"] = _first_inputs(found, arguments["prepared_model"])
    if weights is not None:
        load_student(arguments["prepared_model"], weights)
    given = {"target": target, "weight_storage": weight_storage, "float16": float16 or None}
    exported = export_onnx(**arguments | {name: value for name, value in given.items() if value is not None}, path=out)
    proof = exported.parity
    print(
        f"parity: {proof.weight_codes} weight codes equal, {proof.activation_codes} activation codes compared, "
        f"{proof.ties_runtime} "
        f"rounding ties, deviation {proof.runtime_deviation:.1e} with ties settled, agreement {proof.unfused.top1:.2%}"
    )
    print(exported.path)


def tune(
    onnx: Path,
    *,
    out: Path | None = None,
    batch: PositiveInt = 1,
    threads: PositiveInt = 1,
    calls: PositiveInt = 40,
) -> None:
    """Fit a file for ONNX Runtime to this machine's processor, by measuring.

    Args:
        onnx: file exported with --target onnxruntime
        out: the tuned file; beside the ONNX file by default
        batch: images per call
        threads: of the runtime
        calls: timed calls of each variant
    """
    from ..deploy.tuning import tune_for_host

    path = _apart(out or with_extension(onnx, ".tuned.onnx"), onnx)
    tuning = tune_for_host(onnx, path, batch=batch, threads=threads, calls=calls)
    print(tuning)
    print(tuning.path)


def engine(
    onnx: Path,
    *,
    out: Path | None = None,
    runtime: Annotated[str, OneOf(("auto", *RUNTIMES))] = "auto",
    min_batch: PositiveInt = 1,
    opt_batch: PositiveInt = 8,
    max_batch: PositiveInt = 64,
    size: list[str] | None = None,
    capability: list[str] | None = None,
    require_int8: float | None = None,
    allow_float: bool = False,
    timing_cache: Path | None = None,
) -> None:
    """Build a TensorRT or TensorRT-RTX engine from canonical ONNX.

    Args:
        onnx: canonical ONNX file
        out: the engine; beside the ONNX file by default
        runtime: auto takes the first that is installed
        min_batch: smallest of the optimization profile
        opt_batch: that the engine is tuned for
        max_batch: largest of the optimization profile
        size: of another dynamic dimension, NAME=SMALLEST,USUAL,LARGEST; may be repeated
        capability: RTX: GPU generation such as SM89; may be repeated
        require_int8: smallest share of layers that must compute in integers
        allow_float: take a file without Q/DQ, for a float baseline
        timing_cache: classic TensorRT: file of measured kernels, read and written
    """
    from ..deploy.engine.build import build_engine, input_shape, trtexec_command

    path, sizes = _apart(out or with_extension(onnx, ".engine"), onnx), _sizes(size or [])
    info = build_engine(
        onnx,
        path,
        runtime,
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        sizes=sizes,
        capabilities=capability,
        require_int8=require_int8,
        allow_float=allow_float,
        timing_cache=timing_cache,
    )
    for kind in ("convolutions", "matmuls"):
        found = info.manifest[kind]
        print(f"{kind}: {found if isinstance(found, str) else '{int8} of {total} in int8'.format(**found)}")
    print(f"with weights stored in int4: {info.manifest['int4_layers']}")
    for name in RUNTIMES:
        line = trtexec_command(
            onnx,
            path,
            input_shape(onnx),
            runtime=name,
            min_batch=min_batch,
            opt_batch=opt_batch,
            max_batch=max_batch,
            sizes=sizes,
            capabilities=info.manifest["capabilities"],
        )
        print(f"with NVIDIA's tool for {name}: {line}")
    print(info.path)
    print(info.manifest_path)


def _first_inputs(recipe: Recipe, network: nn.Module) -> Any:
    """What the network takes of the first batch of a recipe's loader."""
    from ..tasks.batches import batch_splitter, default_batch

    batch = next(iter(recipe.values["loader"]), None)
    if batch is None:
        raise QakdError(f"{recipe.source} has a loader that is empty: parity is checked on real samples.")
    return batch_splitter(recipe.values.get("batch_fn", default_batch), network)(batch)[0]


def _sizes(given: list[str]) -> dict[str, tuple[int, ...]]:
    """``sequence=8,128,512`` as ``{"sequence": (8, 128, 512)}``."""
    found: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, _, numbers = text.partition("=")
        try:
            found[name] = tuple(int(number) for number in numbers.split(","))
        except ValueError:
            raise QakdError(f"--size: {text!r} must be NAME=SMALLEST,USUAL,LARGEST, for example sequence=8,128,512.") from None
    return found


def _apart(out: Path, source: Path) -> Path:
    """Where the output goes, if it is not the input.

    Raises:
        QakdError: it is.
    """
    if out.exists() and source.exists() and out.samefile(source):
        raise QakdError(f"--out: {out} is the file that is read. Name another one.")
    return out
