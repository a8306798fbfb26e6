"""Tracing with torch.export: whether a model can be exported, and the first step of exporting it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import ExportError


def trace(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The graph of a model in eval mode, for any batch size.

    Raises:
        ExportError: torch.export cannot trace it.
    """
    # With a batch of one the exporter would take the batch dimension for a constant.
    batch = example if example.shape[0] > 1 else torch.cat([example, example])
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # user code runs under the tracer: whatever it raises means "cannot be traced"
        raise ExportError(
            f"torch.export cannot trace the model: {first_line(error)} Check that its forward takes one tensor and that "
            "neither values nor the batch size steer its control flow."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout and logs every version conversion; its errors come as exceptions."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
