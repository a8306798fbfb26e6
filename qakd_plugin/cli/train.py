"""Commands that run networks: distill, rank, sensitivity.

What takes seconds to import is imported after what the user wrote was read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .._common.files import with_extension, write_atomic
from ..augment.choices import Form, Labels
from ..errors import QakdError
from ..placement.targets import Target
from .flags_recipe import MethodName, ToolkitName, preprocessing, recipe_of_flags
from .options import PositiveInt, flag, in_flags
from .outputs import check_folder, check_outputs
from .recipes import Recipe, as_yaml, made_recipe, read_recipe

STUDENT = "student.safetensors"
"""What a run ends with, in its folder."""

RECIPE = "recipe.yaml"
"""What a run without a recipe leaves beside it."""


def distill(
    recipe: str | None = None,
    *,
    out: Path,
    epochs: PositiveInt | None = None,
    resume: bool | Literal["force"] = False,
    model: str | None = None,
    weights: Path | None = None,
    data: Path | None = None,
    toolkit: ToolkitName | None = None,
    bits: str | None = None,
    edges: PositiveInt | None = None,
    quantize_attention: bool = False,
    method: MethodName | None = None,
    target: Target | None = None,
    size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    batch: PositiveInt | None = None,
) -> None:
    """Train a prepared model with a teacher.

    Args:
        recipe: a YAML file (--print-config writes one), or MODULE:FUNCTION that returns a dict; it is code, and is run
        out: folder for checkpoints, history.jsonl and student.safetensors
        epochs: in place of the recipe's
        resume: go on from the newest checkpoint in --out; with the word force, of another run, too
        model: without a recipe: the float classifier, which teaches, too: torchvision:NAME, timm:NAME or package.module:NAME
        weights: of --model: its state_dict, .safetensors or of torch.save
        data: folder with train/ and val/, each with a folder of images for each class; or one with the classes alone, of which
            a tenth is held out
        toolkit: that prepares --model (modelopt)
        bits: of weights and activations, w8a8, w4a4 ... (w8a8)
        edges: bits of the weights of the first and the last layer (8)
        quantize_attention: quantize what the products of attention multiply, too
        method: of training (sqakd)
        target: that --model is prepared and exported for (tensorrt)
        size: of images, 224 or 224x192 (height x width); of --model's authors by default
        mean: per channel, of values in [0, 1], 0.485,0.456,0.406; likewise
        std: likewise
        batch: images per batch (64)
    """
    by_flags = {"weights": weights, "data": data, "toolkit": toolkit, "bits": bits, "edges": edges}
    by_flags |= {"method": method, "target": target, "size": size, "mean": mean, "std": std, "batch": batch}
    by_flags |= {"quantize_attention": quantize_attention or None}
    given = {name: value for name, value in by_flags.items() if value is not None}
    if recipe is not None and (model is not None or given):
        named = flag(next(iter(given))) if model is None else "--model"
        raise QakdError(f"{named} is for runs without a recipe: write it in {recipe}, or leave {recipe} out.")
    written = [RECIPE] if recipe is None else []
    check_folder(out, [STUDENT, *written], resume=bool(resume))
    read = _without_recipe(model, given) if recipe is None else read_recipe(recipe, "distill")
    arguments = read.arguments("prepared_model", "teacher", "loader")
    from accelerate import PartialState

    from ..training.distillation import distill as run
    from ..training.student_file import save

    if epochs is not None:
        arguments["epochs"] = epochs
    result = run(**arguments, checkpoint_dir=out, resume=resume)
    if not PartialState().is_main_process:
        return
    path = save(result.model, out / STUDENT)
    if written:
        write_atomic(out / RECIPE, as_yaml(read))
    for name, value in result.metrics.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(path)


def _without_recipe(model: str | None, given: dict[str, Any]) -> Recipe:
    """The recipe that flags make."""
    missing = [flag(name) for name, value in (("model", model), ("data", given.get("data"))) if value is None]
    if missing:
        raise QakdError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing: pass a recipe (qakd distill "
            "--print-config writes one), or --model, --weights and --data."
        )
    assert model is not None
    if model.partition(":")[0] in ("torchvision", "timm") and "weights" not in given:
        raise QakdError(f"--weights is missing: {model} would teach with random weights. Name a file of trained ones.")
    images = preprocessing(model, given.pop("size", None), given.pop("mean", None), given.pop("std", None))
    tree = recipe_of_flags(model, given.pop("weights", None), given.pop("data"), images, **given)
    return made_recipe(tree, f"--model {model}", "distill")


def rank(
    recipe: str,
    *,
    max_samples: PositiveInt | None = None,
    labels: Labels | None = None,
    form: Form | None = None,
    seed: int = 0,
    exhaustive: bool = False,
    search: PositiveInt | None = None,
    out: Path = Path("ranking.json"),
    force: bool = False,
) -> None:
    """Rank augmentations with the teacher alone, by contextual mutual information.

    Args:
        recipe: as for distill: teacher, and data or loader; candidates, search ... where they are not the default
        max_samples: images per candidate at most; all by default
        labels: in place of the recipe's; dataset by default
        form: what is subtracted from CMI, in place of the recipe's
        seed: of images and draws
        exhaustive: score every candidate on all images
        search: also so many compositions of two operations
        out: figures; a drawing beside it, .svg
        force: replace files that are there already
    """
    check_outputs([out, with_extension(out, ".svg")], [recipe], force=force)
    arguments = read_recipe(recipe, "rank").arguments("teacher", "data")
    from rich.console import Console

    from ..augment.compositions import Search
    from ..augment.presentation import as_document, console_table, write_records
    from ..augment.ranking import rank_augmentations
    from ..report.ranking import draw_ranking

    given = {"max_samples": max_samples, "labels": labels, "form": form}
    arguments |= {name: value for name, value in given.items() if value is not None}
    if exhaustive:
        arguments["race"] = False
    if search is not None:
        arguments["search"] = Search(budget=search, keep=min(3, search))
    ranking = rank_augmentations(**arguments | {"seed": seed})
    path = write_records(ranking, out)
    Console().print(console_table(ranking))
    print(ranking.explanation)
    print(f"{ranking.teacher_forwards} images went through the teacher.")
    print(path)
    print(draw_ranking(as_document(ranking)["records"], out))


def sensitivity(recipe: str, *, max_batches: PositiveInt = 8, budget: float | None = None) -> None:
    """Measure how much each layer's quantizers cost, and which layers to keep in floating point.

    Args:
        recipe: as for distill: prepared_model, teacher, and loader or batches; match, metric, blocks ... where wanted
        max_batches: how many batches are measured at most
        budget: in place of the recipe's: how much may be lost, of the metric where there is one, else of the matched loss
    """
    arguments = read_recipe(recipe, "sensitivity").arguments("prepared_model", "teacher", "batches")
    from itertools import islice

    from ..training.sensitivity import sensitivity as run

    if budget is not None:
        arguments["budget"] = budget
    found = run(**arguments | {"batches": list(islice(arguments["batches"], max_batches))})
    print(in_flags(str(found), {"budget": "--budget"}))
