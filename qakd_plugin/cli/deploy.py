"""Commands that write what is deployed: export, tune, engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .._common.files import with_extension, write_atomic
from ..deploy.engine.bindings import RUNTIMES
from ..errors import EngineError, ExportError, QakdError
from ..placement.targets import Target, WeightStorage
from ..runtimes.base import FileRuntime
from .options import OneOf, PositiveInt
from .outputs import check_outputs
from .recipes import Recipe, read_recipe
from .value_types import RecipeError

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
    force: bool = False,
) -> None:
    """Write a trained, prepared model as ONNX, gated on parity.

    Args:
        recipe: as for distill: prepared_model, and example_inputs (as batch_fn gives them) or loader
        weights: student.safetensors of qakd distill, loaded into the prepared model
        target: in place of the recipe's; tensorrt by default
        weight_storage: narrowest type in the file, in place of the recipe's; int4 by default
        float16: for tensorrt: write what is not quantized in FP16
        out: the ONNX file
        force: replace a file that is there already
    """
    check_outputs([out], [recipe, weights], force=force)
    if weights is not None and not weights.is_file():
        raise QakdError(f"--weights: {weights} does not exist. Check the path.")
    found = read_recipe(recipe, "export")
    arguments = found.arguments("prepared_model", "example_inputs")
    from ..deploy.export import export_onnx
    from ..training.student_file import load

    if "example_inputs" not in found.values:
        arguments["example_inputs"] = _first_inputs(found, arguments["prepared_model"])
    if weights is not None:
        try:
            arguments["prepared_model"] = load(weights, arguments["prepared_model"])
        except QakdError as error:
            raise QakdError(f"--weights: {error}") from error
    given = {"target": target, "weight_storage": weight_storage, "float16": float16 or None}
    exported = export_onnx(**arguments | {name: value for name, value in given.items() if value is not None}, path=out)
    _say_images(found, exported.path)
    proof = exported.parity
    print(
        f"parity: {proof.weight_codes} weight codes equal, {proof.activation_codes} activation codes compared, "
        f"{proof.ties_runtime} "
        f"rounding ties, deviation {proof.runtime_deviation:.1e} with ties settled, agreement {proof.unfused.top1:.2%}"
    )
    print(exported.path)


def export_float(recipe: str, *, float16: bool = False, out: Path, force: bool = False) -> None:
    """Write a recipe's teacher, the float network, as ONNX: the row that quantized files are compared with.

    Args:
        recipe: as for distill: teacher, and example_inputs (as batch_fn gives them) or loader
        float16: compute in FP16
        out: the ONNX file
        force: replace a file that is there already
    """
    check_outputs([out], [recipe], force=force)
    found = read_recipe(recipe, "export")
    needed = ["teacher", *([] if "example_inputs" in found.values else ["loader"])]
    missing = [key for key in needed if key not in found.values]
    if missing:
        raise RecipeError(f"{recipe} has no {' and no '.join(missing)}, which qakd export-float needs.")
    teacher = found.values["teacher"]
    from torch import nn

    from ..deploy.export import export_float as run

    if not isinstance(teacher, nn.Module):
        raise RecipeError(f"{recipe}: teacher: one network is exported, got {type(teacher).__name__}.")
    inputs = found.values["example_inputs"] if "example_inputs" in found.values else _first_inputs(found, teacher)
    names = {key: found.values[key] for key in ("input_names", "output_names", "dynamic") if key in found.values}
    path = run(teacher, inputs, out, **names, float16=float16)
    _say_images(found, path)
    print(path)


def tune(
    onnx: Path,
    *,
    out: Path | None = None,
    runtime: FileRuntime | None = None,
    batch: PositiveInt = 1,
    threads: PositiveInt = 1,
    calls: PositiveInt = 40,
    exact: bool = False,
    force: bool = False,
) -> None:
    """Fit a file for ONNX Runtime or OpenVINO to this machine's processor, by measuring.

    Args:
        onnx: file exported with --target onnxruntime or openvino
        out: the tuned file; beside the ONNX file by default
        runtime: that the file will run in; the one that it was exported for by default
        batch: images per call
        threads: of the runtime
        calls: timed calls of each variant
        exact: only what leaves every bit of the outputs as it is
        force: replace a file that is there already
    """
    path = out or with_extension(onnx, ".tuned.onnx")
    check_outputs([path], [onnx], force=force)
    from ..deploy.tuning import tune_for_host

    tuning = tune_for_host(onnx, path, runtime=runtime, batch=batch, threads=threads, calls=calls, exact=exact)
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
    force: bool = False,
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
        force: replace files that are there already
    """
    from ..deploy.engine.manifest import manifest_path

    path, sizes = out or with_extension(onnx, ".engine"), _sizes(size or [])
    check_outputs([path, manifest_path(path)], [onnx, timing_cache], force=force)
    if timing_cache is not None:
        check_outputs([timing_cache], [onnx], force=True, flag="--timing-cache")
    from ..deploy.engine.build import build_engine, input_shape, trtexec_command

    try:
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
    except EngineError as error:
        raise EngineError(sizes_as_flags(str(error))) from error
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


def _say_images(recipe: Recipe, path: Path) -> None:
    """Let a file say how its images are prepared and what its classes are called, where a recipe's own loader knows."""
    from .classifier import Images

    images = getattr(recipe.values.get("loader"), "dataset", None)
    if not isinstance(images, Images):
        return
    import onnx

    from .images import image_metadata

    proto = onnx.ModelProto.FromString(path.read_bytes())
    for key, value in image_metadata(images.preprocessing, images.files.classes).items():
        proto.metadata_props.add(key=key, value=value)
    write_atomic(path, proto.SerializeToString(), ExportError)


def _first_inputs(recipe: Recipe, network: nn.Module) -> Any:
    """What the network takes of the first batch of a recipe's loader."""
    from ..tasks.batches import batch_splitter, default_batch

    batch = next(iter(recipe.values["loader"]), None)
    if batch is None:
        raise QakdError(f"{recipe.source} has a loader that is empty: parity is checked on real samples. Check its data set.")
    return batch_splitter(recipe.values.get("batch_fn", default_batch), network)(batch)[0]


def sizes_as_flags(message: str) -> str:
    """An error that shows ``sizes={"sequence": ...}``, with the flag to write in its place."""
    found = re.search(r"\bsizes=\{(.*)\}", message)
    if found is None:
        return re.sub(r"^sizes(?=:)", "--size", message)
    flags = " ".join(f"--size {name}=SMALLEST,USUAL,LARGEST" for name in re.findall(r'"([^"]+)":', found[1]))
    return message[: found.start()] + flags + message[found.end() :]


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
