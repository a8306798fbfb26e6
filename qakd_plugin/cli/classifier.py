"""Image classifiers by name: the functions that a recipe made of flags calls (``qakd distill --model ...``)."""

from __future__ import annotations

import importlib
import itertools
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._common.files import read_whole
from .._common.optional import require
from .._common.torch_file import load_plain
from ..errors import CheckpointError, QakdError
from .images import ImageFiles, Preprocessing, training_files
from .options import suggestion

CALIBRATED_WITH = 512
"""Images, drawn from the training ones."""


class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images as a network takes them.

    Args:
        files: which.
        preprocessing: what is done to each.
    """

    def __init__(self, files: ImageFiles, preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing = files, preprocessing

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.preprocessing(self.files.paths[index])), self.files.labels[index]


def images(
    data: str, part: Literal["train", "held out"], preprocessing: Preprocessing, batch_size: int = 64
) -> DataLoader[tuple[Tensor, int]]:
    """A loader of (images (N, C, H, W) float32, labels (N,)).

    Args:
        data: folder, see :func:`.images.training_files`.
        part: "train" in random order, or "held out".
        preprocessing: what is done to each image.
        batch_size: images per batch.
    """
    train, held_out = training_files(Path(data))
    files = train if part == "train" else held_out
    workers = min(4, os.cpu_count() or 1)
    return DataLoader(Images(files, preprocessing), batch_size, shuffle=part == "train", num_workers=workers)


def calibration(data: str, preprocessing: Preprocessing, batch_size: int = 64) -> list[Tensor]:
    """Training images that calibrate ranges, the same ones each time: every so manieth of all classes.

    Args:
        data: folder, see :func:`.images.training_files`.
        preprocessing: what is done to each image.
        batch_size: images per batch.
    """
    found, _ = training_files(Path(data))
    chosen = found.paths[:: max(1, len(found.paths) // CALIBRATED_WITH)][:CALIBRATED_WITH]
    arrays = [torch.from_numpy(preprocessing(path)) for path in chosen]
    return [torch.stack(arrays[start : start + batch_size]) for start in range(0, len(arrays), batch_size)]


def network(name: str, num_classes: int, preprocessing: Preprocessing, weights: str | None = None) -> nn.Module:
    """A float classifier in eval mode.

    Args:
        name: "torchvision:NAME", "timm:NAME", or "package.module:function", which is called without arguments.
        num_classes: of its head.
        preprocessing: of the images that it takes.
        weights: file of its state_dict, .safetensors or of torch.save.

    Raises:
        QakdError: there is no such network, the weights do not fit it, or it does not answer such images with a number for each
            class.
    """
    source, _, wanted = name.partition(":")
    made = _made(source, wanted, num_classes)
    if weights is not None:
        _load(made, Path(weights), name, num_classes)
    made.eval()
    _require_answer(made, name, num_classes, preprocessing)
    return made


def preprocessing_of(name: str) -> tuple[Preprocessing, str]:
    """What the authors of a network do to its images, and where that is written.

    Args:
        name: "torchvision:NAME" or "timm:NAME".

    Raises:
        QakdError: there is no such network, or it is not said.
    """
    source, _, wanted = name.partition(":")
    if source == "torchvision":
        return _of_torchvision(wanted)
    if source == "timm":
        return _of_timm(wanted)
    raise QakdError(
        f"--model {name} does not say how its images are prepared: pass --size, --mean and --std, for example --size 32 "
        "--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 for RGB, or --mean 0 --std 1 for gray images in [0, 1]."
    )


def _made(source: str, wanted: str, num_classes: int) -> nn.Module:
    if source == "torchvision":
        return _torchvision(wanted).get_model(wanted, weights=None, num_classes=num_classes)  # type: ignore[no-any-return]
    if source == "timm":
        return _timm(wanted).create_model(wanted, pretrained=False, num_classes=num_classes)  # type: ignore[no-any-return]
    from .recipes import resolve

    made = resolve(f"{source}:{wanted}")()
    if not isinstance(made, nn.Module):
        raise QakdError(f"--model {source}:{wanted} must return a torch module, got {type(made).__name__}.")
    return made


def _torchvision(wanted: str) -> Any:
    library = importlib.import_module("torchvision.models")
    _require_known(wanted, library.list_models(), "torchvision")
    return library


def _timm(wanted: str) -> Any:
    library = require("timm", extra="dev", purpose="make the network of --model timm:...")
    _require_known(wanted.partition(".")[0], library.list_models(), "timm")
    return library


def _require_known(wanted: str, known: list[str], library: str) -> None:
    if wanted not in known:
        raise QakdError(f"--model {library}:{wanted}: {library} has no network of that name{suggestion(wanted, known)}.")


def _of_torchvision(wanted: str) -> tuple[Preprocessing, str]:
    weights = _torchvision(wanted).get_model_weights(wanted).DEFAULT
    done = weights.transforms()
    try:
        crop, resize = (edges if len(edges) == 2 else edges * 2 for edges in (done.crop_size, done.resize_size))
        shorter = resize[0] if resize[0] == resize[1] else tuple(resize)
        found = Preprocessing(tuple(crop), shorter, tuple(done.mean), tuple(done.std), done.interpolation.value)
    except AttributeError as error:
        raise QakdError(f"--model torchvision:{wanted} is no image classifier: write a recipe, docs/tasks.md.") from error
    return found, f"as torchvision's {weights}"


def _of_timm(wanted: str) -> tuple[Preprocessing, str]:
    data = importlib.import_module(_timm(wanted).__name__ + ".data")
    written = importlib.import_module("timm.models").get_pretrained_cfg(wanted)
    if written is None:
        raise QakdError(f"--model timm:{wanted}: timm does not say how its images are prepared: pass --size, --mean and --std.")
    done = data.resolve_data_config(pretrained_cfg=written.to_dict())
    _, height, width = done["input_size"]
    scaled = math.floor(height / done["crop_pct"]), math.floor(width / done["crop_pct"])
    if done["crop_mode"] == "border" or (done["crop_mode"] == "center" and height != width):
        raise QakdError(
            f"--model timm:{wanted} takes images of {height}x{width}, cropped by timm's mode {done['crop_mode']!r}, which is "
            "not supported here: pass --size, --mean and --std, or write a recipe."
        )
    resize = scaled[0] if done["crop_mode"] == "center" else scaled
    return Preprocessing((height, width), resize, done["mean"], done["std"], done["interpolation"]), "as timm's data config"


@torch.no_grad()
def _require_answer(model: nn.Module, name: str, num_classes: int, preprocessing: Preprocessing) -> None:
    image = torch.zeros(1, len(preprocessing.mean), *preprocessing.size)
    try:
        answer = model(image)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise QakdError(
            f"--model {name} does not take images {list(image.shape)}, as --size and --mean say: {reason}"
        ) from error
    if not isinstance(answer, Tensor) or answer.shape != (1, num_classes):
        got = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise QakdError(
            f"--model {name} answers one image with {got}; logits [1, {num_classes}] are needed, as --data has classes."
        )


def _load(model: nn.Module, path: Path, name: str, num_classes: int) -> None:
    try:
        data = read_whole(path)
        content = load_safetensors(data) if data[8:9] == b"{" else load_plain(data)
    except OSError as error:
        raise QakdError(f"--weights: {path} cannot be read: {error.strerror}. Check the path.") from error
    except CheckpointError as error:
        raise QakdError(f"--weights: {path}: {error}. Save model.state_dict() with torch.save or safetensors.") from error
    except Exception as error:  # of safetensors, which has a class of its own for damaged bytes
        raise QakdError(
            f"--weights: {path} is damaged, or no safetensors file ({' '.join(str(error).split())}). Save it again."
        ) from error
    inner = content.get("state_dict") if isinstance(content, dict) else None
    state = inner if isinstance(inner, dict) else content
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise QakdError(f"--weights: {path} holds no state_dict. Save model.state_dict().")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(" ".join(itertools.islice(str(error).splitlines(), 1, 4)).split())[:300]
        raise QakdError(
            f"--weights: {path} does not fit {name} with {num_classes} classes, which is what --data has: {reason}"
        ) from error
