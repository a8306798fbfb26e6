"""Commands that run networks: distill, rank, sensitivity.

What takes seconds to import is imported after what the user wrote was read.
"""

from __future__ import annotations

from pathlib import Path

from ..augment.choices import Form, Labels
from .options import PositiveInt
from .recipes import read_recipe


def distill(recipe: str, *, out: Path, epochs: PositiveInt | None = None, resume: bool = False) -> None:
    """Train a prepared model with a teacher.

    Args:
        recipe: a YAML file (--print-config writes one), or MODULE:FUNCTION that returns a dict; it is code, and is run
        out: folder for checkpoints, history.jsonl and student.safetensors
        epochs: in place of the recipe's
        resume: go on from the newest checkpoint in --out
    """
    arguments = read_recipe(recipe, "distill").arguments("prepared_model", "teacher", "loader")
    from accelerate import PartialState

    from ..training.distillation import distill as run
    from .student_file import write_student

    if epochs is not None:
        arguments["epochs"] = epochs
    result = run(**arguments, checkpoint_dir=out, resume=resume)
    if not PartialState().is_main_process:
        return
    path = write_student(result.model, out / "student.safetensors")
    for name, value in result.metrics.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(path)


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
    """
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
    print(run(**arguments | {"batches": list(islice(arguments["batches"], max_batches))}))
