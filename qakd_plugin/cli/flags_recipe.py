"""A run without a recipe: one is made of flags, runs, and is written beside the student, to be used again and changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import QakdError
from .images import Preprocessing, training_files
from .noise import tell

METHODS = {"sqakd": "SQAKD", "kd": "KD", "qkd": "QKD", "qat": "QAT"}
MethodName = Literal["sqakd", "kd", "qkd", "qat"]
ToolkitName = Literal["modelopt", "pt2e", "torchao", "torch_ao", "torch_ao_eager"]

_HERE = "qakd_plugin.cli.classifier"


def numbers(text: str, flag: str) -> tuple[float, ...]:
    """``0.485,0.456,0.406`` as numbers.

    Raises:
        QakdError: it is something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise QakdError(f"{flag}: expected a number for each channel, such as 0.485,0.456,0.406, got {text!r}.") from None


def size_of(text: str) -> tuple[tuple[int, int], int | tuple[int, int]]:
    """``224`` or ``224x192`` as the network's height and width, and what images are resized to.

    Raises:
        QakdError: it is something else.
    """
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise QakdError(f"--size: expected 224, or height and width as 224x192, got {text!r}.")
    height = int(found[1])
    width = height if found[2] is None else int(found[2])
    return (height, width), height if found[2] is None else (height, width)


def preprocessing(model: str, size: str | None, mean: str | None, std: str | None) -> Preprocessing:
    """What is done to images: what flags say, and the network's authors for the rest.

    Raises:
        QakdError: nobody says it.
    """
    given = preprocessing_of_flags(size, mean, std)
    if given is not None:
        tell(f"Images: {given}, as the flags say.")
        return given
    from .classifier import preprocessing_of

    found, source = preprocessing_of(model)
    if size is not None:
        input_size, resize = size_of(size)
        found = replace(found, size=input_size, resize=resize)
    if mean is not None:
        found = replace(found, mean=numbers(mean, "--mean"))
    if std is not None:
        found = replace(found, std=numbers(std, "--std"))
    others = ", but for what flags say" if any((size, mean, std)) else "; --size, --mean and --std change it"
    tell(f"Images: {found}, {source}{others}.")
    return found


def preprocessing_of_flags(size: str | None, mean: str | None, std: str | None) -> Preprocessing | None:
    """What all three flags say; None where one is missing."""
    if size is None or mean is None or std is None:
        return None
    input_size, resize = size_of(size)
    return Preprocessing(input_size, resize, numbers(mean, "--mean"), numbers(std, "--std"))


def bits_of(text: str) -> tuple[int, int]:
    """``w4a8`` as bits of weights and of activations.

    Raises:
        QakdError: it is something else.
    """
    found = re.fullmatch(r"w([2-8])a([2-8])", text.lower())
    if found is None:
        raise QakdError(f"--bits: expected w8a8, w4a4 or the like, 2 to 8 bits each, got {text!r}.")
    return int(found[1]), int(found[2])


def recipe_of_flags(
    model: str,
    weights: Path | None,
    data: Path,
    images: Preprocessing,
    *,
    toolkit: ToolkitName = "modelopt",
    bits: str = "w8a8",
    edges: int = 8,
    quantize_attention: bool = False,
    method: MethodName = "sqakd",
    target: str = "tensorrt",
    batch: int = 64,
) -> dict[str, Any]:
    """The recipe, as a YAML file would say it: a float classifier teaches its own quantized copy.

    Below 8 bits the quantizers are LSQ's, where the toolkit quantizes activations.
    """
    if weights is not None and not weights.is_file():
        raise QakdError(f"--weights: {weights} does not exist. Check the path.")
    weight_bits, activation_bits = bits_of(bits)
    train, held_out = training_files(data)
    tell(f"{train.text}, {held_out.text}; {len(train.classes)} classes.")
    folder, prepared_for = {"data": str(data.resolve())}, {"preprocessing": images.as_dict(), "batch_size": batch}
    file = None if weights is None else str(weights.resolve())
    teacher = _call(
        f"{_HERE}.network",
        name=model,
        num_classes=len(train.classes),
        preprocessing=prepared_for["preprocessing"],
        weights=file,
    )
    student = _call(
        "qakd_plugin.prepare",
        model=teacher,
        calibration_batches=_call(f"{_HERE}.calibration", **folder, **prepared_for),
        toolkit=toolkit,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edges=edges,
        quantize_attention=quantize_attention,
        target=target,
    )
    if min(weight_bits, activation_bits) < 8 and toolkit != "torchao":
        student = _call("qakd_plugin.use_quantizers", prepared_model=student, config=_call("qakd_plugin.LSQ"), target=target)
    return {
        "seed": 0,
        "teacher": teacher,
        "prepared_model": student,
        "loader": _call(f"{_HERE}.images", **folder, part="train", **prepared_for),
        "val_loader": _call(f"{_HERE}.images", **folder, part="held out", **prepared_for),
        "method": _call(f"qakd_plugin.{METHODS[method]}"),
        "target": target,
    }


def _call(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments} if arguments else {"class_path": path}
