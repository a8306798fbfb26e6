"""Commands that ask a file: val, predict."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from ..errors import QakdError
from ..runtimes.base import FILE_RUNTIMES
from .flags_recipe import preprocessing_of_flags
from .images import ImageFiles, Preprocessing, from_metadata, labelled_files
from .noise import tell
from .options import OneOf, PositiveInt
from .recipes import counted_by

_RUNTIMES = (*FILE_RUNTIMES, "tensorrt")


def val(
    file: Path,
    *,
    data: Path | None = None,
    recipe: str | None = None,
    runtime: Annotated[str, OneOf(_RUNTIMES)] | None = None,
    size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    batch: PositiveInt = 64,
    threads: PositiveInt = 1,
) -> None:
    """Count how often a file is right, through the runtime that it is deployed in.

    Args:
        file: ONNX file or engine
        data: folder with a folder of images for each class; of one with train/ and val/, val/ is counted
        recipe: in place of --data: val_loader, metric, metric_fn and batch_fn are taken from it
        runtime: that computes (onnxruntime; tensorrt for engines)
        size: of the network's input, 224 or 224x192 (height x width), where the file does not say it
        mean: per channel, of values in [0, 1], where the file does not say it: 0.485,0.456,0.406
        std: likewise
        batch: images read at once
        threads: of the runtime
    """
    _require_file(file)
    if (data is None) == (recipe is None):
        raise QakdError("qakd val counts on --data FOLDER, or on the val_loader of --recipe: pass one of them.")
    counted: dict[str, Any] = {}
    if data is not None:
        files, preprocessing = _labelled(file, data, size, mean, std)
        tell(f"{files.text}, {len(files.classes)} classes; images: {preprocessing}.")
        loader: Iterable[Any] = files.batches(preprocessing, batch)
    else:
        assert recipe is not None
        if any((size, mean, std)):
            raise QakdError(
                "--size, --mean and --std are for --data: a recipe's val_loader prepares its images itself. Leave them out."
            )
        counted = counted_by(recipe)
        if "val_loader" not in counted:
            raise QakdError(f"{recipe} has no val_loader, which qakd val counts on. Add one, or pass --data FOLDER.")
        loader = counted["val_loader"]
    for line in _counted(file, runtime or _runtime_of(file), threads, loader, counted):
        print(line)


def predict(
    file: Path,
    image: list[Path],
    *,
    top: PositiveInt = 5,
    runtime: Annotated[str, OneOf(_RUNTIMES)] | None = None,
    size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    threads: PositiveInt = 1,
) -> None:
    """Print which classes a file sees in images, the most probable first.

    Args:
        file: ONNX file or engine
        image: image files
        top: how many classes
        runtime: that computes (onnxruntime; tensorrt for engines)
        size: of the network's input, 224 or 224x192 (height x width), where the file does not say it
        mean: per channel, of values in [0, 1], where the file does not say it: 0.485,0.456,0.406
        std: likewise
        threads: of the runtime
    """
    _require_file(file)
    preprocessing, classes = _images_of(file, size, mean, std)
    arrays = {path: preprocessing(path) for path in image}
    from .._common.text import visible
    from ..bench.accuracy import main_output
    from ..bench.file_facts import batch_limits
    from ..bench.loading import make_runner

    runner = make_runner(file, runtime or _runtime_of(file), threads)
    times = batch_limits(file).nearest(1)
    for path, array in arrays.items():
        outputs = runner.run(runner.fit({"0": np.stack([array] * times)}))
        logits = outputs[main_output(outputs, file.name)]
        if logits.ndim != 2 or (classes is not None and logits.shape[1] != len(classes)):
            named = "" if classes is None else f" of {len(classes)} classes"
            raise QakdError(f"{file}: qakd predict needs logits (N, C){named}, got {list(logits.shape)}.")
        names = [str(index) for index in range(logits.shape[1])] if classes is None else classes
        answers = ", ".join(f"{visible(names[index])} {share:.1%}" for index, share in _most_probable(logits[0], top))
        print(f"{visible(str(path))}: {answers}")
    runner.close()


def _most_probable(logits: npt.NDArray[Any], top: int) -> list[tuple[int, float]]:
    """Class and softmax of the highest logits."""
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    order = np.argsort(-powers, kind="stable")[:top]
    return [(int(index), float(powers[index] / powers.sum())) for index in order]


def _counted(file: Path, runtime: str, threads: int, loader: Iterable[Any], counted: dict[str, Any]) -> list[str]:
    from ..bench.candidates import candidate_from_path
    from ..bench.jobs import jobs_of
    from ..bench.session import Counting, Session

    candidate = candidate_from_path(file)
    counting = Counting(None, counted.get("metric"), counted.get("metric_fn"))
    counting.check(has_loader=True)
    with Session(jobs_of([candidate], [runtime], ())[:1], threads) as session:
        (score,) = session.score(session.reader(counted.get("batch_fn")), loader, counting, 1).scores
    if "metrics" in score:
        return [
            f"{value.name}: {value.value:.4g}"
            + ("" if value.low is None else f" ({value.low:.4g} to {value.high:.4g}, 95 %, bootstrap)")
            + f", {score['samples']:,} samples, {runtime}"
            for value in score["metrics"]
        ]
    if "accuracy" not in score:
        raise QakdError("val_loader holds no labels, so nothing can be counted. Yield (inputs, labels).")
    share, low, high = (100 * score[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    return [f"accuracy: {share:.2f} % ({low:.2f} to {high:.2f} %, 95 %, Wilson), {score['samples']:,} images, {runtime}"]


def _labelled(file: Path, data: Path, size: str | None, mean: str | None, std: str | None) -> tuple[ImageFiles, Preprocessing]:
    """The images that are counted, with labels that are indices of the file's own classes."""
    preprocessing, classes = _images_of(file, size, mean, std)
    root = data / "val" if (data / "train").is_dir() and (data / "val").is_dir() else data
    if classes is None and (number := _number_of_classes(file)) is not None:
        found = labelled_files(root)
        if len(found.classes) != number:
            raise QakdError(
                f"--data: {root} holds {len(found.classes)} classes, and {file} tells {number} apart without naming them: "
                "which is which is not known. Make a folder for each class, in the order of their names."
            )
        tell(f"{file} does not name its classes: they are taken to be in the order of their folders' names.")
        return found, preprocessing
    return labelled_files(root, classes), preprocessing


def _images_of(file: Path, size: str | None, mean: str | None, std: str | None) -> tuple[Preprocessing, tuple[str, ...] | None]:
    """What is done to images, and the names of classes; what the file says, or the flags in its place."""
    found = None
    if file.suffix == ".onnx":
        from ..deploy.canonical.graph import read_onnx

        found = from_metadata(read_onnx(file).metadata_props, file)
    given = preprocessing_of_flags(size, mean, std)
    if given is not None:
        return given, None if found is None else found[1]
    if any((size, mean, std)):
        raise QakdError("--size, --mean and --std go together: pass all three, or none for what the file says.")
    if found is None:
        raise QakdError(
            f"{file} does not say how its images are prepared (files of qakd distill --model do): pass --size, --mean and "
            "--std as in training, for example --size 224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225."
        )
    return found


def _number_of_classes(file: Path) -> int | None:
    """Of the file's only output; None where that is not known."""
    if file.suffix != ".onnx":
        return None
    from ..deploy.canonical.graph import read_onnx

    outputs = read_onnx(file).graph.outputs
    shape = outputs[0].shape if len(outputs) == 1 else None
    return shape[1] if shape is not None and len(shape) == 2 and isinstance(shape[1], int) else None


def _runtime_of(file: Path) -> str:
    return {".engine": "tensorrt", ".xml": "openvino"}.get(file.suffix, "onnxruntime")


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise QakdError(f"{file} does not exist. Check the path.")
