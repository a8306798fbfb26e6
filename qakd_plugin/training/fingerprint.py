"""Which run a checkpoint belongs to, as plain data that is the same in every process and at every start."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedQuantizerError
from ..tasks.metrics import fresh
from ..toolkits import Adapter, Quantizer
from .config import Data, Settings
from .data_facts import DataFacts, data_facts
from .facts import facts
from .methods import Method
from .optimizers import optimizer_name
from .streams import length_of
from .teachers import checksum


def fingerprint(
    adapter: Adapter,
    model: nn.Module,
    teacher: nn.Module | None,
    method: Method,
    data: Data,
    seen: DataFacts,
    epochs: int,
    settings: Settings,
    seed: int | None,
) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint; keys are the words of the message that refuses it.

    Args:
        adapter: of the toolkit that prepared ``model``.
        model: the student.
        teacher: as it was passed in, also one that learns: its copy starts there.
        method: its losses.
        data: to train and to validate with.
        seen: of its loader.
        epochs: in all.
        settings: numbers of the run.
        seed: of all sources of randomness.
    """
    return {
        "toolkit": adapter.name,
        "method": repr(method) if getattr(method, "match", None) is None else facts(method, "method"),
        "epochs": epochs,
        "optimizer": optimizer_name(settings.optimizer),
        "augmentation": getattr(data.augment, "__qualname__", type(data.augment).__qualname__),  # its repr may hold an address
        "quantizers": [_quantizer_line(adapter, quantizer) for quantizer in adapter.quantizers(model)],
        "parameters": [f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters()],
        "settings": repr(settings),  # after what its default rate follows from
        "loader length": length_of(data.loader) if data.steps_per_epoch is None else f"{data.steps_per_epoch} steps an epoch",
        "seed": seed,
        "teacher": None if teacher is None else checksum(teacher),
        "data": seen.data,
        "loader": seen.batches,
        "held-out data": None if data.val_loader is None else data_facts(data.val_loader).data,
        "input_stats": facts(data.input_stats, "input_stats"),
        "parameters of the augmentation": facts(data.augment, "augment"),
        "batch_fn": facts(data.batch_fn, "batch_fn"),
        "task_loss": facts(data.task_loss, "task_loss"),
        "metric": None if data.metric is None else facts(fresh(data.metric, "cpu"), "metric"),
        "metric_fn": facts(data.metric_fn, "metric_fn"),
        "monitor": data.monitor,
    }


def _quantizer_line(adapter: Adapter, quantizer: Quantizer) -> str:
    """Which quantizer it is; its numbers change in training."""
    rule = adapter.learned(quantizer)
    try:
        qparams = adapter.qparams(quantizer)
        codes = f", codes {qparams.quant_min}..{qparams.quant_max}"
    except UnsupportedQuantizerError:  # a grid that can be trained with, if not exported
        codes = ""
    return f"{quantizer.fqn} {quantizer.role}{codes}{'' if rule is None else f', {rule.method}'}"
